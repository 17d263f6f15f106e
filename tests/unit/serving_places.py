"""Places that serve, with stand-ins for what serves: the two slots of a machine, Deployments of a cluster."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forja import recipes
from forja.errors import ForjaError, Refused, Unavailable
from forja.kube import Object
from forja.lake import Lake
from forja.serving import repository, rollout, triton
from forja.serving.deployments import Deployments
from forja.serving.gateway_router import GatewayRouter
from forja.serving.place import Place
from forja.serving.repository import Release
from forja.serving.rollout import Candidate
from forja.serving.router import Route
from forja.serving.slots import Slots
from forja.serving.triton_pod import Serving
from forja.settings import Settings
from forja.sites import Gateway
from forja.stages.base import Work

GATEWAY = Gateway(name="models", namespace="forja-gateway", image="s:1", fetch_image="c:1", replicas=2)
SERVING = Serving(model="digits", namespace="forja-vision", gateway=GATEWAY, lake="s3://forja/lake", endpoint="http://models")
NOTHING = np.zeros((1, 1), np.float32)


class Killed(BaseException):
    """The process ends here: nothing of its own cleans up."""


class Cluster:
    """What the API server keeps, with Deployments whose pods are ready at once; a changed template makes new ones."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.applied: list[Object] = []
        self.errors: list[ForjaError] = []
        self.listed: Callable[[], None] = lambda: None
        self.ready = True
        self.ended: list[str] = []
        """Phases of pods beside each Deployment's own that ended: nobody removes them, and others have taken their place."""
        self.templates: list[Object] = []
        """All that Deployments were made with, none twice in a row: a pod's address says which one it is of."""
        self.running = [9]
        """How many pods of each Deployment run, at each look at them; the last number stays."""

    def get(self, kind: str, name: str, namespace: str = "") -> Object | None:
        self._fail()
        found = copy.deepcopy(self.objects.get((kind, name)))
        if kind == "Deployment" and found is not None:
            n = found["spec"]["replicas"] if self.ready else 0
            found["status"] = {"observedGeneration": 1, "replicas": n, "updatedReplicas": n, "availableReplicas": n}
        return found

    def list(self, kind: str, namespace: str = "", *, labels: str = "") -> list[Object]:
        self._fail()
        wanted = dict(pair.split("=") for pair in labels.split(",")).items()
        if kind == "Pod":
            made = [pod for (k, _), d in self.objects.items() if k == "Deployment" for pod in self._pods(d)]
            self.running = self.running[1:] or self.running
        else:
            made = [o for (k, _), o in self.objects.items() if k == kind]
        found = [copy.deepcopy(o) for o in made if wanted <= o["metadata"]["labels"].items()]
        self.listed()
        return found

    def create(self, manifest: Object) -> Object:
        return self._keep(manifest)

    def patch(self, kind: str, name: str, change: Object, namespace: str = "") -> Object:
        return self._keep(change)

    def apply(self, manifest: Object, *, manager: str) -> Object:
        self._fail()
        self.applied.append(manifest)
        return self._keep(manifest)

    def request(self, method: str, path: str, body: object = None, *, query: object = None) -> Any:
        if method == "GET":
            return "the end of a log"
        assert method == "DELETE", path
        self.objects.pop(("Deployment", path.rpartition("/")[2]), None)
        return {}

    def names(self) -> set[str]:
        return {name for kind, name in self.objects if kind == "Deployment"}

    def _pods(self, deployment: Object) -> Iterator[Object]:
        template = deployment["spec"]["template"]
        subnet = max(n for n, known in enumerate(self.templates) if known == template)
        yield from pods(deployment, subnet, self.ready, self.running[0])
        for phase in self.ended:
            status = {"phase": phase, "containerStatuses": [{"name": "triton", "state": {"terminated": {"exitCode": 137}}}]}
            yield {"metadata": {"name": f"{deployment['metadata']['name']}-{phase}", **template["metadata"]}, "status": status}

    def _fail(self) -> None:
        if self.errors:
            raise self.errors.pop(0)

    def _keep(self, manifest: Object) -> Object:
        made = copy.deepcopy(manifest)
        key = made["kind"], made["metadata"]["name"]
        old = self.objects.get(key, {"spec": {}})
        before = old.get("metadata", {})
        version = int(before.get("resourceVersion", "0")) + 1
        made["metadata"].update(uid=before.get("uid", str(id(made))), resourceVersion=str(version), generation=1)
        if key[0] == "Deployment" and old["spec"].get("template") != made["spec"]["template"]:
            self.templates.append(made["spec"]["template"])
        self.objects[key] = made
        return made


def pods(deployment: Object, subnet: int, ready: bool, running: int) -> Iterator[Object]:
    meta = deployment["spec"]["template"]["metadata"]
    for number in range(deployment["spec"]["replicas"]):
        status = {
            "podIP": f"10.0.{subnet}.{number}",
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": str(ready)}],
            "containerStatuses": [{"name": "triton", "state": {"running": {}} if number < running else {}}],
        }
        yield {"metadata": {"name": f"{deployment['metadata']['name']}-{number}", **meta}, "status": status}


