"""Parts of the pod operator that need no cluster: reasons, log lines, quotas, and what an earlier try left."""

from __future__ import annotations

import asyncio
import datetime
import json
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.providers.cncf.kubernetes.utils.pod_manager import PodLaunchTimeoutException
from kubernetes_asyncio.client.exceptions import ApiException

from forja_airflow.pods import create as podcreate
from forja_airflow.pods import log as podlog
from forja_airflow.pods import reason as podreason
from forja_airflow.pods import trigger as podtrigger
from forja_airflow.pods.trigger import PodTrigger

SCHEDULER = (
    "0/3 nodes are available: 1 Insufficient nvidia.com/gpu, 2 node(s) had untolerated taint(s). "
    "preemption: 0/3 nodes are available: 3 Preemption is not helpful for scheduling."
)


def parsed(kind: str, given: dict[str, Any]) -> Any:
    """An object of the API as its client gives it."""
    from kubernetes.client import ApiClient

    return ApiClient().deserialize(SimpleNamespace(data=json.dumps(given)), kind)


def pod(*, labels: dict[str, str] | None = None, deleted: int | None = None, name: str = "x", age: int = 0, **status: Any) -> Any:
    """A pod as the API gives it; one that is ``deleted`` must have ended so many seconds ago."""
    limits = {"limits": {"memory": "512Mi"}}
    meta: dict[str, Any] = {"name": name, "namespace": "n", "uid": name, "labels": labels or {}}
    meta["creationTimestamp"] = f"2026-01-01T00:00:{age:02}Z"
    if deleted is not None:
        until = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=deleted)
        meta["deletionTimestamp"] = until.isoformat()
    return parsed("V1Pod", {"metadata": meta, "spec": {"containers": [{"name": "base", "resources": limits}]}, "status": status})


def base(**state: Any) -> list[dict[str, Any]]:
    return [{"name": "base", "image": "forja/ml:0.1.0", "imageID": "", "ready": False, "restartCount": 0, "state": state}]


def event(reason: str, message: str, kind: str = "Warning", second: int = 0) -> Any:
    given = {"reason": reason, "message": message, "type": kind, "lastTimestamp": f"2026-01-01T00:00:{second:02}Z"}
    return parsed("CoreV1Event", {**given, "metadata": {"name": "e"}, "involvedObject": {}})


UNSCHEDULED = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": SCHEDULER}]
PULL = {"reason": "ErrImagePull", "message": "failed to pull: not found"}
BACKOFF = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "forja/ml:0.1.0"'}


@pytest.mark.parametrize(
    ("status", "waits"),
    [
        ({"phase": "Pending"}, ""),
        (
            {"phase": "Pending", "conditions": UNSCHEDULED},
            "0/3 nodes are available: 1 Insufficient nvidia.com/gpu, 2 node(s) had untolerated taint(s).",
        ),
        ({"phase": "Pending", "containerStatuses": base(waiting={"reason": "ContainerCreating"})}, ""),
        ({"phase": "Pending", "containerStatuses": base(waiting=PULL)}, "ErrImagePull: image forja/ml:0.1.0: failed to pull: not found"),
        ({"phase": "Pending", "containerStatuses": base(waiting=BACKOFF)}, f"ImagePullBackOff: {BACKOFF['message']}"),
        ({"phase": "Running", "containerStatuses": base(running={})}, ""),
    ],
    ids=["new", "no node", "being made", "no image", "no image, later", "running"],
)
def test_what_a_pod_waits_for(status: dict[str, Any], waits: str) -> None:
    assert podreason.waits(pod(**status)) == waits


@pytest.mark.parametrize(
    ("status", "events", "why"),
    [
        (
            {"phase": "Failed", "containerStatuses": base(terminated={"exitCode": 137, "reason": "OOMKilled"})},
            [],
            "OOMKilled: the stage needed more than its 512Mi of memory; to do: raise memory_gib of its profile in the site file",
        ),
        (
            {"phase": "Failed", "containerStatuses": base(terminated={"exitCode": 2, "reason": "Error", "message": "a\nBadInput: b\n"})},
            [],
            "BadInput: b",
        ),
        (
            {
                "phase": "Failed",
                "containerStatuses": base(terminated={"exitCode": 5, "message": "Unavailable: down\n0.0 s  works on it\n"}),
            },
            [],
            "Unavailable: down",
        ),
        ({"phase": "Failed", "containerStatuses": base(terminated={"exitCode": 137, "reason": "Error"})}, [], "Error"),
        ({"phase": "Failed", "reason": "Evicted", "message": "low on disk"}, [], "Evicted: low on disk"),
        ({"phase": "Failed", "reason": "DeadlineExceeded", "message": "m"}, [event("Killing", "Stopping")], "DeadlineExceeded: m"),
        (
            {"phase": "Pending"},
            [event("FailedMount", "no volume", second=2), event("Scheduled", "n", "Normal", 5), event("FailedMount", "old", second=1)],
            "FailedMount: no volume",
        ),
        ({"phase": "Unknown"}, [], "the pod is Unknown"),
    ],
    ids=[
        "memory",
        "a stage's own error",
        "an error that another line overtook",
        "killed",
        "evicted",
        "too long",
        "an event",
        "nothing said",
    ],
)
def test_why_a_pod_failed(status: dict[str, Any], events: list[Any], why: str) -> None:
    assert podreason.why(pod(**status), events) == why


