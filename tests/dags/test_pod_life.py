"""The pod operator's way through a try, against a stand-in of the API: what is taken away, who is asked, what the triggerer gets."""

from __future__ import annotations

import copy
import datetime
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook
from airflow.providers.cncf.kubernetes.operators import pod as provider
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred
from kubernetes.client import models as k8s
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException
from urllib3.exceptions import HTTPError

from forja import recipes
from forja.sites import load_site
from forja_airflow import runs
from forja_airflow.pods import create as podcreate
from forja_airflow.pods import operator as podoperator
from forja_airflow.pods.operator import PodStageOperator
from forja_airflow.pods.spec import pod

SITE, RECIPE = load_site("cluster"), recipes.load("digits")
MARKER = "a-token-that-is-a-secret"


class Api:
    """Pods of one namespace. ``then`` are changes that come one before each look at a pod."""

    def __init__(self) -> None:
        self.pods: dict[str, Any] = {}
        self.then: list[Any] = []
        self.made, self.deleted = list[str](), list[str]()
        self.api_client = self.core_v1_client = self

    def sanitize_for_serialization(self, request: Any) -> Any:
        return request

    def add(self, name: str, phase: str = "Running") -> Any:
        meta = k8s.V1ObjectMeta(
            name=name, namespace="n", uid=name, labels={podcreate.KEY: "k", "task_id": "t"},
            creation_timestamp=datetime.datetime.now(datetime.UTC),
        )  # fmt: skip
        spec = k8s.V1PodSpec(containers=[k8s.V1Container(name="base")], node_name="node")
        state = k8s.V1ContainerState(running=k8s.V1ContainerStateRunning())
        base = k8s.V1ContainerStatus(name="base", image="i", image_id="", ready=True, restart_count=0, state=state)
        self.pods[name] = k8s.V1Pod(metadata=meta, spec=spec, status=k8s.V1PodStatus(phase=phase, container_statuses=[base]))
        return self.pods[name]

    def get_pod(self, name: str, namespace: str) -> Any:
        if self.then:
            self.then.pop(0)()
        if name not in self.pods:
            raise ApiException(status=404)
        return copy.deepcopy(self.pods[name])

    def read_pod(self, there: Any) -> Any:
        return self.get_pod(there.metadata.name, "n")

    def list_namespaced_pod(self, namespace: str, label_selector: str) -> Any:
        return SimpleNamespace(items=[copy.deepcopy(p) for p in self.pods.values()])

    def create_namespaced_pod(self, namespace: str, body: Any) -> Any:
        self.made.append(body.metadata.name)
        return self.add(body.metadata.name)

    def delete_namespaced_pod(self, name: str, namespace: str, **kwargs: Any) -> None:
        self.deleted.append(name)
        self.pods.pop(name, None)

    def delete_pod(self, gone: Any) -> None:
        self.delete_namespaced_pod(gone.metadata.name, "n")

    def list_namespaced_event(self, namespace: str, field_selector: str) -> Any:
        return SimpleNamespace(items=[])

    def read_namespaced_pod_log(self, **kwargs: Any) -> list[bytes]:
        return []

    def patch_namespaced_pod(self, **kwargs: Any) -> None:
        pass

    def await_pod_completion(self, there: Any, *args: Any) -> Any:
        return there

    def leave(self, name: str) -> None:
        """Somebody deletes a pod, which takes its time."""
        self.pods[name].metadata.deletion_timestamp = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def made(api: Api, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes operators of one task whose cluster is ``api``; ``run`` is what the lake says."""
    stage = SimpleNamespace(hardware=False, repeat="memoised")
    run = SimpleNamespace(settings=SimpleNamespace(lake="s3://forja/lake"), prepared=SimpleNamespace(receipt=None, stage=stage, key="k"))
    monkeypatch.setattr(runs, "begin", lambda *_: run)
    monkeypatch.setattr(runs, "arguments", lambda _: [])
    monkeypatch.setattr(runs, "settle", lambda op, run, receipt, context, **_: receipt)
    monkeypatch.setattr(podoperator, "LOOK_S", 0)
    monkeypatch.setattr(provider.BaseHook, "get_connection", lambda _: SimpleNamespace(extra_dejson={"kube_config": MARKER}))

    def make(brief_s: float = 5) -> PodStageOperator:
        op = PodStageOperator(task_id="transform", verb="transform", recipe="digits", **pod(
            SITE.profile("etl"), site=SITE, recipe=RECIPE, verb="transform"
        ))  # fmt: skip
        op.brief_s = brief_s
        vars(op).update(hook=api, client=api, pod_manager=api)
        monkeypatch.setattr(op, "_get_ti_pod_labels", lambda *a, **k: {"task_id": "t"})
        request = k8s.V1Pod(metadata=k8s.V1ObjectMeta(name="new", namespace="n"))
        monkeypatch.setattr(op, "build_pod_request_obj", lambda *_: request)
        return op

    make.run = run  # type: ignore[attr-defined]
    return make


def context(ago_s: float = 0) -> Any:
    began = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=ago_s)
    return {"ti": SimpleNamespace(start_date=began, try_number=2, xcom_push=lambda *a, **k: None)}


def deferred(op: PodStageOperator, ago_s: float = 0) -> Any:
    """The trigger's arguments of an operator that gives its slot back."""
    with pytest.raises(TaskDeferred) as raised:
        op.execute(context(ago_s))
    return raised.value.trigger.serialize()[1]


def event(name: str, status: str = "error", **more: Any) -> dict[str, Any]:
    return {"name": name, "namespace": "n", "status": status, "message": "m", **more}


@pytest.mark.parametrize("how", ["leaves", "is gone"])
def test_an_adopted_pod_that_is_taken_away_meanwhile_is_replaced(how: str, api: Api, made: Any) -> None:
    """As when a person clears a deferred task: the old triggerer deletes the pod a second after this try found it."""
    api.add("old")
    api.then = [lambda: api.leave("old") if how == "leaves" else api.pods.pop("old"), lambda: api.pods.pop("old", None)]
    arguments = deferred(made(brief_s=0.2))
    assert (api.made, arguments["pod_name"]) == (["new"], "new")
    assert not arguments["trigger_kwargs"].get("adopted")


@pytest.mark.parametrize("how", ["is gone", "ended of it", "lost"])
def test_an_adopted_pod_that_is_taken_away_while_it_is_watched_is_replaced_once(how: str, api: Api, made: Any) -> None:
    old = api.add("old")
    arguments = deferred(made(brief_s=0))
    assert (arguments["pod_name"], arguments["trigger_kwargs"]["adopted"], api.made) == ("old", True, [])
    if how == "is gone":
        api.pods.clear()
    else:
        api.leave("old")
        old.status.phase = "Failed"
        ended = k8s.V1ContainerStateTerminated(exit_code=143)
        old.status.container_statuses[0].state = k8s.V1ContainerState(terminated=ended)
    if how == "lost":
        old.status.phase, old.status.container_statuses = "Running", None
    status = {"is gone": "error", "ended of it": "failed", "lost": "timeout"}[how]
    with pytest.raises(TaskDeferred) as raised:
        made(brief_s=0).trigger_reentry(context(), event("old", status, **arguments["trigger_kwargs"]))
    again = raised.value.trigger.serialize()[1]
    assert (again["pod_name"], api.made) == ("new", ["new"])
    api.pods.clear()
    with pytest.raises(AirflowException, match="pod n/new: it was deleted"):
        made().trigger_reentry(context(), event("new", **again["trigger_kwargs"]))
    assert api.made == ["new"]


def test_what_the_adopted_pod_left_counts(api: Api, made: Any) -> None:
    made.run.prepared.receipt = "receipt"
    assert made().trigger_reentry(context(), event("old", adopted=True)) == "receipt"
    assert api.made == []


def test_a_stages_own_last_word_counts_though_its_pod_is_being_deleted(api: Api, made: Any) -> None:
    old = api.add("old", "Failed")
    api.leave("old")
    old.status.container_statuses[0].state = k8s.V1ContainerState(terminated=k8s.V1ContainerStateTerminated(exit_code=2))
    with pytest.raises(AirflowFailException):
        made().trigger_reentry(context(), event("old", "failed", adopted=True))


@pytest.mark.parametrize("hardware", [True, False])
def test_a_result_of_unknown_hardware_is_left_to_the_node(hardware: bool, api: Api, made: Any) -> None:
    made.run.prepared.receipt, made.run.prepared.stage.hardware = "receipt", hardware
    if hardware:
        with pytest.raises(AirflowException, match="it was deleted"):
            made().trigger_reentry(context(), event("mine"))
        made.run.prepared.folder, made.run.lake = "f", SimpleNamespace(size=lambda _: 1)
        assert runs.newest(made.run) == ""
    else:
        assert made().trigger_reentry(context(), event("mine")) == "receipt"


def test_no_credentials_go_into_airflows_database(api: Api, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(f"users: [{{name: u, user: {{token: {MARKER}}}}}]")
    # Several files, as kubectl takes them; the provider would fail to read that as one.
    for named in (str(kubeconfig), f"{kubeconfig}:{tmp_path / 'another'}"):
        monkeypatch.setenv("KUBECONFIG", named)
        arguments = deferred(made(brief_s=0))
        assert MARKER not in str(arguments)
    assert arguments["kubernetes_conn_id"] == "kubernetes_default"


def test_the_wait_for_a_node_is_of_one_time_out(api: Api, made: Any) -> None:
    queue_s = SITE.profile("etl").queue_timeout_s
    assert queue_s - 102 <= deferred(made(brief_s=0), ago_s=100)["schedule_timeout"] <= queue_s - 100
    assert deferred(made(brief_s=0), ago_s=queue_s + 5)["schedule_timeout"] == 1


@pytest.mark.parametrize("wanted", [True, False], ids=["a worker stops", "a person ends it"])
@pytest.mark.parametrize("when", ["waits for an old pod", "looks", "looked", "adopted"])
def test_a_signal_is_heeded_whenever_it_comes(when: str, wanted: bool, api: Api, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "is_running", lambda _: wanted)
    op = made(brief_s=0.1)
    if when == "waits for an old pod":
        api.add("leaving")
        api.leave("leaving")
        api.then = [op.on_kill, *([lambda: api.pods.pop("leaving")] if wanted else [])]
    elif when == "adopted":
        api.add("old")
        api.then = [op.on_kill]
    elif when == "looks":
        api.then = [op.on_kill]
    else:  # the wait is over
        monkeypatch.setattr(provider.BaseHook, "get_connection", lambda _: op.on_kill() or SimpleNamespace(extra_dejson={}))
    began = time.monotonic()
    with pytest.raises(TaskDeferred if wanted else AirflowException) as raised:
        op.execute(context())
    assert time.monotonic() - began < 3
    if not wanted:
        assert "ended by hand" in str(raised.value)
    mine = "old" if when == "adopted" else "new"
    there = wanted or None
    assert (mine in api.pods or None) == there
    assert api.deleted == ([] if wanted or when == "waits for an old pod" else [mine])


def test_one_look_that_fails_gives_no_pod_up(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    op, answers = made(), [ApiException(status=503), "the pod"]

    def read(self: Any, name: str, namespace: str) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(KubernetesHook, "get_pod", read)
    del op.hook
    assert op.hook.get_pod("x", "n") == "the pod"


@pytest.mark.parametrize("error", [ApiException(status=503), ApiException(status=403), HTTPError("away")])
def test_events_that_cannot_be_read_are_none(error: Exception, api: Api, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(api, "list_namespaced_event", fail)
    monkeypatch.setattr(podcreate._events.retry, "sleep", lambda _: None)  # type: ignore[attr-defined]
    assert podcreate.events(made(), "x", "n") == []


@pytest.mark.parametrize("call", ["list_namespaced_pod", "delete_pod"])
@pytest.mark.parametrize(
    "error",
    [ApiException(status=503, reason="busy"), ApiException(status=403, reason="no"), HTTPError("away"),
    ConfigException("no kubeconfig"), AirflowException("no connection")],
)  # fmt: skip
def test_done_work_counts_though_the_cluster_is_away(
    error: Exception, call: str, api: Api, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier try left is then removed by nobody but its own end."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    api.add("old")
    made.run.prepared.receipt = "receipt"
    monkeypatch.setattr(api, call, fail)
    monkeypatch.setattr(podcreate._pods.retry, "sleep", lambda _: None)  # type: ignore[attr-defined]
    assert made().execute(context()) == "receipt"
    assert (api.made, api.deleted) == ([], [])


def test_what_an_earlier_try_left_of_done_work_is_removed(api: Api, made: Any) -> None:
    api.add("old")
    made.run.prepared.receipt = "receipt"
    assert made().execute(context()) == "receipt"
    assert api.deleted == ["old"]


@pytest.mark.parametrize(
    ("status", "kind"), [(401, AirflowException), (403, AirflowFailException), (404, AirflowFailException), (500, AirflowException)]
)
def test_only_a_refusal_that_stays_is_final(
    status: int, kind: type[Exception], api: Api, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ApiException(status=status)

    monkeypatch.setattr(api, "create_namespaced_pod", refuse)
    monkeypatch.setattr(podcreate._post.retry, "sleep", lambda _: None)  # type: ignore[attr-defined]
    with pytest.raises(AirflowException) as raised:
        made().execute(context())
    assert type(raised.value) is kind


@pytest.mark.parametrize(
    ("phase", "node", "status", "why", "said"),
    [
        ("Pending", None, "timeout", None, "no node within 3600 s: "),
        ("Pending", "node", "timeout", None, "not started within 600 s on its node: "),
        ("Pending", "node", "error", None, "x"),
        ("Running", "node", "timeout", None, "ended after the task's time-out: "),
        ("Failed", "node", "failed", "DeadlineExceeded", "ended after the run's time-out, 900 s on its node: "),
    ],
)
def test_the_time_out_is_told(phase: str, node: str | None, status: str, why: str | None, said: str, api: Api, made: Any) -> None:
    op, there = made(), api.add("x", phase)
    op.schedule_timeout_seconds, op.reason, op._status = 3600, "x", status
    there.spec.node_name, there.spec.active_deadline_seconds, there.status.reason = node, 900, why
    assert op._late(there) == (said if said == "x" else f"{said}x")
