"""Serving in a cluster: each release is a Deployment of Triton in its team's namespace, behind the Gateway API."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar

from forja import kube
from forja.errors import BadInput, Conflict, Damaged, ForjaError, Refused, Unavailable
from forja.kube import ApiError, Kube, Object
from forja.lake import Lake
from forja.serving import pod_state, repository, triton, triton_pod
from forja.serving.gateway_router import GatewayRouter, passing
from forja.serving.place import LOAD_S, PATIENCE_S
from forja.serving.repository import Bundle, Release
from forja.serving.router import Route, Router
from forja.serving.triton_pod import Marks, Serving

Answer = TypeVar("Answer")
MANAGER = "forja-release"
"""Field manager of what is applied."""
TRIES = 10
"""Times that a deletion is tried again when the Deployment's status changed meanwhile."""
LOG_LINES = 15
"""Last lines of a server's log that an error shows."""


class Deployments:
    """The Deployments of a model: see ``forja.serving.place.Place``.

    Args:
        api: connection with the rights of k8s/access/release.yaml.
        lake: where releases lie.
        say: told what happens.
        check: called while waiting; raises when another run took this work over.
    """

    def __init__(self, api: Kube, lake: Lake, serving: Serving, say: Callable[[str], None], check: Callable[[], None]) -> None:
        self.router: Router = GatewayRouter(api, serving.namespace, serving.gateway, serving.endpoint)
        self._kube, self._lake, self._serving, self._say, self._check = api, lake, serving, say, check

    def locked(self) -> AbstractContextManager[None]:
        """Nothing to hold: each release has a Deployment of its own, and the route takes one swap from each version."""
        return contextlib.nullcontext()

    def title(self, name: str) -> str:
        """See ``Place``."""
        return f"deployment {name}"

    def addresses(self, name: str) -> list[str]:
        """See ``Place``: the pods themselves, since the Service answers by one of them."""
        found = self._patiently(lambda: self._deployment(name))
        pods = triton_pod.newest(found, self._patiently(lambda: self._pods(found))) if found else []
        ready = [_address(pod) for pod in pods if pod_state.ready(pod) and _address(pod)]
        if not ready:
            raise Unavailable(f"{self.title(name)} has no server that is ready", value=pod_state.pending(pods), do="try again")
        return ready

    def held(self, name: str) -> Release | None:
        """See ``Place``."""
        found = self._deployment(name)
        if found is None:
            return None
        try:
            marks = triton_pod.marks(found)
            release = repository.parse(self._lake.read(marks.path, marks.sha256), marks.path, "the lake")
        except (Damaged, BadInput, KeyError, ValueError, TypeError):
            return None  # as good as none: the candidate is put up and takes its place
        return release if release.model == self._serving.model else None

    def intact(self, name: str, release: Release) -> bool:
        """Whether the site would serve the release by this very backend. A pod checks the files itself, and can't write them."""
        return triton_pod.name(self._serving, release) == name

    def wake(self, name: str, release: Release) -> None:
        """See ``Place``. What somebody changed by hand is put right, pods that are as they should be aren't touched.

        Only what was proven comes into a live Deployment: where the site says something else by now, a new one gets it.
        """
        found = self._deployment(name)
        if found is None:
            raise Unavailable(f"{self.title(name)} was deleted meanwhile", do="try again")
        if self.intact(name, release):
            self._apply(release, triton_pod.marks(found))
        self._wait(name, release)

    def pick(self, release: Release, route: Route) -> str:
        """The Deployment that is this release's."""
        return triton_pod.name(self._serving, release)

    def put(self, name: str, bundle: Bundle, route: Route) -> None:
        """See ``Place``. A release that is there already gets new pods, before its old ones go: those may be what answers wrongly."""
        found = self._deployment(name)
        again = _again(found, route) if found else ""
        self._apply(bundle.release, Marks(path=bundle.path, sha256=bundle.sha256, beside=route.version, again=again))
        self._wait(name, bundle.release)

    def remove(self, name: str, route: Route) -> None:
        """See ``Place``. The route gets its next version first, so that no other release can make the Deployment live meanwhile."""
        current = self.router.read(self._serving.model)
        if name in route.backends | current.backends | {current.before}:
            return
        try:
            self.router.swap(route.version, route, restore=False)
        except Conflict:
            return  # the winner's ``tidy`` decides
        self._delete(name, route.version)

    def tidy(self) -> None:
        """See ``Place``. What another release is putting up at this moment stays too.

        The list comes first: what is in it was put up beside the route's version of that moment or an earlier one. A later version
        is one that a lost route had counted.
        """
        labels = f"app.kubernetes.io/managed-by=forja,forja.dev/recipe={self._serving.model}"
        listed = self._kube.list("Deployment", self._serving.namespace, labels=labels)
        route = self.router.read(self._serving.model)
        for found in listed:
            name, beside = found["metadata"]["name"], _beside(found)
            if name in route.backends | {route.before} or beside == route.version:
                continue
            if self._delete(name, beside):
                self._say(f"{self.title(name)} is no longer needed")

    def _address(self, name: str) -> str:
        return f"{name}.{self._serving.namespace}.svc:{triton_pod.SERVICE_PORT}"

    def _deployment(self, name: str) -> Object | None:
        return self._kube.get("Deployment", name, self._serving.namespace) if name else None

    def _apply(self, release: Release, marks: Marks) -> None:
        """Deployment, Service and budget as they should be. The others go when the Deployment does."""
        made = self._applied(triton_pod.deployment(self._serving, release, marks))
        owner = {"apiVersion": "apps/v1", "kind": "Deployment", "name": made["metadata"]["name"], "uid": made["metadata"]["uid"]}
        others = [triton_pod.service(self._serving, release)]
        if self._serving.gateway.replicas > 1:
            others.append(triton_pod.budget(self._serving, release))
        for manifest in others:
            manifest["metadata"]["ownerReferences"] = [owner]
            self._applied(manifest)

    def _applied(self, manifest: Object) -> Object:
        return self._patiently(lambda: self._kube.apply(manifest, manager=MANAGER))

    def _patiently(self, call: Callable[[], Answer]) -> Answer:
        """What ``call`` gives, which may be repeated: an API server that is too busy for a moment ends no release."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return call()
            except ForjaError as error:
                if not passing(error) or time.monotonic() > deadline:
                    raise
            self._check()
            time.sleep(0.5)

    def _delete(self, name: str, beside: int | None) -> bool:
        """Delete a Deployment that was put up beside this version of the route, and not again since; whether it went."""
        path = f"{kube.place('Deployment', self._serving.namespace)}/{name}"
        for _ in range(TRIES):
            found = self._deployment(name)
            if found is None or _beside(found) != beside:
                return False
            seen = {"uid": found["metadata"]["uid"], "resourceVersion": found["metadata"]["resourceVersion"]}
            try:
                self._kube.request("DELETE", path, {"preconditions": seen, "propagationPolicy": "Background"})
                return True
            except ApiError as error:
                if error.status not in (404, 409):
                    raise
        return False

    def _wait(self, name: str, release: Release) -> None:
        """Wait until all pods of the newest template serve. See ``Place.put`` for errors."""
        began, started = time.monotonic(), 0.0
        while True:
            pods, why = [], ""
            try:
                found = self._deployment(name)
                pods = triton_pod.newest(found, self._pods(found)) if found else []
            except ForjaError as error:
                if not passing(error):
                    raise
                why = str(error)
            else:
                if self._serves(name, release, found, pods):
                    return
                if not started and sum(pod_state.running(pod, "triton") for pod in pods) >= self._serving.gateway.replicas:
                    started = time.monotonic()
            self._check()
            if time.monotonic() > (started + LOAD_S if started else began + self._serving.start_s):
                what = why or pod_state.pending(pods) + self._log(pods)
                raise Unavailable(f"{self.title(name)} doesn't serve", value=what, do="look at its pods")
            time.sleep(0.25)

    def _serves(self, name: str, release: Release, found: Object | None, pods: list[Object]) -> bool:
        """Whether a Deployment serves; raises when it never will."""
        if found is None:
            raise self._gone(name)
        if _rolled_out(found):
            # The pods are ready; the node that this runs on learns of the Service's new addresses a moment later.
            triton.wait_ready(self._address(name), release.model, release.version, LOAD_S, partial(self._still, name))
            return True
        if error := pod_state.failure(found, pods) or self._load_error(release, pods):
            raise error
        return False

    def _still(self, name: str) -> None:
        """Raise when this work, or its Deployment, was taken."""
        self._check()
        if self._patiently(lambda: self._deployment(name)) is None:
            raise self._gone(name)

    def _gone(self, name: str) -> Conflict:
        """Another release that went live meanwhile tidies what was put up before."""
        return Conflict(f"{self.title(name)} was deleted meanwhile", do="try again")

    def _pods(self, deployment: Object) -> list[Object]:
        labels = ",".join(f"{k}={v}" for k, v in deployment["spec"]["selector"]["matchLabels"].items())
        found = self._kube.list("Pod", self._serving.namespace, labels=labels)
        # One that ended, evicted or refused by its node, stays listed; its ReplicaSet has made another one.
        ended = ("Failed", "Succeeded")
        return [p for p in found if not p["metadata"].get("deletionTimestamp") and p.get("status", {}).get("phase") not in ended]

    def _load_error(self, release: Release, pods: list[Object]) -> Refused | None:
        """Why a running server can't load the release, by its own word: a pod that isn't ready is asked directly."""
        for pod in pods:
            address = _address(pod)
            if not address or pod_state.ready(pod) or not pod_state.running(pod, "triton"):
                continue
            if reason := triton.load_error(address, release.model, release.version):
                return Refused(f"Triton could not load version {release.version} of {release.model}", value=reason, do="see the reason")
        return None

    def _log(self, pods: list[Object]) -> str:
        """The end of the first running server's log, for an error."""
        for pod in pods:
            if pod_state.running(pod, "triton"):
                path = f"{kube.place('Pod', self._serving.namespace)}/{pod['metadata']['name']}/log"
                with contextlib.suppress(ApiError, Unavailable):
                    return f"\n{self._kube.request('GET', path, query={'container': 'triton', 'tailLines': LOG_LINES})}"
        return ""