def test_reasons_stay_short() -> None:
    long = {"exitCode": 1, "reason": "Error", "message": "x" * 5000}
    assert len(podreason.why(pod(phase="Failed", containerStatuses=base(terminated=long)))) == podreason.LONGEST


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([], "it was deleted by somebody, or with its node"),
        ([event("Killing", "Stopping container base", "Normal")], "it was deleted: Killing: Stopping container base"),
        ([event("Killing", "a", "Normal", 1), event("Preempted", "by pod y", "Normal", 2)], "it was deleted: Preempted: by pod y"),
        ([event("FailedScheduling", "a")], "it was deleted by somebody, or with its node"),
    ],
)
def test_why_a_pod_is_gone(events: list[Any], why: str) -> None:
    assert podreason.vanished(events) == why


LINES = [
    "2026-01-01T00:00:01.000000001Z one\n",
    "2026-01-01T00:00:01.500000000Z two words\n",
    "failed to try resolving symlinks",
    "2026-01-01T01:00:02.25+01:00 three",
    "2026-01-01T00:00:03Z ",
]


def test_log_lines_are_told_once_however_they_are_read() -> None:
    """Each read gets more than is new, since the API cuts by seconds."""
    told: list[str] = []
    after: datetime.datetime | None = None
    for upto in range(1, len(LINES) + 1):
        for moment, text in podlog.new(LINES[max(0, upto - 3) : upto], after):
            told.append(text)
            after = moment
    assert told == ["one", "two words", "three", ""]


def test_a_read_goes_back_far_enough_for_clocks_that_differ() -> None:
    assert podlog.since_seconds(None) is None
    ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=10)
    assert 70 <= (podlog.since_seconds(ago) or 0) <= 72
    assert podlog.moment("2026-01-01T00:00:01+00:00") == datetime.datetime(2026, 1, 1, 0, 0, 1, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("quota", "hopeless"),
    [
        ("gpus, requested: requests.nvidia.com/gpu=2, used: requests.nvidia.com/gpu=0, limited: requests.nvidia.com/gpu=1", True),
        ("gpus, requested: requests.nvidia.com/gpu=1, used: requests.nvidia.com/gpu=1, limited: requests.nvidia.com/gpu=1", False),
        ("all, requested: memory=2Gi,pods=1, used: memory=1536Mi,pods=1, limited: memory=2000Mi,pods=4", True),
        ("all, requested: memory=2Gi,pods=1, used: memory=1536Mi,pods=1, limited: memory=3Gi,pods=4", False),
        ("said in other words", False),
    ],
)
def test_a_request_above_the_quota_itself_is_hopeless(quota: str, hopeless: bool) -> None:
    assert podcreate.hopeless(quota) is hopeless


class Cluster:
    """What podcreate asks of the operator: pods by labels, by name, and their deletion."""

    POD_CHECKED_KEY = "already_checked"

    def __init__(self, *pods: Any) -> None:
        self.there, self.deleted, self.heeded = list(pods), list[str](), 0
        self.labels, self.namespace = {podcreate.KEY: "new"}, "n"
        self.client = self.hook = self.pod_manager = self.log = self

    def list_namespaced_pod(self, namespace: str, label_selector: str) -> Any:
        return SimpleNamespace(items=[p for p in self.there if "lost" not in p.metadata.labels])

    def get_pod(self, name: str, namespace: str) -> Any:
        from kubernetes.client.exceptions import ApiException

        found = next((p for p in self.there if p.metadata.name == name), None)
        if found is None:
            raise ApiException(status=404)
        if found.metadata.deletion_timestamp:
            self.there.remove(found)  # the next look finds it gone
        return found

    def delete_pod(self, pod: Any) -> None:
        self.deleted.append(pod.metadata.name)
        self.there.remove(pod)

    def _get_ti_pod_labels(self, context: Any, include_try_number: bool) -> dict[str, str]:
        return {"task_id": "t"}

    def _persist_pod_identity_to_task_state_store(self, context: Any, pod: Any) -> None:
        context["task_state_store"]["pod_identifier"] = {"name": pod.metadata.name, "namespace": "n"}

    def heed(self, context: Any) -> None:
        self.heeded += 1

    def info(self, *words: Any) -> None:
        pass


