"""How a release goes live: beside what is live, proven there, then the requests, then the proof through the router.

What it leaves at each moment can be gone on with, or gone back from, by whoever comes next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from forja.errors import Conflict, ForjaError, Refused
from forja.receipts import Output
from forja.serving import repository, triton
from forja.serving.place import Place
from forja.serving.repository import Bundle, Release
from forja.serving.router import Route

if TYPE_CHECKING:
    from forja.stages.base import Work

BEGUN = "begun.json"
"""In the work's folder while it isn't done: the identity of what was live when it began."""
SEEN_S = 3.0
"""Seconds until every worker thread of the router must follow a route that is in force."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is to be live: the release, its files, and the answers that it must give."""

    release: Release
    contents: dict[str, bytes]
    stored: dict[str, Output]
    """Its files as they lie in the lake."""
    golden: triton.Golden
    tolerance: float
    run_id: str | None
    """The model's run in MLflow."""

    def smoke(self, *addresses: str) -> float:
        """Largest difference from the golden answers at each host:port; errors as for ``triton.smoke``."""
        release, limit = self.release, self.tolerance
        return max(
            triton.smoke(address, release.model, self.golden, tolerance=limit, max_batch=release.max_batch, version=release.version)
            for address in addresses
        )


def go_live(work: Work, place: Place, candidate: Candidate) -> tuple[Route, Release, float]:
    """Make the candidate live and prove it through the router; nothing but the proof when it is live already.

    Returns:
        The route in force, the release that is live, its largest difference from the golden answers.

    Raises:
        Refused: a newer version went live since an earlier try began, Triton could not load the release, or it answers wrongly.
        Conflict: somebody else moved the route meanwhile.
        Unavailable: Triton, the router, or what keeps the servers doesn't answer.
    """
    model = candidate.release.model
    route = place.router.read(model)
    _not_stale(work, place.held(route.live) if route.weights else None, candidate.release)
    with _or_back(work, place, route, _before(route)):
        if route.weights:
            # A release that was killed may have recorded a route that the router doesn't follow yet. Before anything is
            # stopped, what takes the requests must be what the record calls live.
            place.router.ensure(model)
        live = _live(work, place, route, candidate)
        worst = _through_router(work, candidate) if live else 0.0
    if live is None:
        return _deploy(work, place, _settled(work, place, route), candidate)
    work.say(f"version {live.version} ({live.variant}) is live already in {place.title(route.live)}")
    return (route if route.proven else place.router.prove(route)), live, worst


def _not_stale(work: Work, live: Release | None, wanted: Release) -> None:
    """Refuse to go on with a release that an earlier try began when a newer version has gone live since."""
    path, identity = f"{work.folder}/{BEGUN}", live.identity if live else ""
    if work.lake.create(path, json.dumps({"live": identity}).encode()) or live is None:
        return
    try:
        began_beside = json.loads(work.lake.get(path))["live"]
    except (ValueError, KeyError, TypeError):
        return  # damaged: as good as none
    if began_beside != identity and int(wanted.version) < int(live.version):
        raise Refused(
            f"version {live.version} of {live.model} went live after the release of version {wanted.version} began", value=wanted.version,
            allowed=f"{live.version} or newer", do=f"nothing; to go back to version {wanted.version}, run this release again",
        )  # fmt: skip


@contextlib.contextmanager
def begun(work: Work) -> Iterator[None]:
    """Forget that the work was begun when it ends for good with an error: who repeats it then means it.

    When it is done, its receipt makes the mark useless.
    """
    try:
        yield
    except ForjaError as error:
        if not error.retry:
            with _told(work, "the mark that this release began stays"):
                work.lake.delete(f"{work.folder}/{BEGUN}")
        raise


@contextlib.contextmanager
def _told(work: Work, what: str) -> Iterator[None]:
    """For what is put right after an error: its own error is told and doesn't hide the first one."""
    try:
        yield
    except ForjaError as error:
        work.say(f"{what}: {error}")


