"""The router of a cluster: an HTTPRoute for each model, attached to the site's Gateway (Gateway API, v1).

The record of a route is an annotation of its HTTPRoute, whose spec is rendered from it: both change in one write, and the
object's resourceVersion makes that write compare-and-swap. https://gateway-api.sigs.k8s.io/api-types/httproute/
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import time
from typing import Any
from urllib.parse import urlsplit

from forja.errors import BadInput, Conflict, Damaged, ForjaError, Unavailable
from forja.kube import ApiError, Kube, Object
from forja.lake import canonical
from forja.serving.router import Route, allowed
from forja.serving.triton_pod import SERVICE_PORT
from forja.sites import Gateway

IN_FORCE_S = 20.0
"""Seconds that the gateway gets to take a new route; a second is what it needs."""
AGREE = 5
"""Connections in a row that must follow a route: each may meet another worker, or another replica, of the gateway."""
TRIES = 10
"""Times that a write is tried again when the gateway wrote the object's status meanwhile."""
RECORD = "forja.dev/route"
"""Annotation that holds the record."""
HEADER = "forja-route"
"""Header of every answer: the version of the route that it came by."""


class GatewayRouter:
    """Routes of the models of one namespace.

    Args:
        api: connection that may read and write HTTPRoutes of the namespace.
        gateway: what they are attached to.
        endpoint: URL of the gateway, as clients use it.
        in_force_s: seconds that it gets to take a new route.
    """

    def __init__(self, api: Kube, namespace: str, gateway: Gateway, endpoint: str, in_force_s: float = IN_FORCE_S) -> None:
        self._kube, self._namespace, self._gateway = api, namespace, gateway
        self._address, self._in_force_s = urlsplit(endpoint).netloc, in_force_s

    def read(self, model: str) -> Route:
        """See ``Router``; Damaged when the HTTPRoute holds no record."""
        return self._record(model, self._find(model))

    def swap(self, expected: int, new: Route, *, restore: bool = True) -> Route:
        """See ``Router``. A restoration that fails leaves a route whose proof is open, which the next release settles."""
        taken = dataclasses.replace(new, version=expected + 1, weights=dict(new.weights))
        old = self._write(expected, taken)
        try:
            self._wait(taken)
        except ForjaError as error:
            now = "written, not yet confirmed"
            if restore:
                self._write(taken.version, dataclasses.replace(old, version=expected + 2))
                now = "the route before is in force again"
            raise Unavailable(f"route of {new.model}: {error.thing}; {now}", value=error.value, do=error.do) from error
        return taken

    def prove(self, route: Route) -> Route:
        """See ``Router``. Only the record changes, so there is nothing to wait for."""
        proven = dataclasses.replace(route, proven=True)
        self._write(route.version, proven)
        return proven

    def ensure(self, model: str) -> None:
        """See ``Router``. Record and spec are written at once, so they differ only when somebody changed one by hand."""
        found = self._find(model)
        if found is None:
            return
        route = self._record(model, found)
        wanted = manifest(route, self._gateway, self._namespace)
        if found["spec"] != wanted["spec"]:
            self._write(route.version, route)
        self._wait(route, answers=False)

    def _find(self, model: str) -> Object | None:
        return self._kube.get("HTTPRoute", name(model), self._namespace)

    def _record(self, model: str, found: Object | None) -> Route:
        if found is None:
            return Route(model=model)
        try:
            route = Route(**json.loads(found["metadata"]["annotations"][RECORD]))
            if route.model == model:
                return route
            what: object = f"that of {route.model}"
        except (KeyError, ValueError, TypeError, BadInput) as error:
            what = repr(error)
        where = f"HTTPRoute {self._namespace}/{name(model)}"
        raise Damaged(f"record of {where}", value=what, do="delete it and release again")

    def _write(self, expected: int, new: Route) -> Route:
        """Replace the route of version ``expected``, and return that one. Conflict when there is another version."""
        for _ in range(TRIES):
            found = self._find(new.model)
            old = self._record(new.model, found)
            if old.version != expected:
                thing = f"route of {new.model}: somebody else moved it, version"
                raise Conflict(thing, value=old.version, allowed=str(expected), do="read the route and decide again")
            wanted = manifest(new, self._gateway, self._namespace)
            try:
                if found is None:
                    self._kube.create(wanted)
                else:
                    wanted["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"]
                    # A merge leaves what isn't named, as host names that somebody added: null removes it.
                    wanted["spec"] = {**dict.fromkeys(found["spec"]), **wanted["spec"]}
                    self._kube.patch("HTTPRoute", name(new.model), wanted, self._namespace)
            except ApiError as error:
                if error.status != 409:
                    raise
                continue  # the gateway writes its status into the same object, or somebody else was faster: look again
            return old
        raise Conflict(f"route of {new.model} is written all the time, {TRIES} tries", do="try again")

    def _wait(self, route: Route, *, answers: bool = True) -> None:
        """Wait until the gateway follows a route, by what it says and, with ``answers``, by what it does."""
        deadline = time.monotonic() + self._in_force_s
        while True:
            wrong = self._not_yet(route, answers)
            if not wrong:
                return
            if time.monotonic() > deadline:
                where = f"gateway {self._gateway.namespace}/{self._gateway.name}"
                raise Unavailable(
                    f"{where} has not taken the route in {self._in_force_s:g} s", value=wrong, do=f"look at HTTPRoute {name(route.model)}"
                )
            time.sleep(0.1)

    def _not_yet(self, route: Route, answers: bool) -> str:
        """Why the gateway doesn't follow a route yet; an API server that is busy for a moment is one reason more."""
        try:
            wrong = refused(self._find(route.model), self._gateway, resolved=answers) if route.weights else ""
        except ForjaError as error:
            if not passing(error):
                raise
            return str(error)
        return wrong or (self._elsewhere(route) if answers else "")

    def _elsewhere(self, route: Route) -> str:
        """By which version the gateway answers that isn't the route's; empty when it follows the route."""
        wanted = str(route.version) if route.weights else ""
        for _ in range(AGREE):
            try:
                version = self._answered_by(route.model)
            except (OSError, http.client.HTTPException) as error:
                return f"it doesn't answer: {error}"
            if version != wanted:
                return f"it answers by {'version ' + version if version else 'no route'}"
        return ""

    def _answered_by(self, model: str) -> str:
        """Version of the route by which a new connection's request is answered; empty for none."""
        connection = http.client.HTTPConnection(self._address, timeout=5)
        try:
            connection.request("GET", f"/v2/models/{model}/ready")
            answer = connection.getresponse()
            answer.read()
            return answer.headers.get(HEADER, "")
        finally:
            connection.close()


