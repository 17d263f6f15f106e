"""How a release goes live, and back. Its servers are stand-ins here; real ones: integration and cluster/test_serving.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from unit.serving_places import PLACES, At, AtDeployments, Raising, candidate

from forja.errors import Conflict, ForjaError, Refused, Unavailable
from forja.kube import ApiError
from forja.serving import deployments, rollout, triton, triton_pod
from forja.serving.deployments import Deployments
from forja.serving.router import Route

WAIT_READY = triton.wait_ready
"""The real one, which ``At`` takes the place of."""


@pytest.fixture(params=PLACES)
def at(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> At:
    return PLACES[request.param](tmp_path, monkeypatch)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AtDeployments:
    return AtDeployments(tmp_path, monkeypatch)


def test_releases_go_live_one_after_the_other(at: At) -> None:
    for version in ("1", "2", "3", "2"):
        assert at.release(version).proven
        assert at.live() == version
        assert at.asked[-1] == "router"
    before = at.place.router.read("digits")
    assert at.release("2") == before, "again changes nothing"


def test_killed_before_the_proof_and_the_proof_then_fails(at: At) -> None:
    at.release("1")
    old = at.place.router.read("digits").live
    at.killed_before_the_proof("2")
    assert (at.live(), at.place.router.read("digits").proven) == ("2", False)
    at.failing_through_the_router("2")
    route = at.place.router.read("digits")
    assert (at.live(), route.live, route.proven) == ("1", old, True)


def test_killed_before_the_proof_and_the_server_itself_fails_then(at: At) -> None:
    at.release("1")
    at.killed_before_the_proof("2")
    at.wrong.add("2")
    with pytest.raises(Refused, match="golden"):
        at.release("2")
    assert at.live() == "1"


def test_killed_before_the_proof_and_the_proof_then_passes(at: At) -> None:
    at.release("1")
    at.killed_before_the_proof("2")
    version = at.place.router.read("digits").version
    route = at.release("2")
    assert (at.live(), route.proven, route.version) == ("2", True, version)


def test_first_release_that_is_never_proven_is_routed_to_no_more(at: At) -> None:
    at.killed_before_the_proof("1")
    at.failing_through_the_router("1")
    assert at.place.router.read("digits").weights == {}
    at.release("1")
    assert at.live() == "1"


def test_another_release_never_takes_the_only_backend_to_go_back_to(at: At) -> None:
    at.release("1")
    at.killed_before_the_proof("2")
    at.wrong.add("3")
    with pytest.raises(Refused, match="golden"):
        at.release("3")
    assert (at.live(), at.place.router.read("digits").proven) == ("1", True)
    assert at.release("4").proven
    assert at.live() == "4"


def test_a_proof_that_fails_goes_back_in_the_same_try(at: At) -> None:
    at.release("1")
    at.failing_through_the_router("2")
    assert at.live() == "1"
    assert at.place.router.read("digits").proven


def test_going_back_that_is_not_confirmed_in_time_stays(there: AtDeployments) -> None:
    there.release("1")

    def late(*_: object) -> float:
        there.place.router.late = True  # type: ignore[attr-defined]
        raise Refused("wrong answers through the router")

    with there.patch.context() as patch:
        patch.setattr(rollout, "_through_router", late)
        with pytest.raises(Refused, match="through the router"):
            there.release("2")
    assert there.live() == "1"


def test_an_older_release_does_not_come_over_a_newer_one_by_a_retry(at: At) -> None:
    at.release("7")
    at.killed_before_the_proof("8")
    at.release("8", done=False)  # live, and then MLflow was away
    at.release("9")
    with pytest.raises(Refused, match="version 9 of digits went live"):
        at.release("8")
    assert at.live() == "9"
    at.release("8")  # again: somebody wants it
    assert at.live() == "8"


def test_going_back_by_hand_survives_its_own_retries(at: At) -> None:
    for version in ("8", "9"):
        at.release(version)
    with at.patch.context() as patch:
        patch.setattr(at.place, "put", Raising(Unavailable("no node")))
        with pytest.raises(Unavailable):
            at.release("8")
    at.release("8")
    assert at.live() == "8"


def test_a_newer_release_comes_over_an_older_one_by_a_retry(at: At) -> None:
    at.release("7")
    at.killed_before_the_proof("9")
    at.release("8")
    at.release("9")
    assert at.live() == "9"


def test_a_changed_image_is_proven_beside_what_is_live(there: AtDeployments) -> None:
    there.release("1")
    old = there.place.router.read("digits").live
    there.cluster.applied.clear()
    there.place = there.site(image="s:2")
    there.wrong.add("1")
    with pytest.raises(Refused, match="golden"):
        there.release("1")
    assert there.place.router.read("digits").live == old
    assert old not in {manifest["metadata"]["name"] for manifest in there.cluster.applied}, "what is live isn't written to"
    there.wrong.clear()
    assert there.release("1").live != old
    assert there.place.router.read("digits").before == old


def test_wake_under_another_image_changes_no_template(there: AtDeployments) -> None:
    there.release("1")
    live = there.place.router.read("digits").live
    found = there.place.held(live)
    assert found is not None
    template = copy.deepcopy(there.cluster.objects["Deployment", live]["spec"]["template"])
    there.cluster.applied.clear()
    there.site(image="s:2", cpus=3.0).wake(live, found)
    assert there.cluster.applied == [], "nothing that was not proven comes into the cluster by this way"
    assert there.cluster.objects["Deployment", live]["spec"]["template"] == template
    there.cluster.objects["Deployment", live]["spec"]["template"]["spec"]["containers"][0]["image"] = "by-hand:1"
    there.place.wake(live, found)
    assert there.cluster.objects["Deployment", live]["spec"]["template"] == template, "what was proven is put back"


def test_every_pod_is_asked(there: AtDeployments) -> None:
    there.release("1")
    pods_of_one = [address for address in there.asked if address != "router"]
    assert len(set(pods_of_one)) == 2
    assert all(address.endswith(":8000") for address in pods_of_one)
    there.asked.clear()
    there.release("1")
    assert sorted(there.asked) == sorted([*pods_of_one, "router"])


def test_no_pod_is_no_proof(there: AtDeployments) -> None:
    there.release("1")
    there.cluster.ready = False
    with pytest.raises(Unavailable, match="no server that is ready"):
        there.place.addresses(there.place.router.read("digits").live)


def test_replicas_get_a_budget_that_goes_with_their_deployment(there: AtDeployments) -> None:
    there.release("1")
    live = there.place.router.read("digits").live
    (owner,) = there.cluster.objects["PodDisruptionBudget", live]["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"]) == ("Deployment", live)
    there.place = there.site(replicas=1)
    route = there.release("2")
    assert ("PodDisruptionBudget", route.live) not in there.cluster.objects


def test_remove_leaves_what_another_run_made_live(there: AtDeployments) -> None:
    """The route is claimed before anything is deleted: the swap that made the Deployment live was faster."""
    there.release("1")
    router, route = there.place.router, there.place.router.read("digits")
    name = there.place.pick(candidate(there.lake, "2").release, route)
    real = router.swap

    def swap(expected: int, new: Route, **named: Any) -> Route:
        there.patch.setattr(router, "swap", real)
        real(expected, Route(model="digits", weights={name: 100}, before=route.live))
        return real(expected, new, **named)

    there.wrong.add("2")
    there.patch.setattr(router, "swap", swap)
    with pytest.raises(Refused):
        there.release("2")
    assert router.read("digits").live == name
    assert name in there.cluster.names()


def test_after_remove_nobody_can_make_it_live(there: AtDeployments) -> None:
    there.release("1")
    route = there.place.router.read("digits")
    there.wrong.add("2")
    with pytest.raises(Refused):
        there.release("2")
    assert there.cluster.names() == {route.live}
    with pytest.raises(Conflict):
        there.place.router.swap(route.version, route)


def test_tidy_takes_what_a_lost_route_left_and_nothing_in_progress(there: AtDeployments) -> None:
    there.release("1")
    route = there.place.router.read("digits")
    made = copy.deepcopy(there.cluster.objects["Deployment", route.live])
    for name, beside in {"d-old": 0, "d-in-progress": route.version, "d-lost-epoch": 40}.items():
        made["metadata"].update(name=name)
        made["metadata"]["annotations"][triton_pod.BESIDE] = str(beside)
        there.cluster._keep(made)
    there.place.tidy()
    assert there.cluster.names() == {route.live, "d-in-progress"}


def test_tidy_reads_the_route_after_the_list(there: AtDeployments) -> None:
    """A release that goes live between the two stays."""
    there.release("1")
    old = there.place.router.read("digits")
    name = there.place.pick(candidate(there.lake, "2").release, old)
    made = copy.deepcopy(there.cluster.objects["Deployment", old.live])
    made["metadata"]["name"] = name
    made["metadata"]["annotations"][triton_pod.BESIDE] = "40"
    there.cluster._keep(made)

    def swapped() -> None:
        there.cluster.listed = lambda: None
        there.place.router.swap(old.version, Route(model="digits", weights={name: 100}, before=old.live))

    there.cluster.listed = swapped
    there.place.tidy()
    assert there.cluster.names() == {name, old.live}


PASSING: list[ForjaError] = [
    ApiError("GET", 429, "TooManyRequests", "slow"),
    ApiError("GET", 503, "Busy", "etcd"),
    Unavailable("no answer"),
]


@pytest.mark.parametrize("error", PASSING, ids=["429", "503", "away"])
@pytest.mark.parametrize("step", ["_wait", "_apply", "addresses"])
def test_one_error_of_the_api_server_ends_no_release(
    step: str, error: ForjaError, there: AtDeployments, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(Deployments, step)

    def failing(self: Deployments, *arguments: Any) -> Any:
        there.cluster.errors = [error]
        return real(self, *arguments)

    monkeypatch.setattr(Deployments, step, failing)
    there.release("1")
    assert there.live() == "1"


def test_an_api_server_that_forbids_ends_it_at_once(there: AtDeployments, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Deployments._wait

    def failing(self: Deployments, *arguments: Any) -> Any:
        there.cluster.errors = [ApiError("GET", 403, "Forbidden", "no")]
        return real(self, *arguments)

    monkeypatch.setattr(Deployments, "_wait", failing)
    with pytest.raises(ApiError, match="Forbidden"):
        there.release("1")


def test_time_to_load_counts_when_all_servers_run(there: AtDeployments, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pod of two runs and the other waits for a node: that may take as long as pods get to start."""
    there.cluster.ready, there.cluster.running = False, [1, 1, 1, 2]
    monkeypatch.setattr(deployments, "LOAD_S", 0.0)
    monkeypatch.setattr(triton, "load_error", lambda *_: "")
    place = there.place = there.site(start_s=60.0)
    with pytest.raises(Unavailable, match=f"{place.pick(candidate(there.lake, '1').release, Route(model='digits'))} doesn't serve"):
        there.release("1")
    assert there.cluster.running == [2], "with one of two it waits on, with both the clock runs"


def test_a_deployment_that_goes_while_it_is_waited_for_is_told_at_once(there: AtDeployments, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another release went live and tidied; the Service's address answers no more, which used to be waited for until the time was up."""
    there.release("1")

    def gone(address: str, *_: object) -> bool:
        there.cluster.objects.pop(("Deployment", address.partition(".")[0]), None)
        return False

    monkeypatch.setattr(triton, "wait_ready", WAIT_READY)
    monkeypatch.setattr(triton, "ready", gone)
    monkeypatch.setattr(triton, "load_error", lambda *_: "")
    monkeypatch.setattr(deployments, "LOAD_S", 2.0)
    with pytest.raises(Conflict, match="was deleted meanwhile"):
        there.release("2")
    assert there.live() == "1"
