"""Which servers of a Deployment a release goes on with, and which it replaces. They are stand-ins; real ones: cluster/test_serving.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit.serving_places import AtDeployments, Killed, Raising

from forja.errors import Conflict, Refused
from forja.serving import rollout, triton


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AtDeployments:
    return AtDeployments(tmp_path, monkeypatch)


def test_a_pod_that_ended_is_no_reason_to_give_up(there: AtDeployments, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evicted, say: it stays listed as failed, and its ReplicaSet has made another one, which takes its time."""
    monkeypatch.setattr(triton, "load_error", lambda *_: "")
    there.cluster.ready, there.cluster.ended = False, ["Failed"]
    there.cluster.listed = lambda: setattr(there.cluster, "ready", True)
    there.release("1")
    assert there.live() == "1"


def test_pods_that_ended_are_none_of_a_deployments(there: AtDeployments) -> None:
    there.release("1")
    there.cluster.ended = ["Failed", "Succeeded"]
    found = there.cluster.get("Deployment", there.place.router.read("digits").live)
    assert found is not None
    assert {pod["status"]["phase"] for pod in there.place._pods(found)} == {"Running"}  # type: ignore[attr-defined]


def test_servers_of_what_is_live_that_answer_wrongly_are_replaced(there: AtDeployments) -> None:
    live, seen = there.release("1").live, set[str]()
    for _ in range(3):
        there.ill = there.pods(live)
        assert seen.isdisjoint(there.ill)
        seen |= there.ill
        assert there.release("1").live == live
        assert there.pods(live).isdisjoint(seen)
    assert there.live() == "1"


def test_new_servers_that_answer_wrongly_too_are_replaced_by_the_next_release(there: AtDeployments) -> None:
    """A release that is refused leaves the route of what is live as it was, its version too."""
    live = there.release("1").live
    there.wrong.add("1")
    seen = [there.pods(live)]
    for _ in range(3):
        with pytest.raises(Refused, match="golden"):
            there.release("1")
        assert there.place.router.read("digits").live == live
        seen.append(there.pods(live))
    assert len(set.union(*seen)) == 4 * 2, "each release asks new ones"


def test_servers_that_were_never_proven_and_answer_wrongly_are_replaced(there: AtDeployments) -> None:
    """The requests go back first, so what is brought up again is no backend of the route by then."""
    there.release("1")
    there.killed_before_the_proof("2")
    wrong = there.place.router.read("digits").live
    there.ill = there.pods(wrong)
    route = there.release("2")
    assert (there.live(), route.live, route.proven) == ("2", wrong, True)
    assert there.pods(wrong).isdisjoint(there.ill)


def test_servers_of_the_first_release_that_answer_wrongly_are_replaced(there: AtDeployments) -> None:
    there.killed_before_the_proof("1")
    there.ill = there.pods(there.place.router.read("digits").live)
    assert there.release("1").proven
    assert there.live() == "1"


def test_going_back_keeps_the_servers_that_were_proven(there: AtDeployments) -> None:
    """They take the requests at once; new ones would need a node's GPU beside them first."""
    for version in ("1", "2", "1"):
        old = there.place.router.read("digits").live
        there.release(version)
    servers = there.pods(old)
    assert there.release("2").live == old
    assert there.pods(old) == servers


def test_a_killed_release_goes_on_with_the_servers_that_it_started(there: AtDeployments) -> None:
    """Nobody moved the route since, so they are of this very work; wrong ones are taken down and made anew by the next try."""
    there.release("1")
    with there.patch.context() as patch:
        patch.setattr(rollout.Candidate, "smoke", Raising(Killed()))
        with pytest.raises(Killed):
            there.release("2")
    (name,) = there.cluster.names() - {there.place.router.read("digits").live}
    servers = there.pods(name)
    assert there.release("2").live == name
    assert there.pods(name) == servers


def test_what_an_earlier_route_left_gets_new_servers(there: AtDeployments) -> None:
    """Somebody moved the route during a release: whether what it put up was ever asked is not known."""
    there.release("1")
    with there.patch.context() as patch:
        patch.setattr(rollout.Candidate, "smoke", Raising(Conflict("taken over")))
        with pytest.raises(Conflict):
            there.release("2")
    route = there.place.router.read("digits")
    (name,) = there.cluster.names() - {route.live}
    there.ill = there.pods(name)
    there.place.router.swap(route.version, route)
    assert there.release("2").live == name
    assert there.pods(name).isdisjoint(there.ill)