def passing(error: ForjaError) -> bool:
    """Whether the API server was only away, or too busy: while something is waited for, that is no answer yet."""
    return isinstance(error, Unavailable) or (isinstance(error, ApiError) and error.passing)


def name(model: str) -> str:
    """Name of a model's HTTPRoute."""
    return model.replace("_", "-").strip("-")


def refused(found: Object | None, gateway: Gateway, *, resolved: bool = True) -> str:
    """Why the gateway has not accepted the newest state of an HTTPRoute; empty when it has.

    Args:
        found: the HTTPRoute.
        resolved: whether its backends must be there, too.
    """
    if found is None:
        return "the HTTPRoute is gone"
    parents = found.get("status", {}).get("parents", [])
    mine = [p for p in parents if (p["parentRef"]["name"], p["parentRef"].get("namespace")) == (gateway.name, gateway.namespace)]
    if not mine:
        return "it has not looked at the HTTPRoute"
    for kind in ("Accepted", "ResolvedRefs") if resolved else ("Accepted",):
        condition = next((c for c in mine[0].get("conditions", []) if c["type"] == kind), None)
        if condition is None or condition.get("observedGeneration", 0) < found["metadata"]["generation"]:
            return f"it has not looked at the HTTPRoute's newest state ({kind})"
        if condition["status"] != "True":
            return f"{kind} is {condition['status']}: {condition.get('reason')}, {condition.get('message')}"
    return ""


def manifest(route: Route, gateway: Gateway, namespace: str) -> Object:
    """The HTTPRoute of a route, with the fields that the API server would fill in, so that it can be compared with what is there.

    A model that isn't routed is attached to no gateway; its record, which counts the versions, stays.
    """
    parents = [{"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": gateway.name, "namespace": gateway.namespace}]
    filters: list[Object] = [
        {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": HEADER, "value": str(route.version)}]}}
    ]
    if route.mirror:
        filters.append({"type": "RequestMirror", "requestMirror": {"backendRef": _service(route.mirror)}})
    rule: Object = {
        "matches": matches(route.model),
        "filters": filters,
        "backendRefs": [{**_service(backend), "weight": weight} for backend, weight in sorted(route.weights.items())],
        "timeouts": {"request": "30s"},
    }
    labels = {"app.kubernetes.io/managed-by": "forja", "forja.dev/recipe": route.model}
    record = canonical(dataclasses.asdict(route)).decode()
    meta = {"name": name(route.model), "namespace": namespace, "labels": labels, "annotations": {RECORD: record}}
    return {
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": meta,
        "spec": {"parentRefs": parents if route.weights else [], "rules": [rule]},
    }  # fmt: skip


def matches(model: str) -> list[Any]:
    """Requests that reach a model's backends, as the API's JSON."""
    return [{"path": {"type": "RegularExpression", "value": regex}, "method": method} for method, regex in allowed(model).items()]


def _service(backend: str) -> Object:
    return {"group": "", "kind": "Service", "name": backend, "port": SERVICE_PORT}
