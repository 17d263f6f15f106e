"""Changes of a node step by step against a made-up API, for what no cluster does on demand; the real one: tests/cluster/test_mig.py."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from forja.errors import BadInput, ForjaError, Refused, Unavailable
from forja.kube import ApiError, Kube
from forja.mig import change as steps
from forja.mig import drain, layouts, node, probe, revert, whole
from forja.mig.change import Change, Times
from forja.mig.node import CONFIG, DEPLOY, PAUSED, STATE

PRODUCT, COUNT, STRATEGY = "nvidia.com/gpu.product", "nvidia.com/gpu.count", "nvidia.com/mig.strategy"
FACTS = {PRODUCT: "NVIDIA-H100-80GB-HBM3", COUNT: "2", STRATEGY: "mixed"}
HALVES = {"nvidia.com/gpu": "0", "nvidia.com/mig-3g.40gb": "4"}
Then = Callable[[str, str], None]


class Api(Kube):
    """One node and its pods. ``then`` is called after each answer, with method and path: what the others in the cluster do."""

    def __init__(self) -> None:
        self.labels: dict[str, str] = {**FACTS, CONFIG: "all-disabled", STATE: "success", f"{DEPLOY}gpu-feature-discovery": "true"}
        self.annotations: dict[str, str] = {}
        self.spec: dict[str, Any] = {}
        self.offers, self.pods, self.version = {"nvidia.com/gpu": "2"}, list[dict[str, Any]](), 1
        self.then: Then = lambda method, path: None

    def request(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """An answer of the API."""
        answer = copy.deepcopy(self._answer(method, path, body))
        self.then(method, path)
        return answer

    def _answer(self, method: str, path: str, body: Any) -> Any:
        if "/nodes/" in path:
            if method == "PATCH":
                self._merge(body)
            meta = {"name": "n", "resourceVersion": str(self.version), "labels": self.labels, "annotations": self.annotations}
            return {"metadata": meta, "spec": self.spec, "status": {"allocatable": self.offers}}
        if method == "DELETE":
            raise ApiError(path, 404, "NotFound", "no such pod")
        if path.endswith("/eviction") and not body["deleteOptions"].get("dryRun"):
            self.pods = [p for p in self.pods if p["metadata"]["name"] != body["metadata"]["name"]]
        return {"items": self.pods, "status": {"phase": "Succeeded"}}

    def _merge(self, change: Any) -> None:
        meta = change["metadata"]
        if meta["resourceVersion"] != str(self.version):
            raise ApiError("PATCH", 409, "Conflict", "the object has been modified")
        self.version += 1
        for mine, given in ((self.labels, meta.get("labels")), (self.annotations, meta.get("annotations")), (self.spec, change["spec"])):
            mine.update(given or {})
            for key in [k for k, v in mine.items() if v is None]:
                del mine[key]


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (steps, drain, probe):
        monkeypatch.setattr(module, "POLL_S", 0.001)


@pytest.fixture
def api() -> Api:
    return Api()


def change(layout: str = "halves", holder: str = "me", **options: Any) -> Change:
    times = Times(drain_s=0.1, apply_s=0.5, verify_s=0.5, revert_s=0.5)
    return Change(node="n", layout=layout, holder=holder, known=layouts.load(), **{"times": times, **options})


def manager(api: Api, *, cuts: bool = True, facts_return: bool = True) -> Then:
    """mig-manager and the operator's pods: while feature discovery is paused, its labels are gone."""

    def then(method: str, path: str) -> None:
        if method != "PATCH":
            return
        if api.labels.get(CONFIG) == "halves" and STATE not in api.labels:
            api.labels.update({STATE: "pending", f"{DEPLOY}gpu-feature-discovery": PAUSED})
            for name in FACTS:
                api.labels.pop(name)
            api.version += 1
            api.then = after

    def after(method: str, path: str) -> None:
        if api.labels.get(STATE) == "pending" and cuts:
            api.labels.update({STATE: "success", f"{DEPLOY}gpu-feature-discovery": "true"})
            api.offers = HALVES
            api.version += 1
        elif api.labels.get(f"{DEPLOY}gpu-feature-discovery") == "true" and facts_return and PRODUCT not in api.labels:
            api.labels.update(FACTS)
            api.version += 1
        elif not cuts and method == "PATCH" and api.labels.get(CONFIG) == "all-disabled" and STATE not in api.labels:
            api.labels[STATE] = "failed"

    return then


def test_labels_of_feature_discovery_go_while_it_is_paused_and_are_waited_for(api: Api) -> None:
    """What the node is was written down by cordon: without its labels the change goes on, and ends when they are back."""
    api.then = manager(api)
    assert whole.make(api, change(), lambda _: None) == "changed"
    assert (node.look(api, "n").gpu.name, api.spec, api.annotations) == ("h100-80", {}, {})


def test_labels_that_stay_away_are_no_layout_in_force(api: Api) -> None:
    api.then = manager(api, facts_return=False)
    with pytest.raises(Refused, match="gpu-feature-discovery"):
        whole.make(api, change(), lambda _: None)


