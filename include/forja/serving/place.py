"""A place that serves: what a release needs of it, whether that is this machine or a cluster.

Releases of one model stand side by side in backends. A new one is put up beside the live one, proven there, and gets the
requests; the router decides which backend is live, and the place follows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from forja.serving.repository import Bundle, Release
from forja.serving.router import Route, Router

LOAD_S = 60.0
"""Seconds that a server gets to load a release."""
PATIENCE_S = 20.0
"""Seconds that a live server which runs gets to answer: under load, or just restarted, it is late."""


class Place(Protocol):
    """Where the releases of one model run."""

    router: Router

    def locked(self) -> AbstractContextManager[None]:
        """Held during a release: keeps two of them from getting into each other's way."""

    def title(self, name: str) -> str:
        """What people call a backend."""

    def addresses(self, name: str) -> list[str]:
        """host:port of each server of a backend, past the router: a proof asks them all.

        Raises:
            Unavailable: none of them is there.
        """

    def held(self, name: str) -> Release | None:
        """The release in a backend, None when there is none or it is damaged beyond reading."""

    def intact(self, name: str, release: Release) -> bool:
        """Whether what serves the release that ``held`` gave is what a new one would get: to the byte, and as the site says."""

    def wake(self, name: str, release: Release) -> None:
        """Make the live backend answer, changing only what keeps it from it.

        Raises:
            Refused, Unavailable: it can't.
        """

    def pick(self, release: Release, route: Route) -> str:
        """The backend that a release gets. It takes no requests, unless it is this very release that is live already."""

    def put(self, name: str, bundle: Bundle, route: Route) -> None:
        """Bring a release up in the backend that ``pick`` gave, and wait until it can answer.

        Raises:
            Refused: it could not be loaded, with the server's reason.
            Unavailable: it doesn't answer in time, with what is known about why.
        """

    def remove(self, name: str, route: Route) -> None:
        """Take a release down that failed; nothing to do for one that takes requests, or when the route has moved since."""

    def tidy(self) -> None:
        """Take down what the route in force makes useless. The live release stays, and the one before it."""
