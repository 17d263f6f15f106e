"""The router of one machine: Envoy, which reads its clusters and routes from files (xDS over the file system)."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from forja.errors import BadInput, Conflict, Damaged, Unavailable
from forja.lake import canonical, sha256
from forja.services import envoy, probes
from forja.services.folders import locked, write, write_if_new
from forja.services.triton import SLOTS, slot
from forja.serving.router import Route, allowed
from forja.settings import Settings

IN_FORCE_S = 10.0
"""Seconds that Envoy gets to take a new route; half a second is what it needs."""
BODY_BYTES = 64 << 20
"""Largest request body that is kept for a retry: Triton's own limit (--http-max-input-size)."""


class EnvoyRouter:
    """Envoy on this machine. Routes are kept in state/envoy/routes, one file a model, and rendered for Envoy from there."""

    def __init__(self, settings: Settings, in_force_s: float = IN_FORCE_S) -> None:
        self._settings = settings
        self._in_force_s = in_force_s
        self._folder = settings.state / "envoy" / "routes"

    def read(self, model: str) -> Route:
        """See ``Router``; Damaged when the file is no route."""
        path = self._path(model)
        if not path.is_file():
            return Route(model=model)
        try:
            return Route(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise Damaged("route", value=str(path), do="remove the file and release again") from error

    def swap(self, expected: int, new: Route, *, restore: bool = True) -> Route:
        """See ``Router``; BadInput for a backend that is no slot."""
        if not new.backends <= set(SLOTS):
            raise BadInput(f"route of {new.model}: slots", value=sorted(new.backends), allowed=", ".join(SLOTS))
        with locked(self._settings, "router"):
            old = self._expected(new.model, expected)
            # The record comes first: a process that dies between the two leaves a record that ``ensure`` puts in force.
            # The other way round, Envoy would send requests to a slot that the record calls idle.
            taken = self._record(new, expected + 1)
            try:
                self._render()
            except Unavailable as error:
                if not restore:
                    raise Unavailable(f"route of {new.model}: written, not yet confirmed: {error.thing}", do=error.do) from error
                self._record(old, expected + 2)
                self._files()
                raise Unavailable(f"route of {new.model}: {error.thing}; the route before is in force again", do=error.do) from error
            return taken

    def prove(self, route: Route) -> Route:
        """See ``Router``."""
        with locked(self._settings, "router"):
            self._expected(route.model, route.version)
            return self._record(dataclasses.replace(route, proven=True), route.version)

    def ensure(self, model: str) -> None:
        """See ``Router``. The files hold the routes of all models, so all of them are put in force."""
        with locked(self._settings, "router"):
            self._render()

    def _path(self, model: str) -> Path:
        return self._folder / f"{model}.json"

    def _expected(self, model: str, version: int) -> Route:
        """The route, which must be of this version."""
        found = self.read(model)
        if found.version != version:
            thing = f"route of {model}: somebody else moved it, version"
            raise Conflict(thing, value=found.version, allowed=str(version), do="read the route and decide again")
        return found

    def _record(self, route: Route, version: int) -> Route:
        taken = dataclasses.replace(route, version=version, weights=dict(route.weights))
        write(self._path(route.model), json.dumps(dataclasses.asdict(taken), indent=1) + "\n")
        return taken

    def _files(self) -> tuple[str, str]:
        """Write both files; the versions of clusters and routes. Clusters first: a route must not name one that isn't there."""
        routes = [self.read(p.stem) for p in sorted(self._folder.glob("*.json"))]
        routed = [r for r in routes if r.weights]
        cds = envoy.cds(self._settings), clusters(self._settings, routed)
        rds = envoy.rds(self._settings), [table(routed)]
        versions = []
        for path, resources in (cds, rds):
            # Equal content has an equal version: Envoy keeps the old version's name when nothing changed.
            version = sha256(canonical(resources))[:12]
            write_if_new(path, json.dumps({"version_info": version, "resources": resources}, indent=1) + "\n")
            versions.append(version)
        return versions[0], versions[1]

    def _render(self) -> None:
        wanted = self._files()
        deadline = time.monotonic() + self._in_force_s
        found, wrong = ("", ""), "it doesn't answer"
        while time.monotonic() < deadline:
            found, wrong = self._in_force()
            if found == wanted:
                return
            time.sleep(0.05)
        raise Unavailable(f"Envoy has not taken the new routes in {self._in_force_s:g} s ({wrong})", value=found, do="./forja logs envoy")

    def _in_force(self) -> tuple[tuple[str, str], str]:
        """Versions of clusters and routes that Envoy uses, and what it says against the newest ones."""
        try:
            dump = probes.http_json(f"http://127.0.0.1:{self._settings.ports['envoy_admin']}/config_dump")
        except (OSError, ValueError) as error:
            return ("", ""), f"it doesn't answer: {error}"
        cluster_version = route_version = ""
        wrong: list[str] = []
        for config in dump.get("configs", []):
            kind = config.get("@type", "").rpartition(".")[2]
            if kind == "ClustersConfigDump":
                cluster_version = config.get("version_info", "")
            for entry in config.get("dynamic_route_configs", []) if kind == "RoutesConfigDump" else []:
                if entry.get("route_config", {}).get("name") == envoy.ROUTES:
                    route_version = entry.get("version_info", "")
            failed = [e.get("error_state") for group in config.values() if isinstance(group, list) for e in group if isinstance(e, dict)]
            wrong += [e.get("details", "refused") for e in failed if e]
        return (cluster_version, route_version), "; ".join(wrong) or "it still uses others"


def table(routes: list[Route]) -> dict[str, Any]:
    """Envoy's route configuration: what a client may ask of each model, and 404 for the rest."""
    # Inference changes nothing, so a request may be sent again. A killed Triton is back within seconds (its supervisor
    # restarts it): connections are refused until the model is loaded, and what was in flight is reset. The back-off is
    # random, up to 0.1, 0.2, 0.4, 0.8 s and then 1.5 s: 24 tries last 16 s, and 10 s or more in 998 of 1000 cases. Not
    # more of them, since a request that itself crashes the server crashes it again at each try. An overloaded server
    # answers 503, which is not tried again: that would be more of what it has too much of.
    retry = {
        "retry_on": "connect-failure,refused-stream,reset",
        "num_retries": 24,
        "retry_back_off": {"base_interval": "0.1s", "max_interval": "1.5s"},
        "per_try_timeout": "10s",
    }
    entries = []
    for route in routes:
        action: dict[str, Any] = {
            "weighted_clusters": {"clusters": [{"name": f"{route.model}-{s}", "weight": w} for s, w in sorted(route.weights.items())]},
            "timeout": "30s",
            "retry_policy": retry,
        }
        if route.mirror:
            action["request_mirror_policies"] = [{"cluster": f"{route.model}-{route.mirror}"}]
        entries += [{"match": match, "route": action} for match in _matches(route.model)]
    unknown = {"status": 404, "body": {"inline_string": '{"error":"no model is released under this name"}'}}
    entries.append({"match": {"prefix": "/"}, "direct_response": unknown})
    host = {"name": "models", "domains": ["*"], "routes": entries, "request_body_buffer_limit": BODY_BYTES}
    return {"@type": f"{envoy.TYPE}.config.route.v3.RouteConfiguration", "name": envoy.ROUTES, "virtual_hosts": [host]}


def _matches(model: str) -> list[dict[str, Any]]:
    """Requests that reach a model's slots, as Envoy's route matches."""
    return [
        {"safe_regex": {"regex": regex}, "headers": [{"name": ":method", "string_match": {"exact": method}}]}
        for method, regex in allowed(model).items()
    ]


def clusters(settings: Settings, routes: list[Route]) -> list[dict[str, Any]]:
    """Envoy's clusters: both slots of every model that is routed."""
    return [_cluster(f"{r.model}-{name}", slot(settings, r.model, name).http_port) for r in routes for name in SLOTS]


def _cluster(name: str, port: int) -> dict[str, Any]:
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    # The default of three retries at a time would fail most requests of an outage.
    limits = {"max_connections": 1024, "max_pending_requests": 4096, "max_requests": 4096, "max_retries": 4096}
    protocol = {
        "@type": f"{envoy.TYPE}.extensions.upstreams.http.v3.HttpProtocolOptions",
        "common_http_protocol_options": {"idle_timeout": "30s"},
        "explicit_http_config": {"http_protocol_options": {}},
    }
    return {
        "@type": f"{envoy.TYPE}.config.cluster.v3.Cluster",
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]},
        "circuit_breakers": {"thresholds": [{"priority": "DEFAULT", **limits}]},
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protocol},
    }
