"""Serving in a cluster: each release is a Deployment of Triton in its team's namespace, behind the Gateway API."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from forja import kube
from forja.errors import BadInput, Damaged, Refused, Unavailable
from forja.kube import ApiError, Kube, Object
from forja.lake import Lake
from forja.serving import pod_state, repository, triton, triton_pod
from forja.serving.gateway_router import GatewayRouter
from forja.serving.place import LOAD_S
from forja.serving.repository import Bundle, Release
from forja.serving.router import Route, Router
from forja.serving.triton_pod import Marks, Serving

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

    def address(self, name: str) -> str:
        """See ``Place``."""
        return f"{name}.{self._serving.namespace}.svc:{triton_pod.SERVICE_PORT}"

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
        return release if triton_pod.name(release) == name else None

    def intact(self, name: str, release: Release) -> bool:
        """Always: a pod checks the files that it fetches, and its server can't write them."""
        return True

    def wake(self, name: str, release: Release) -> None:
        """See ``Place``. What somebody changed by hand is put right; pods that are as they should be aren't touched."""
        found = self._deployment(name)
        if found is None:
            raise Unavailable(f"{self.title(name)} was deleted meanwhile", do="try again")
        self._apply(release, triton_pod.marks(found))
        self._wait(name, release)

    def pick(self, release: Release, route: Route) -> str:
        """The Deployment that is this release's."""
        return triton_pod.name(release)

    def put(self, name: str, bundle: Bundle, route: Route) -> None:
        """See ``Place``. A release that is live already, and wrong, gets new pods before its old ones go."""
        found, again = self._deployment(name), ""
        if found is not None:
            with contextlib.suppress(KeyError, ValueError, TypeError):
                again = str(route.version) if name in route.backends else triton_pod.marks(found).again
        self._apply(bundle.release, Marks(path=bundle.path, sha256=bundle.sha256, beside=route.version, again=again))
        self._wait(name, bundle.release)

    def remove(self, name: str, route: Route) -> None:
        """See ``Place``. The route may have moved since it was read."""
        current = self.router.read(self._serving.model)
        if name not in route.backends | current.backends | {current.before}:
            self._delete(name, route.version)

    def tidy(self, route: Route) -> None:
        """See ``Place``. What another release is putting up at this moment stays too: see ``Marks.beside``."""
        labels = f"app.kubernetes.io/managed-by=forja,forja.dev/recipe={self._serving.model}"
        for found in self._kube.list("Deployment", self._serving.namespace, labels=labels):
            name = found["metadata"]["name"]
            if name not in route.backends | {route.before} and self._delete(name, route.version - 1):
                self._say(f"{self.title(name)} is no longer needed")

    def _deployment(self, name: str) -> Object | None:
        return self._kube.get("Deployment", name, self._serving.namespace) if name else None

    def _apply(self, release: Release, marks: Marks) -> None:
        """Deployment and Service as they should be. The Service goes when its Deployment does."""
        made = self._kube.apply(triton_pod.deployment(self._serving, release, marks), manager=MANAGER)
        owner = {"apiVersion": "apps/v1", "kind": "Deployment", "name": made["metadata"]["name"], "uid": made["metadata"]["uid"]}
        service = triton_pod.service(self._serving, release)
        service["metadata"]["ownerReferences"] = [owner]
        self._kube.apply(service, manager=MANAGER)

    def _delete(self, name: str, latest: int) -> bool:
        """Delete a Deployment that was put up beside version ``latest`` of the route or an earlier one; whether it went."""
        path = f"{kube.place('Deployment', self._serving.namespace)}/{name}"
        for _ in range(TRIES):
            found = self._deployment(name)
            if found is None:
                return False
            with contextlib.suppress(KeyError, ValueError, TypeError):
                if triton_pod.marks(found).beside > latest:
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
        began = time.monotonic()
        started = 0.0
        while True:
            found = self._deployment(name)
            if found is None:
                raise Unavailable(f"{self.title(name)} was deleted meanwhile", do="try again")
            pods = self._pods(release)
            if _rolled_out(found):
                # The pods are ready; the node that this runs on learns of the Service's new addresses a moment later.
                triton.wait_ready(self.address(name), release.model, release.version, LOAD_S, self._check)
                return
            error = pod_state.failure(found, pods) or self._load_error(release, pods)
            if error is not None:
                raise error
            if not started and any(pod_state.running(pod, "triton") for pod in pods):
                started = time.monotonic()
            self._check()
            late = time.monotonic() > (started + LOAD_S if started else began + self._serving.start_s)
            if late:
                raise Unavailable(
                    f"{self.title(name)} doesn't serve", value=pod_state.pending(pods) + self._log(pods), do="look at its pods"
                )
            time.sleep(0.25)

    def _pods(self, release: Release) -> list[Object]:
        labels = ",".join(f"{k}={v}" for k, v in triton_pod.selector(release).items())
        found = self._kube.list("Pod", self._serving.namespace, labels=labels)
        return [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]

    def _load_error(self, release: Release, pods: list[Object]) -> Refused | None:
        """Why a running server can't load the release, by its own word: a pod that isn't ready is asked directly."""
        for pod in pods:
            address = pod.get("status", {}).get("podIP")
            if not address or pod_state.ready(pod) or not pod_state.running(pod, "triton"):
                continue
            host = f"[{address}]" if ":" in address else address
            if reason := triton.load_error(f"{host}:{triton_pod.HTTP}", release.model, release.version):
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


def _rolled_out(deployment: Object) -> bool:
    """Whether every pod is one of the newest template and ready, as ``kubectl rollout status`` sees it."""
    status, wanted = deployment.get("status", {}), deployment["spec"]["replicas"]
    seen = status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]
    counts = [status.get(kind, 0) for kind in ("replicas", "updatedReplicas", "availableReplicas")]
    return bool(seen and counts == [wanted] * 3)