class At:
    """A place with stand-ins for what serves; each test makes releases through it."""

    place: Place
    asked: list[str]
    """Addresses of proofs, the router's as ``router``."""
    wrong: set[str]
    """Versions whose servers answer wrongly."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings = Settings.from_env({"FORJA_STATE": str(folder), "HOME": str(folder), "FORJA_ENDPOINT": "http://router"})
        self.lake, self.asked, self.wrong, self.patch = Lake(str(folder / "lake")), [], set(), monkeypatch
        self.scratch = folder
        monkeypatch.setattr(rollout, "SEEN_S", 0.0)
        monkeypatch.setattr(triton, "smoke", self.smoke)
        monkeypatch.setattr(triton, "wait_ready", lambda *_: None)
        monkeypatch.setattr(triton, "ready", lambda *_: True)

    def smoke(self, address: str, model: str, golden: object, **named: Any) -> float:
        self.asked.append(address)
        if named["version"] in self.wrong:
            raise Refused("golden answers")
        return 0.0

    def work(self, version: str) -> Work:
        return Work(
            settings=self.settings, lake=self.lake, folder=f"vision/digits/release/{version}", key=version, scratch=self.scratch,
            check=lambda: None,
        )  # fmt: skip

    def release(self, version: str, *, done: bool = True) -> Route:
        """One try; ``done`` as the harness does, which removes what the receipt makes useless."""
        work = self.work(version)
        with self.place.locked(), rollout.begun(work):
            route, live, _ = rollout.go_live(work, self.place, candidate(self.lake, version))
            self.place.tidy()
        assert live.version == version
        if done:
            self.lake.delete(f"{work.folder}/{rollout.BEGUN}")
        return route

    def killed_before_the_proof(self, version: str) -> None:
        """A release that is killed between moving the requests and proving that they are answered."""
        with self.patch.context() as patch:
            patch.setattr(rollout, "_through_router", dying)
            with pytest.raises(Killed):
                self.release(version)

    def failing_through_the_router(self, version: str) -> None:
        with self.patch.context() as patch:
            patch.setattr(rollout, "_through_router", refusing)
            with pytest.raises(Refused, match="through the router"):
                self.release(version)

    def live(self) -> str:
        """Version that gets the requests; empty for none."""
        route = self.place.router.read("digits")
        found = self.place.held(route.live) if route.weights else None
        return found.version if found else ""


class Raising:
    """Raises its errors one after the other, or its only one each time, whatever it is called with."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *_: object, **__: object) -> Any:
        raise self.error


def dying(*_: object) -> float:
    raise Killed


def refusing(*_: object) -> float:
    raise Refused("wrong answers through the router")


def candidate(lake: Lake, version: str) -> Candidate:
    release = Release(
        model="digits", version=version, variant="int8", classes=tuple("0123456789"), shape=(1, 8, 8), max_batch=32,
        preprocess=repository.preprocess(recipes.load("digits").dataset), receipts={},
    )  # fmt: skip
    contents = repository.files(release, b"model")
    golden = triton.Golden(inputs=NOTHING, probabilities=NOTHING)
    sealed = repository.sealed(release, contents)
    return Candidate(release=sealed, contents=contents, stored={}, golden=golden, tolerance=1e-3, run_id=None)


class Followed(GatewayRouter):
    """Before a gateway that follows at once."""

    late = False

    def _wait(self, route: Route, *, answers: bool = True) -> None:
        if self.late:
            raise Unavailable("gateway has not taken the route")


class AtSlots(At):
    """Two slots, whose supervisor and Envoy do at once what they are told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, monkeypatch)
        for name in ("stop_program", "start_program", "restart_program"):
            monkeypatch.setattr(f"forja.services.supervisor.{name}", lambda *_: None)
        self.place = Slots(self.settings, "digits", lambda _: None, lambda: None)
        monkeypatch.setattr(self.place.router, "_render", lambda: None)


class AtDeployments(At):
    """A cluster's Deployments."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, monkeypatch)
        self.cluster = Cluster()
        self.ill = set[str]()
        """Addresses of pods that answer wrongly, while others of the same release may not."""
        self.place = self.site()

    def smoke(self, address: str, model: str, golden: object, **named: Any) -> float:
        """As a server, or through the router any server that is live."""
        worst = super().smoke(address, model, golden, **named)
        route = self.place.router.read("digits")
        if self.ill.intersection(self.place.addresses(route.live) if address == "router" else [address]):
            raise Refused("golden answers")
        return worst

    def pods(self, name: str) -> set[str]:
        """Addresses of a Deployment's pods."""
        return set(self.place.addresses(name))

    def site(self, start_s: float = 0.5, **gateway: Any) -> Deployments:
        """The place as a site with another [gateway] has it."""
        serving = dataclasses.replace(SERVING, gateway=dataclasses.replace(GATEWAY, **gateway), start_s=start_s)
        made = Deployments(self.cluster, self.lake, serving, lambda _: None, lambda: None)  # type: ignore[arg-type]
        made.router = Followed(self.cluster, "forja-vision", serving.gateway, "http://router")  # type: ignore[arg-type]
        return made


PLACES: Mapping[str, type[At]] = {"slots": AtSlots, "deployments": AtDeployments}
