"""Routes as HTTPRoutes, and compare-and-swap on them. What a gateway does with them is tested in cluster/test_serving.py."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from forja.errors import Conflict, Damaged, ForjaError, Unavailable
from forja.kube import ApiError, Object
from forja.serving import gateway_router
from forja.serving.gateway_router import GatewayRouter
from forja.serving.router import Route
from forja.sites import Gateway

GATEWAY = Gateway(name="models", namespace="forja-gateway", image="s:1", fetch_image="c:1")
ONE, TWO = Route(model="digits", weights={"digits-one": 100}), Route(model="digits", weights={"digits-two": 100}, before="digits-one")


class Store:
    """What the API server keeps of HTTPRoutes: a write must name the newest resourceVersion, if it names one."""

    def __init__(self) -> None:
        self.routes: dict[str, Object] = {}
        self.before_write: Callable[[], None] = lambda: None
        self.after_write: Callable[[], None] = lambda: None

    def get(self, kind: str, name: str, namespace: str = "") -> Object | None:
        return copy.deepcopy(self.routes.get(name))

    def create(self, manifest: Object) -> Object:
        self.before_write()
        if manifest["metadata"]["name"] in self.routes:
            raise ApiError("POST", 409, "AlreadyExists", "it is there")
        return self.put(manifest["metadata"]["name"], {**copy.deepcopy(manifest), "status": {}})

    def patch(self, kind: str, name: str, change: Object, namespace: str = "") -> Object:
        self.before_write()
        old = self.routes[name]
        if change["metadata"]["resourceVersion"] != old["metadata"]["resourceVersion"]:
            raise ApiError("PATCH", 409, "Conflict", "the object has been modified")
        new = {**old, "spec": {k: v for k, v in {**old["spec"], **change["spec"]}.items() if v is not None}}
        new["metadata"] = {**old["metadata"], "annotations": change["metadata"]["annotations"]}
        made = self.put(name, copy.deepcopy(new))
        self.after_write()
        return made

    def put(self, name: str, new: Object) -> Object:
        old = self.routes.get(name, {"metadata": {"resourceVersion": "0", "generation": 0}, "spec": None})
        new["metadata"]["resourceVersion"] = str(int(old["metadata"]["resourceVersion"]) + 1)
        new["metadata"]["generation"] = old["metadata"]["generation"] + (new["spec"] != old["spec"])
        self.routes[name] = new
        return new

    def status(self, **conditions: str) -> None:
        """The gateway's word about what it has seen."""
        new = copy.deepcopy(self.routes["digits"])
        seen = [{"type": k, "status": v, "observedGeneration": new["metadata"]["generation"]} for k, v in conditions.items()]
        new["status"] = {"parents": [{"parentRef": {"name": "models", "namespace": "forja-gateway"}, "conditions": seen}]}
        self.put("digits", new)


class Followed(GatewayRouter):
    """Before a gateway that follows at once."""

    def _wait(self, route: Route, *, answers: bool = True) -> None: ...


@pytest.fixture
def store() -> Store:
    return Store()


def router(store: Store, kind: type[GatewayRouter] = Followed, in_force_s: float = 0.2) -> GatewayRouter:
    # Nothing listens there: a port of the discard service, which no test starts.
    return kind(store, "forja-vision", GATEWAY, "http://127.0.0.1:9", in_force_s)  # type: ignore[arg-type]


def test_swap_counts_and_refuses_the_second(store: Store) -> None:
    assert router(store).read("digits") == Route(model="digits")
    taken = router(store).swap(0, ONE)
    assert (taken.version, taken.live) == (1, "digits-one")
    with pytest.raises(Conflict, match="got 1; allowed: 0"):
        router(store).swap(0, TWO)
    assert router(store).read("digits") == taken
    assert router(store).swap(1, TWO).before == "digits-one"


def test_two_that_saw_the_same_version(store: Store) -> None:
    """Both have read, then both write: the API server lets one of them, and the other finds another version."""
    router(store).swap(0, ONE)

    def other() -> None:
        store.before_write = lambda: None
        router(store).swap(1, Route(model="digits", weights={"digits-other": 100}))

    store.before_write = other
    with pytest.raises(Conflict, match="got 2; allowed: 1"):
        router(store).swap(1, TWO)
    assert router(store).read("digits").live == "digits-other"


def test_two_first_releases(store: Store) -> None:
    def other() -> None:
        store.before_write = lambda: None
        router(store).swap(0, ONE)

    store.before_write = other
    with pytest.raises(Conflict):
        router(store).swap(0, TWO)
    assert router(store).read("digits").live == "digits-one"


def test_the_gateways_own_write_is_no_conflict(store: Store) -> None:
    router(store).swap(0, ONE)

    def seen() -> None:
        store.before_write = lambda: None
        store.status(Accepted="True")

    store.before_write = seen
    assert router(store).swap(1, TWO).version == 2


