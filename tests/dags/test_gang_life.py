"""The gang of a stage from Airflow's side: what its trigger and its operator do when the cluster, or a person, says something."""

from __future__ import annotations

import asyncio
import datetime
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred
from gang_parts import DONE, FAILED, KEY, QUOTA, Api, operator, there

from forja.errors import BadInput, Unavailable
from forja.kube import ApiError, place
from forja_airflow import clusters, runs
from forja_airflow.gang import jobset as gang_jobset
from forja_airflow.gang import trigger as gang_trigger
from forja_airflow.gang.operator import GangStageOperator


class Away(Api):
    """An API server that is away at first."""

    def __init__(self, times: int, **answers: Any) -> None:
        super().__init__(**answers)
        self.times, self.error = times, answers.get("error", Unavailable("the Kubernetes API doesn't answer"))

    def get(self, kind: str, name: str, namespace: str) -> Any:
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return super().get(kind, name, namespace)


@pytest.mark.parametrize(
    ("away", "found", "later_s", "status"),
    [
        (3, there(status=DONE), 60, "completed"),
        (0, there(status=FAILED), 60, "failed"),
        (0, None, 60, "gone"),
        (0, there(uid="another"), 60, "gone"),
        (10**9, None, 0.05, "late"),
        (0, there(), 0.05, "late"),
        (0, there(status=FAILED, deletionTimestamp="2026-01-01T00:00:00Z"), 0.05, "late"),
        (0, there(status=DONE, deletionTimestamp="2026-01-01T00:00:00Z"), 60, "completed"),
    ],
)
def test_the_trigger_tells_how_the_gang_is(away: int, found: Any, later_s: float, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang_trigger, "EVERY_S", 0.01)
    monkeypatch.setattr(gang_trigger, "CALM_S", 0.01)
    api = Away(away, there=found)
    monkeypatch.setattr(gang_trigger.clusters, "connect", lambda _: api)
    trigger = gang_trigger.GangTrigger("kubernetes_default", "ns", "name", "u1", 60, time.time() + later_s)

    async def first() -> Any:
        return (await anext(trigger.run())).payload

    assert asyncio.run(first())["status"] == status