def _address(pod: Object) -> str:
    """host:port of a pod's server; empty while it has no address."""
    address = pod.get("status", {}).get("podIP")
    host = f"[{address}]" if address and ":" in address else address
    return f"{host}:{triton_pod.HTTP}" if host else ""


def _beside(deployment: Object) -> int | None:
    """See ``Marks.beside``; None when the Deployment doesn't say."""
    try:
        return triton_pod.marks(deployment).beside
    except (KeyError, ValueError, TypeError):
        return None


def _again(deployment: Object, route: Route) -> str:
    """See ``Marks.again``: another one for new pods; that of the Deployment where its pods are to be gone on with.

    Those are the ones that were live and proven before, and what a try of this release that was killed put up beside this very
    version of the route.
    """
    name = deployment["metadata"]["name"]
    try:
        marks = triton_pod.marks(deployment)
        begun = name not in route.backends and marks.beside == route.version
        return marks.again if begun or name == route.before else str(int(marks.again or 0) + 1)
    except (KeyError, ValueError, TypeError):
        return str(route.version)


def _rolled_out(deployment: Object) -> bool:
    """Whether every pod is one of the newest template and ready, as ``kubectl rollout status`` sees it."""
    status, wanted = deployment.get("status", {}), deployment["spec"]["replicas"]
    seen = status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]
    counts = [status.get(kind, 0) for kind in ("replicas", "updatedReplicas", "availableReplicas")]
    return bool(seen and counts == [wanted] * 3)