def test_a_swap_leaves_nothing_of_what_a_hand_added(store: Store) -> None:
    router(store).swap(0, ONE)
    store.routes["digits"]["spec"]["hostnames"] = ["models.example"]
    router(store).swap(1, TWO)
    assert sorted(store.routes["digits"]["spec"]) == ["parentRefs", "rules"]


def test_gateway_that_does_not_follow_gets_the_old_route_back(store: Store) -> None:
    router(store).swap(0, ONE)
    before = store.routes["digits"]["spec"]["rules"][0]["backendRefs"]
    with pytest.raises(Unavailable, match=r"(?s)has not taken the route.*route before is in force again"):
        router(store, GatewayRouter).swap(1, TWO)
    assert store.routes["digits"]["spec"]["rules"][0]["backendRefs"] == before
    after = router(store).read("digits")
    assert (after.weights, after.version) == (ONE.weights, 3)  # a version is never used for two routes


def test_going_back_stays_written_when_the_gateway_is_late(store: Store) -> None:
    router(store).swap(0, ONE)
    router(store).swap(1, dataclasses.replace(TWO, proven=False))
    with pytest.raises(Unavailable, match="written, not yet confirmed"):
        router(store, GatewayRouter).swap(2, ONE, restore=False)
    assert router(store).read("digits") == dataclasses.replace(ONE, version=3)


def test_proof_is_recorded_without_another_version(store: Store) -> None:
    taken = router(store).swap(0, dataclasses.replace(ONE, proven=False))
    spec = copy.deepcopy(store.routes["digits"]["spec"])
    assert not router(store).read("digits").proven
    proven = router(store, GatewayRouter).prove(taken)
    assert router(store).read("digits") == proven == dataclasses.replace(taken, proven=True)
    assert store.routes["digits"]["spec"] == spec
    router(store).swap(1, TWO)
    with pytest.raises(Conflict):
        router(store).prove(taken)


def test_a_record_of_before_the_proof_was_recorded_is_proven(store: Store) -> None:
    router(store).swap(0, ONE)
    notes = store.routes["digits"]["metadata"]["annotations"]
    record = json.loads(notes[gateway_router.RECORD])
    del record["proven"]
    notes[gateway_router.RECORD] = json.dumps(record)
    assert router(store).read("digits").proven


class Answering(GatewayRouter):
    """Before a gateway that has taken what is written, as far as its answers tell."""

    def _elsewhere(self, route: Route) -> str:
        return ""


AWAY: list[ForjaError] = [ApiError("GET", 429, "TooManyRequests", "slow"), ApiError("GET", 503, "Busy", "etcd"), Unavailable("no answer")]