def test_the_way_back_does_not_need_the_labels_of_feature_discovery(api: Api) -> None:
    """A manager that wedges leaves feature discovery paused, and with it the node without the labels that say what it is."""
    api.then, told = manager(api, cuts=False), list[str]()
    with pytest.raises(Refused, match="pending"):
        whole.make(api, change(), told.append)
    assert (api.spec, api.annotations, api.labels[f"{DEPLOY}gpu-feature-discovery"]) == ({}, {}, "true"), told
    assert api.labels[PRODUCT] == FACTS[PRODUCT]


@pytest.mark.parametrize("error", [Unavailable("no answer"), ApiError("PATCH", 503, "ServiceUnavailable", "etcd leader changed")])
def test_a_cordon_whose_answer_is_lost_is_taken_back_when_the_api_is_back(api: Api, error: ForjaError) -> None:
    """The write came through, its answer didn't: the node would be left cordoned."""
    away = iter([error] * 4)

    def then(method: str, path: str) -> None:
        if (method == "PATCH" or api.annotations) and (lost := next(away, None)):
            raise lost

    api.then = then
    with pytest.raises(type(error)):
        whole.make(api, change(), lambda _: None)
    assert (api.spec, api.annotations) == ({}, {})


def test_a_way_back_whose_last_answer_is_lost_has_been_gone(api: Api) -> None:
    steps.cordon(api, change(), lambda _: None)
    lost = iter([Unavailable("no answer")])

    def then(method: str, path: str) -> None:
        if not api.annotations and (error := next(lost, None)):
            raise error

    api.then = then
    assert revert.revert(api, change(), lambda _: None) is True


def test_a_change_that_can_not_be_taken_back_says_what_is_left(api: Api) -> None:
    def then(method: str, path: str) -> None:
        if api.annotations:
            raise Unavailable("no answer")

    api.then = then
    with pytest.raises(Refused, match=r"node n may be left cordoned.*\./forja mig revert --node n"):
        whole.make(api, change(), lambda _: None)


def test_a_way_back_while_somebody_else_works_is_refused_and_says_how_long(api: Api) -> None:
    steps.cordon(api, change(holder="airflow/mig_layout/1"), lambda _: None)
    before = dict(api.annotations)
    with pytest.raises(Refused, match=r"airflow/mig_layout/1.* in \d+ s"):
        revert.revert(api, change(), lambda _: None, adopt=True)
    assert revert.revert(api, change(), lambda _: None) is False, "a run of its own has nothing to take back"
    assert api.annotations == before


def test_a_way_back_takes_over_although_the_kubelet_writes_to_the_node(api: Api) -> None:
    steps.cordon(api, change(holder="dead"), lambda _: None)
    record = json.loads(api.annotations[node.ANNOTATION])
    api.annotations[node.ANNOTATION] = json.dumps({**record, "until": 1.0})
    beats = iter(range(2))

    def then(method: str, path: str) -> None:
        if method == "GET" and next(beats, None) is not None:
            api.version += 1

    api.then = then
    assert revert.revert(api, change(), lambda _: None, adopt=True)
    assert (api.spec, api.annotations) == ({}, {})


def test_a_node_without_a_change_has_nothing_to_take_back_whatever_it_is(api: Api) -> None:
    """The run that refused it from the start must not seem to have left it half done."""
    del api.labels[STRATEGY]
    told: list[str] = []
    assert revert.revert(api, change(), told.append) is False
    assert told == ["nothing to take back on node n: no change is open"]


def test_time_sliced_gpus_are_refused_from_the_start(api: Api) -> None:
    """Each slice would be offered several times: no layout could ever be seen to be in force."""
    api.labels["nvidia.com/gpu.sharing-strategy"] = "time-slicing"
    with pytest.raises(BadInput, match="time-slicing"):
        whole.make(api, change(), lambda _: None)
    assert (api.spec, api.annotations) == ({}, {})


def pod(name: str, owner: str = "", **meta: Any) -> dict[str, Any]:
    references = [{"kind": owner, "controller": True}] if owner else []
    return {
        "metadata": {"namespace": "t", "name": name, "uid": name, "ownerReferences": references, **meta},
        "spec": {"containers": [{"resources": {"limits": {"nvidia.com/gpu": "1"}}}]},
    }


def drained(api: Api) -> list[str]:
    return drain.drain(api, "n", lambda _: None, lambda: None, deadline_s=0.1)


def test_a_pod_that_came_late_is_not_lost_either(api: Api) -> None:
    """Bound by the scheduler before it saw the cordon: the drain looks again."""
    api.pods = [pod("train", "Job")]

    def then(method: str, path: str) -> None:
        if method == "POST" and len(api.pods) == 1 and not late:
            late.append(pod("notebook"))
            api.pods += late

    late, api.then = list[dict[str, Any]](), then
    with pytest.raises(Refused, match=r"nothing would start again.*t/notebook"):
        drained(api)
    assert late[0] in api.pods


def test_a_pod_that_is_ending_is_waited_for_and_not_refused(api: Api) -> None:
    api.pods = [pod("notebook", deletionTimestamp="2026-01-01T00:00:00Z")]
    with pytest.raises(Refused, match="is ending"):
        drained(api)


def test_a_daemon_set_that_holds_a_gpu_stops_the_drain_before_anything_is_evicted(api: Api) -> None:
    api.pods = [pod("train", "Job"), pod("agent", "DaemonSet")]
    with pytest.raises(Refused, match=r"t/agent: .*DaemonSet"):
        drained(api)
    assert len(api.pods) == 2
    api.pods.pop()
    assert drained(api) == ["t/train"]