def _live(work: Work, place: Place, route: Route, candidate: Candidate) -> Release | None:
    """The live release when it is the candidate, whole and answering as it should; its servers are started if need be."""
    if not route.weights:
        return None
    found = place.held(route.live)
    if found is None or found.identity != candidate.release.identity or not place.intact(route.live, found):
        return None
    place.wake(route.live, found)
    try:
        candidate.smoke(*place.addresses(route.live))
    except Refused as error:
        work.say(f"{place.title(route.live)} holds this release but answers wrongly ({error}): releasing it again")
        return None
    return found


def _before(route: Route) -> Route:
    """The route to go back to when only the record of an unproven one is left: to no backend when there was none."""
    return Route(model=route.model, weights={route.before: 100} if route.before else {})


@contextlib.contextmanager
def _or_back(work: Work, place: Place, route: Route, back: Route) -> Iterator[None]:
    """While ``route`` isn't proven: an error sends the requests to ``back``, and goes on as it was."""
    try:
        yield
    except ForjaError as error:
        if not route.proven and not isinstance(error, Conflict):
            with _told(work, "going back"):
                # Whatever the router says: what failed must not come back because going back took long.
                place.router.swap(route.version, back, restore=False)
                place.tidy()
        raise


def _settled(work: Work, place: Place, route: Route) -> Route:
    """A route whose live backend is proven: what an unfinished release of something else made live is taken off again.

    Otherwise the candidate could come into the only backend to go back to. That must hold a release, though.
    """
    back = _before(route)
    if route.proven or (back.live and place.held(back.live) is None):
        return route
    work.say(f"{place.title(route.live)} was never proven through the router: going back")
    return place.router.swap(route.version, back, restore=False)


def _deploy(work: Work, place: Place, route: Route, candidate: Candidate) -> tuple[Route, Release, float]:
    """Bring the candidate up beside what is live, prove it there, move traffic, prove it through the router."""
    old = place.held(route.live) if route.weights else None
    release = dataclasses.replace(candidate.release, replaces=_replaced(old, candidate.release))
    name = _load(work, place, route, release, candidate)
    work.check()
    # The same backend again, with new servers, leaves nothing to go back to.
    same = name == route.live
    new = Route(model=release.model, weights={name: 100}, before=route.before if same else route.live, proven=same)
    taken = place.router.swap(route.version, new)
    with _or_back(work, place, taken, dataclasses.replace(route, before="" if route.before == name else route.before)):
        worst = _through_router(work, candidate)
    work.say(f"all requests go to {place.title(name)}")
    return place.router.prove(taken), release, worst


def _load(work: Work, place: Place, route: Route, release: Release, candidate: Candidate) -> str:
    """Bring the release up and prove it; the backend's name. On any error it is taken down."""
    stored, name = work.save("release.json", repository.to_json(release)), place.pick(release, route)
    work.say(f"version {release.version} ({release.variant}) into {place.title(name)}")
    try:
        place.put(name, Bundle(release=release, path=stored.path, sha256=stored.sha256, contents=candidate.contents), route)
        worst = candidate.smoke(*place.addresses(name))
    except Conflict:
        raise  # another run took this work over, and what is there with it
    except ForjaError:
        with _told(work, f"{place.title(name)} stays for now"):
            place.remove(name, route)
        raise
    work.say(f"{place.title(name)} repeats {len(candidate.golden.inputs)} golden answers, differing by {worst:.1e} at most")
    return name


def _through_router(work: Work, candidate: Candidate) -> float:
    """The smoke test as a client: its threads may follow a new route a moment later than the one that reports it."""
    address = urlsplit(work.settings.endpoint).netloc
    deadline = time.monotonic() + SEEN_S
    while True:
        try:
            return candidate.smoke(address)
        except ForjaError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _replaced(old: Release | None, new: Release) -> str:
    """Version that ``previous`` will name: another variant of the same version doesn't replace that version."""
    if old is None:
        return ""
    return old.replaces if old.version == new.version else old.version