@pytest.mark.parametrize("error", AWAY, ids=["429", "503", "away"])
def test_an_api_server_that_is_away_for_a_moment_is_waited_for(error: ForjaError, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its errors come after the write, while the gateway's word is waited for."""
    router(store).swap(0, ONE)
    failing(store, monkeypatch, error, times=2)
    store.after_write = lambda: store.status(Accepted="True", ResolvedRefs="True")
    assert router(store, Answering, in_force_s=5).swap(1, TWO).version == 2
    assert router(store).read("digits").live == "digits-two"


def test_an_api_server_that_stays_busy_has_the_old_route_restored(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    router(store).swap(0, ONE)
    failing(store, monkeypatch, ApiError("GET", 503, "Busy", "etcd"), seconds=0.4)
    with pytest.raises(Unavailable, match="route before is in force again"):
        router(store, Answering, in_force_s=0.2).swap(1, TWO)
    assert router(store).read("digits").live == "digits-one"


def failing(store: Store, monkeypatch: pytest.MonkeyPatch, error: ForjaError, *, times: int = 0, seconds: float = 0.0) -> None:
    """The wait's reads fail so many times, or so long."""
    real, until, left = GatewayRouter._not_yet, time.monotonic() + seconds, [times]

    def not_yet(self: GatewayRouter, route: Route, answers: bool) -> str:
        with monkeypatch.context() as patch:
            if left[0] > 0 or time.monotonic() < until:
                left[0] -= 1
                patch.setattr(store, "get", Raising(error))
            return real(self, route, answers)

    monkeypatch.setattr(GatewayRouter, "_not_yet", not_yet)


class Raising:
    """Raises whatever it is called with."""

    def __init__(self, error: ForjaError) -> None:
        self.error = error

    def __call__(self, *_: object) -> Any:
        raise self.error


def test_first_route_that_is_not_followed_is_attached_to_nothing(store: Store) -> None:
    with pytest.raises(Unavailable):
        router(store, GatewayRouter).swap(0, ONE)
    assert store.routes["digits"]["spec"]["parentRefs"] == []
    assert router(store).read("digits") == Route(model="digits", version=2)


HANDS: dict[str, Callable[[Any], object]] = {
    "another backend": lambda spec: spec["rules"][0]["backendRefs"][0].update(name="elsewhere"),
    "a rule more": lambda spec: spec["rules"].append({"backendRefs": []}),
    "for some names alone": lambda spec: spec.update(hostnames=["models.example"]),
    "no gateway": lambda spec: spec.pop("parentRefs"),
}


@pytest.mark.parametrize("hand", HANDS.values(), ids=HANDS)
def test_ensure_undoes_what_a_hand_did(hand: Callable[[Any], object], store: Store) -> None:
    taken = router(store).swap(0, ONE)
    wanted = copy.deepcopy(store.routes["digits"]["spec"])
    changed = copy.deepcopy(store.routes["digits"])
    hand(changed["spec"])
    store.put("digits", changed)
    router(store).ensure("digits")
    assert store.routes["digits"]["spec"] == wanted
    assert router(store).read("digits") == taken
    version = store.routes["digits"]["metadata"]["resourceVersion"]
    router(store).ensure("digits")
    assert store.routes["digits"]["metadata"]["resourceVersion"] == version, "nothing differs: nothing is written"


@pytest.mark.parametrize(
    "note", [None, "{", '{"model": "digits", "colour": 1}', '{"model": "ai4i"}', '{"model": "digits", "weights": {"a": 9}}']
)
def test_damaged_record(note: str | None, store: Store) -> None:
    router(store).swap(0, ONE)
    store.routes["digits"]["metadata"]["annotations"] = {} if note is None else {gateway_router.RECORD: note}
    with pytest.raises(Damaged, match="HTTPRoute forja-vision/digits"):
        router(store).read("digits")


def test_manifest_and_its_record() -> None:
    route = Route(model="a_b", version=7, weights={"new": 10, "old": 90}, mirror="new", before="older")
    found = gateway_router.manifest(route, GATEWAY, "forja-vision")
    (parent,), (rule,) = found["spec"]["parentRefs"], found["spec"]["rules"]
    assert (found["metadata"]["name"], found["metadata"]["namespace"]) == ("a-b", "forja-vision")
    assert (parent["name"], parent["namespace"]) == ("models", "forja-gateway")
    assert [(b["name"], b["weight"], b["port"]) for b in rule["backendRefs"]] == [("new", 10, 80), ("old", 90, 80)]
    header, mirror = rule["filters"]
    assert header["responseHeaderModifier"] == {"set": [{"name": "forja-route", "value": "7"}]}
    assert mirror["requestMirror"]["backendRef"]["name"] == "new"
    assert Route(**json.loads(found["metadata"]["annotations"][gateway_router.RECORD])) == route


@pytest.mark.parametrize(
    ("method", "path", "passes"),
    [
        ("POST", "/v2/models/digits/infer", True),
        ("POST", "/v2/models/digits/versions/12/infer", True),
        ("GET", "/v2/models/digits", True),
        ("GET", "/v2/models/digits/versions/1/ready", True),
        ("GET", "/v2/models/digits/infer", False),
        ("POST", "/v2/models/digits/trace/setting", False),
        ("GET", "/v2/models/digits/config", False),
        ("POST", "/v2/models/digits2/infer", False),
        ("POST", "/v2/repository/models/digits/unload", False),
    ],
)
def test_what_passes_to_a_model(method: str, path: str, passes: bool) -> None:
    """The gateway matches the whole path, as re.fullmatch does."""
    found = gateway_router.matches("digits")
    assert any(m["method"] == method and re.fullmatch(m["path"]["value"], path) for m in found) is passes


def route_with(conditions: list[Object] | None, **parent: str) -> Object:
    ref = {"name": "models", "namespace": "forja-gateway", **parent}
    parents = [] if conditions is None else [{"parentRef": ref, "conditions": conditions}]
    return {"metadata": {"generation": 3}, "status": {"parents": parents}}


def condition(kind: str, status: str = "True", seen: int = 3) -> Object:
    return {"type": kind, "status": status, "observedGeneration": seen, "reason": "R", "message": "because"}


BOTH = [condition("Accepted"), condition("ResolvedRefs")]
TAKEN: dict[str, tuple[Any, str]] = {
    "taken": (route_with(BOTH), ""),
    "gone": (None, "gone"),
    "not looked at": (route_with(None), "not looked"),
    "another gateway's word": (route_with(BOTH, name="other"), "not looked"),
    "an old word": (route_with([condition("Accepted"), condition("ResolvedRefs", seen=2)]), "newest state"),
    "not allowed": (route_with([condition("Accepted", "False")]), "Accepted is False: R, because"),
    "no such backend": (route_with([condition("Accepted"), condition("ResolvedRefs", "False")]), "ResolvedRefs is False"),
}


@pytest.mark.parametrize("case", TAKEN)
def test_the_gateways_word(case: str) -> None:
    found, why = TAKEN[case]
    said = gateway_router.refused(found, GATEWAY)
    assert why in said
    assert bool(said) == bool(why)