def trigger(answers: list[Any], monkeypatch: pytest.MonkeyPatch, told: list[str]) -> PodTrigger:
    """A trigger whose API gives these answers, one after the other; errors are raised. What it tells is put into ``told``."""

    class Hook:
        async def get_pod(self, name: str, namespace: str) -> Any:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        async def read_logs(self, name: str, namespace: str, container: str, since: int | None) -> list[str]:
            return await self.get_pod(name, namespace)

    monkeypatch.setattr(PodTrigger, "hook", Hook())
    monkeypatch.setattr(podtrigger, "PAUSE_S", 0)
    log = SimpleNamespace(info=lambda text, *words: told.append(text % words), debug=lambda *words: None)
    monkeypatch.setattr(podtrigger.Pods, "log", log)
    moment = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    return PodTrigger(pod_name="x", pod_namespace="n", trigger_start_time=moment, base_container_name="base")


def test_the_trigger_is_patient_with_an_api_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    there = pod(phase="Pending", conditions=UNSCHEDULED)
    away: list[Any] = [ConnectionRefusedError(), TimeoutError(), ApiException(status=503), there, there]
    made = trigger(away, monkeypatch, told)
    assert asyncio.run(made._get_pod()) is there
    asyncio.run(made._get_pod())
    assert told.count(f"waits: {podreason.waits(there)}") == 1
    assert made.serialize()[0] == "forja_airflow.pods.trigger.PodTrigger"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_the_trigger_gives_up_where_patience_mends_nothing(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ApiException):
        asyncio.run(trigger([ApiException(status=status)], monkeypatch, [])._get_pod())


ENDED = base(terminated={"exitCode": 0, "reason": "Completed"})


@pytest.mark.parametrize(
    ("deleted", "statuses", "lost"),
    [(None, base(running={}), False), (-30, base(running={}), False), (59, base(running={}), False), (61, base(running={}), True),
     (61, ENDED, False), (61, None, True)],
)  # fmt: skip
def test_a_pod_is_lost_when_nobody_says_that_it_ended(
    deleted: int | None, statuses: Any, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node died: the API keeps it as Running, with a deletion that never comes."""
    found = pod(phase="Running", containerStatuses=statuses, deleted=deleted)
    assert podreason.lost(found) is lost
    made = trigger([found], monkeypatch, [])
    if lost:
        with pytest.raises(PodLaunchTimeoutException, match="its node doesn't say"):
            asyncio.run(made._get_pod())
    else:
        assert asyncio.run(made._get_pod()) is found


def test_the_trigger_tells_the_task_of_a_lost_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trigger([pod(phase="Running", deleted=100)], monkeypatch, [])

    async def first() -> Any:
        return (await anext(made.run())).payload

    assert asyncio.run(first())["status"] == "timeout"


def test_a_log_that_cannot_be_read_is_read_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    pods = trigger([LINES[:1], ApiException(status=500), LINES[:2]], monkeypatch, told).pod_manager
    after = None
    for _ in range(3):
        after = asyncio.run(pods.fetch_container_logs_before_current_sec(None, "base", after))
    assert told == ["one", "two words"]


NEW, OLD = {"task_id": "t", podcreate.KEY: "new"}, {"task_id": "t", podcreate.KEY: "old"}


@pytest.mark.parametrize(
    ("pods", "stored", "adopted", "deleted"),
    [
        ([], "", "", []),
        ([], "gone", "", []),
        ([pod(labels=NEW, phase="Running")], "", "x", []),
        ([pod(labels=NEW, phase="Succeeded")], "x", "x", []),
        ([pod(labels=NEW, phase="Failed")], "", "x", []),
        ([pod(labels=NEW, phase="Running", deleted=-30)], "", "", []),
        ([pod(labels=NEW, phase="Running", deleted=100)], "", "", []),
        ([pod(labels=OLD, phase="Running")], "x", "", ["x"]),
        ([pod(labels={**NEW, "lost": ""}, phase="Running")], "x", "x", []),
        ([pod(labels={**NEW, "lost": "", "task_id": "another"}, phase="Running")], "x", "", []),
        ([pod(labels={**NEW, "lost": "", "already_checked": "True"}, phase="Failed")], "x", "", []),
        ([pod(labels=NEW, phase="Running", name="b", age=2), pod(labels=NEW, phase="Running", name="a", age=1)], "", "a", ["b"]),
    ],
    ids=[
        "nothing", "only its name is left", "running", "ended well", "failed", "being deleted", "lost", "other work", "by the store alone",
        "the store names another task's", "dealt with", "two of them",
    ],
)  # fmt: skip
def test_what_an_earlier_try_left(pods: list[Any], stored: str, adopted: str, deleted: list[str]) -> None:
    cluster = Cluster(*pods)
    store = {"pod_identifier": {"name": stored, "namespace": "n"}} if stored else {}
    found = podcreate.left(cluster, {"task_state_store": store})
    assert (found.metadata.name if found else "") == adopted
    assert cluster.deleted == deleted
    leaving = [p for p in pods if p.metadata.deletion_timestamp and not podreason.lost(p)]
    assert (cluster.heeded, bool(cluster.there)) == ((1, False) if leaving else (0, len(pods) > len(deleted)))