def test_a_person_who_ends_the_task_ends_that_very_gang(monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api(there=there())
    monkeypatch.setattr(gang_trigger.clusters, "connect", lambda _: api)
    asyncio.run(gang_trigger.GangTrigger("kubernetes_default", "forja-vision", "digits-0123456789", "u1", 60, 0.0).on_kill())
    assert api.asked == [f"DELETE {place('JobSet', 'forja-vision')}/digits-0123456789 u1"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EVERY_S", "CALM_S"):
        monkeypatch.setattr(gang_trigger, name, 0.01)


def fires(later_s: float = 60) -> dict[str, Any]:
    """What a trigger of the gang tells."""
    trigger = gang_trigger.GangTrigger("kubernetes_default", "forja-vision", "digits-0123456789", "u1", 60, time.time() + later_s)

    async def first() -> Any:
        return (await anext(trigger.run())).payload

    return asyncio.run(first())  # type: ignore[no-any-return]


UNKNOWN, FORBIDDEN = ApiError("GET", 401, "Unauthorized", "who?"), ApiError("GET", 403, "Forbidden", "no")


@pytest.mark.parametrize("error", [UNKNOWN, FORBIDDEN, AirflowFailException("BadInput: connection"), BadInput("connection")])
def test_one_refusal_is_asked_again_with_the_credentials_read_anew(error: Exception, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that was rotated: the old client is of no use."""
    connected: list[Any] = []

    def connect(_: str) -> Any:
        connected.append(Away(1 if not connected else 0, there=there(status=DONE), error=error))
        return connected[-1]

    monkeypatch.setattr(gang_trigger.clusters, "connect", connect)
    assert fires()["status"] == "completed"
    assert len(connected) == 2


@pytest.mark.parametrize("error", [FORBIDDEN, AirflowFailException("BadInput: connection")])
def test_a_refusal_that_stays_is_told(error: Exception, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(_: str) -> Any:
        raise error

    monkeypatch.setattr(gang_trigger.clusters, "connect", connect)
    told = fires()
    assert (told["status"], told["message"]) == ("refused", str(error))


def test_ending_a_gang_is_tried_again_while_the_api_is_away(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    api, answers = Api(there=there()), [Unavailable("away"), AirflowException("no connection"), UNKNOWN]

    def connect(_: str) -> Any:
        if answers:
            raise answers.pop(0)
        return api

    monkeypatch.setattr(gang_trigger.clusters, "connect", connect)
    trigger = gang_trigger.GangTrigger("kubernetes_default", "forja-vision", "digits-0123456789", "u1", 60, 0.0)
    asyncio.run(trigger.on_kill())
    assert len(api.asked) == 1
    monkeypatch.setattr(gang_trigger, "END_S", 0.05)
    answers[:], trigger._kube = [Unavailable("away")] * 1000, None
    with pytest.raises(Unavailable):
        asyncio.run(trigger.on_kill())


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An operator without a receipt in its lake, whose cluster is ``op.api``."""
    made: Any = operator()
    stage = SimpleNamespace(hardware=False, repeat="memoised")
    prepared = SimpleNamespace(receipt=None, stage=stage, key=KEY, folder="vision/digits/train/k")
    made.run = SimpleNamespace(
        settings=SimpleNamespace(lake="s3://forja/lake"), prepared=prepared, lake=SimpleNamespace(size=lambda _: None)
    )
    made.api = Api()
    monkeypatch.setattr(runs, "begin", lambda *_: made.run)
    monkeypatch.setattr(runs, "arguments", lambda _: [])
    monkeypatch.setattr(runs, "settle", lambda op, run, receipt, context, **_: receipt)
    monkeypatch.setattr(clusters, "connect", lambda _: made.api)
    monkeypatch.setattr(made, "jobset", lambda _: {k: v for k, v in there().items() if k != "status"})
    return made


def context(tries: int = 1) -> Any:
    return {"ti": SimpleNamespace(try_number=tries, xcom_push=lambda *a, **k: None)}


META = {"metadata": {"name": "digits-0123456789", "namespace": "forja-vision", "uid": "u1"}}
NOW = datetime.datetime.now(datetime.UTC).isoformat()


def resumed(op: GangStageOperator, status: str, **more: Any) -> str | None:
    return op.resume(context(), {"status": status, "message": "words"}, META, **more)


def test_a_gang_that_runs_is_watched_again_though_the_cluster_refused_to_tell(op: Any) -> None:
    op.api = Api(there=there(creationTimestamp=NOW))
    with pytest.raises(TaskDeferred) as raised:
        resumed(op, "refused", refused=2, adopted=True)
    assert raised.value.kwargs == {"jobset": META, "refused": 3, "adopted": True}
    assert op.api.asked == []
    with pytest.raises(AirflowException, match="the cluster refuses to tell about the gang: words"):
        resumed(op, "refused", refused=op.MAX_REDEFER_ATTEMPTS)
    assert len(op.api.asked) == 1


@pytest.mark.parametrize("status", ["refused", "completed", "gone"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UNKNOWN, "the cluster refuses to tell about the gang: .*who?"),
        (FORBIDDEN, "the cluster refuses to tell about the gang: .*Forbidden"),
        (ApiError("GET", 503, "ServiceUnavailable", "etcd"), "503 ServiceUnavailable"),
        (Unavailable("away"), "Unavailable: away"),
    ],
    ids=["401", "403", "503", "away"],
)
def test_a_refusal_that_lasts_ends_this_try_and_the_next_one_adopts_the_gang(error: Exception, said: str, status: str, op: Any) -> None:
    """No error of the gang's, which runs: neither is the task failed for good, nor the gang removed."""
    op.api = Away(1, there=there(), error=error)
    with pytest.raises(AirflowException, match=said) as raised:
        resumed(op, status)
    assert type(raised.value) is AirflowException
    assert op.api.asked == []
    with pytest.raises(TaskDeferred) as deferred:
        op.execute(context(2))
    assert deferred.value.kwargs == {"jobset": META, "adopted": True}


def test_a_connection_that_breaks_meanwhile_ends_this_try_alone(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(_: str) -> Any:
        raise AirflowFailException("BadInput: connection")

    monkeypatch.setattr(clusters, "connect", connect)
    with pytest.raises(AirflowException, match="the cluster refuses to tell about the gang: BadInput: connection") as raised:
        resumed(op, "refused")
    assert type(raised.value) is AirflowException


@pytest.mark.parametrize(("status", "said"), [(FAILED, "the gang failed"), (DONE, "left no receipt"), (None, "the gang is gone")])
def test_what_became_of_a_gang_counts_more_than_the_refusal(status: Any, said: str, op: Any) -> None:
    op.api = Api(there=there(status=status)) if status else Api()
    with pytest.raises(AirflowException, match=said):
        resumed(op, "refused")
    assert len(op.api.asked) == 1


def test_a_gang_that_is_gone_counts_when_its_work_is_done(op: Any) -> None:
    with pytest.raises(AirflowException, match="the gang is gone, and left no receipt: words"):
        resumed(op, "gone")
    op.run.prepared.receipt = "receipt"
    assert resumed(op, "gone") == "receipt"


def test_an_adopted_gang_that_is_taken_away_is_replaced_once(op: Any) -> None:
    """As when a person clears a deferred task, and this try finds the gang before the old triggerer has removed it."""
    op.api = Api(there=there())
    with pytest.raises(TaskDeferred) as raised:
        op.execute(context(2))
    assert raised.value.kwargs == {"jobset": META, "adopted": True}
    op.api = Api()
    with pytest.raises(TaskDeferred) as raised:
        resumed(op, "gone", adopted=True)
    assert raised.value.kwargs == {"jobset": META, "adopted": False}
    op.run.prepared.receipt = "receipt"
    assert resumed(op, "gone", adopted=True) == "receipt"


def test_a_gang_has_time_to_start(op: Any) -> None:
    with pytest.raises(TaskDeferred) as raised:
        op.execute(context())
    began = gang_jobset.moment("2026-01-01T00:00:00Z")
    assert raised.value.trigger.deadline == began + op.queue_s + 600 + op.run_s


@pytest.mark.parametrize(("tries", "key", "removed"), [(2, KEY, 1), (1, KEY, 0), (2, "f" * 32, 0)])
def test_what_an_earlier_try_left_of_done_work_is_removed(tries: int, key: str, removed: int, op: Any) -> None:
    op.run.prepared.receipt = "receipt"
    op.api = Api(there=there(labels={"forja/key": key}))
    assert op.execute(context(tries)) == "receipt"
    assert len(op.api.asked) == removed


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (403, "forbidden", AirflowFailException),
        (404, "no such kind", AirflowFailException),
        (422, "invalid", AirflowFailException),
        (401, "who?", AirflowException),
        (500, "webhook", AirflowException),
        (403, QUOTA["message"], AirflowException),
        (403, "exceeded quota: q, requested: jobs=2, used: jobs=0, limited: jobs=1", AirflowFailException),
    ],
)
def test_a_refusal_means_what_it_means_for_a_pod(
    status: int, message: str, kind: type[Exception], op: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise ApiError("POST", status, "Reason", message)

    monkeypatch.setattr(op.api, "create", refuse)
    with pytest.raises(AirflowException, match="the gang") as raised:
        op.execute(context())
    assert type(raised.value) is kind


@pytest.mark.parametrize("wanted", [True, False], ids=["a worker stops", "a person ends it"])
def test_a_signal_while_the_gang_is_made_is_heeded_after_it(wanted: bool, op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "is_running", lambda _: wanted)
    asked_by_then: list[int] = []

    def create(manifest: Any) -> Any:
        op.on_kill()
        asked_by_then.append(len(op.api.asked))
        return manifest

    monkeypatch.setattr(op.api, "create", create)
    with pytest.raises(TaskDeferred if wanted else AirflowException):
        op.execute(context())
    assert asked_by_then == [0], "nothing is sent from the handler of a signal"
    assert len(op.api.asked) == (not wanted)


def test_the_manifest_needs_no_airflow() -> None:
    root = Path(__file__).resolve().parents[2]
    code = "import sys; sys.modules['airflow'] = None; import forja_airflow.gang.jobset"
    path = {"PYTHONPATH": f"{root / 'include'}:{root / 'plugins'}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=path)
