"""Routes: which backend of a model gets which share of its requests, and what moves them.

A backend is a place that holds one release: a slot of this machine, or a Deployment of a cluster. The router is the lock of
every rollout: who moves traffic names the version of the route that it has seen, and is refused when somebody else was faster.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from forja.errors import BadInput

NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
"""Names of backends: what a Service may be called (RFC 1035)."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where a model's requests go."""

    model: str
    version: int = 0
    """Counts the swaps of this model; 0 when it has never been routed."""
    weights: Mapping[str, int] = field(default_factory=dict)
    """Per cent of the requests for each backend; 100 together, or empty when the model isn't routed."""
    mirror: str = ""
    """Backend that gets a copy of every request, its answers thrown away; empty for none."""
    before: str = ""
    """Backend that was live before this one, kept for going back; empty for none."""
    proven: bool = True
    """Whether the live backend gave its golden answers through the router. Until then whoever finds the route goes on with the
    proof, or goes back to ``before``: the release that moved the requests may have been killed. Records without it are proven."""

    def __post_init__(self) -> None:
        for name in sorted(self.backends):
            if not NAME.fullmatch(name):
                raise BadInput(f"route of {self.model}: backend", value=name, allowed="a-z, 0-9 and -, from a letter on, at most 63")
        values = list(self.weights.values())
        if values and (min(values) < 0 or sum(values) != 100):
            raise BadInput(f"route of {self.model}: weights", value=dict(self.weights), allowed="0 to 100 each, 100 together")

    @property
    def live(self) -> str:
        """The backend with the largest share; empty when the model isn't routed."""
        return max(self.weights, key=lambda s: self.weights[s], default="")

    @property
    def backends(self) -> set[str]:
        """All that get requests, or copies of them."""
        return {*self.weights, *([self.mirror] if self.mirror else [])}


class Router(Protocol):
    """What moves traffic."""

    def read(self, model: str) -> Route:
        """The route of a model; version 0 and no weights when it has none."""

    def swap(self, expected: int, new: Route, *, restore: bool = True) -> Route:
        """Put ``new`` in force if the route's version is still ``expected``, and return it with its version.

        Args:
            restore: whether the route before comes back when the router doesn't take this one in time. Without it, as for
                going back from a backend that failed, ``new`` stays written, and ``ensure`` confirms it later.

        Raises:
            Conflict: somebody else changed the route.
            Unavailable: the router didn't take it in time.
        """

    def prove(self, route: Route) -> Route:
        """Record that the proof of a route in force passed; the version stays. Conflict when there is another version."""

    def ensure(self, model: str) -> None:
        """Put the recorded route of a model in force again; Unavailable when the router doesn't take it."""


def allowed(model: str) -> dict[str, str]:
    """What a client may ask of a model or of one version, by method: a regular expression for the whole path. The rest is 404.

    Inference, readiness, statistics and metadata. Triton has more under a model's path: its configuration and ``trace/setting``,
    which a POST changes; loading and unloading lie beside it. So what passes is named here, not what is kept out.
    https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
    """
    path = rf"/v2/models/{re.escape(model)}(/versions/[0-9]+)?"
    return {"POST": f"{path}/infer", "GET": f"{path}(/ready|/stats)?"}
