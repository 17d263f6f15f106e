"""Serving on one machine: two slots for each model, kept by the supervisor, behind Envoy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from forja.errors import Damaged, Refused, Unavailable
from forja.services import supervisor
from forja.services.folders import locked
from forja.services.triton import SLOTS, Slot, slot
from forja.serving import repository, triton
from forja.serving.envoy_router import EnvoyRouter
from forja.serving.place import LOAD_S, PATIENCE_S
from forja.serving.repository import Bundle, Release
from forja.serving.router import Route, Router
from forja.settings import Settings


class Slots:
    """The two slots of a model: see ``forja.serving.place.Place``.

    Args:
        say: told what happens.
        check: called while waiting; raises when another run took this work over.
    """

    def __init__(self, settings: Settings, model: str, say: Callable[[str], None], check: Callable[[], None]) -> None:
        self.router: Router = EnvoyRouter(settings)
        self._settings, self._model, self._say, self._check = settings, model, say, check

    def locked(self) -> AbstractContextManager[None]:
        """One release of a model at a time: both would write into the same idle slot. The kernel drops a killed process's lock."""
        return locked(self._settings, f"release-{self._model}")

    def title(self, name: str) -> str:
        """See ``Place``."""
        return f"slot {name}"

    def addresses(self, name: str) -> list[str]:
        """See ``Place``."""
        return [self._address(name)]

    def held(self, name: str) -> Release | None:
        """See ``Place``."""
        try:
            return repository.installed(self._slot(name), self._model)
        except Damaged:
            return None  # as good as empty: the candidate goes into the other slot

    def intact(self, name: str, release: Release) -> bool:
        """See ``Place``."""
        return repository.intact(self._slot(name), release)

    def wake(self, name: str, release: Release) -> None:
        """See ``Place``. One probe that times out is no reason to kill a server that clients use."""
        program, address = self._slot(name).program, self._address(name)
        if triton.ready(address, release.model, release.version):
            return
        if supervisor.process(self._settings, program).state in ("starting", "running", "backoff"):
            self._say(f"slot {name} is live, runs, and does not answer: waiting up to {PATIENCE_S:g} s")
            try:
                triton.wait_ready(address, release.model, release.version, PATIENCE_S, self._check)
                return
            except (Refused, Unavailable) as error:
                self._say(f"slot {name}: {error}")
        self._say(f"slot {name} is live but does not answer: starting it")
        supervisor.restart_program(self._settings, program)
        triton.wait_ready(address, release.model, release.version, LOAD_S, self._check)

    def pick(self, release: Release, route: Route) -> str:
        """The idle slot."""
        return next(s for s in SLOTS if s != route.live)

    def put(self, name: str, bundle: Bundle, route: Route) -> None:
        """See ``Place``."""
        place, release = self._slot(name), bundle.release
        supervisor.stop_program(self._settings, place.program)
        repository.install(place, release, bundle.contents)
        supervisor.start_program(self._settings, place.program)
        triton.wait_ready(self._address(name), release.model, release.version, LOAD_S, self._check)

    def remove(self, name: str, route: Route) -> None:
        """See ``Place``."""
        place = self._slot(name)
        supervisor.stop_program(self._settings, place.program)
        repository.remove(place, self._model)

    def tidy(self) -> None:
        """Nothing to do: there are as many slots as releases that stay."""

    def _address(self, name: str) -> str:
        return f"127.0.0.1:{self._slot(name).http_port}"

    def _slot(self, name: str) -> Slot:
        return slot(self._settings, self._model, name)
