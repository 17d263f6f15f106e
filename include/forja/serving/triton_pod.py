"""What serves one release in a cluster, as manifests: a Deployment of Triton and the Service that routes name."""

from __future__ import annotations

from dataclasses import dataclass

from forja.kube import Object
from forja.lake import canonical, sha256
from forja.serving.repository import Release
from forja.serving.server import PORTS
from forja.sites import Gateway

HTTP = PORTS[0]
SERVICE_PORT = 80
"""Port of the Services, which routes name."""
USER = 10001
"""User and group of the images' processes."""
REPOSITORY = "/repository"
DRAIN_S = 10
"""Seconds that a server still answers after its end was announced: until every gateway has stopped sending it new requests."""
GRACE_S = 60
"""Seconds from the announcement to SIGKILL: the drain, then up to the longest time that a route gives a request."""
SHM_MIB = 256
"""Shared memory between Triton and its python backend: the bodies of the requests at work."""

BUNDLE, SHA256, BESIDE, AGAIN = "forja.dev/bundle", "forja.dev/bundle-sha256", "forja.dev/beside", "forja.dev/again"


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What the site says about serving one model."""

    model: str
    namespace: str
    """Of the team: its models' Deployments, Services and routes live there."""
    gateway: Gateway
    lake: str
    """URL of the lake."""
    endpoint: str
    """URL of the gateway, as clients use it."""
    secrets: tuple[str, ...] = ()
    """Secrets with the lake's credentials, for the container that fetches; Triton's own gets none."""
    start_s: float = 600.0
    """Seconds that a pod gets until its Triton runs: for a node, the images and the files of the release."""


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What a Deployment says about itself in its annotations."""

    path: str
    """Path in the lake of its release.json."""
    sha256: str
    """Digest of that file."""
    beside: int
    """Version of the route that was in force when it was put up. It can only go live by a swap from that version: once the
    route has another one, no release in progress still counts on it."""
    again: str = ""
    """Changes when the same release has to be brought up anew."""


def digest(serving: Serving, release: Release) -> str:
    """Digest of what serves: the release, and the pod that the site gives it (image, command, size).

    Another image under the same release is another digest, so it gets a Deployment of its own, which is proven before requests
    reach it. ``again`` and the path of release.json are left out: neither changes an answer.
    """
    return sha256(canonical([release.identity, _pod(serving, release, Marks(path="", sha256="", beside=0))]))[:16]


def labels(serving: Serving, release: Release) -> dict[str, str]:
    """Labels of everything that serves a release."""
    return {"app.kubernetes.io/name": "triton", "app.kubernetes.io/managed-by": "forja", **selector(serving, release)}


def selector(serving: Serving, release: Release) -> dict[str, str]:
    """Labels that tell a backend's pods from all others."""
    return {"forja.dev/recipe": release.model, "forja.dev/release": digest(serving, release)}


def name(serving: Serving, release: Release) -> str:
    """Name of the Deployment and Service, the backend of routes: one for what serves, whoever released it."""
    return f"{release.model.replace('_', '-').strip('-')}-{digest(serving, release)[:10]}"


def marks(deployment: Object) -> Marks:
    """Those of a Deployment; KeyError or ValueError when it isn't one of ours."""
    notes = deployment["metadata"]["annotations"]
    again = _template_notes(deployment).get(AGAIN, "")
    return Marks(path=notes[BUNDLE], sha256=notes[SHA256], beside=int(notes[BESIDE]), again=again)


def newest(deployment: Object, pods: list[Object]) -> list[Object]:
    """The pods that were made of a Deployment's newest template: those that carry its annotations."""
    wanted = _template_notes(deployment).items()
    return [pod for pod in pods if wanted <= (pod["metadata"].get("annotations") or {}).items()]


def _template_notes(deployment: Object) -> dict[str, str]:
    return deployment["spec"]["template"]["metadata"].get("annotations") or {}


def service(serving: Serving, release: Release) -> Object:
    """The Service of a release."""
    ports = [{"name": "http", "port": SERVICE_PORT, "targetPort": "http", "protocol": "TCP"}]
    return {
        "apiVersion": "v1", "kind": "Service", "metadata": _meta(serving, release),
        "spec": {"selector": selector(serving, release), "ports": ports},
    }  # fmt: skip


def budget(serving: Serving, release: Release) -> Object:
    """What keeps nodes that are emptied from taking all pods of a release at once; pods that don't serve may always go."""
    mine = {"matchLabels": selector(serving, release)}
    return {
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": _meta(serving, release),
        "spec": {"maxUnavailable": 1, "unhealthyPodEvictionPolicy": "AlwaysAllow", "selector": mine},
    }  # fmt: skip


def deployment(serving: Serving, release: Release, marks: Marks) -> Object:
    """The Deployment of a release: equal arguments give equal manifests, and applying one again changes nothing."""
    notes = {BUNDLE: marks.path, SHA256: marks.sha256, BESIDE: str(marks.beside)}
    again = {AGAIN: marks.again} if marks.again else {}
    mine = {"matchLabels": selector(serving, release)}
    # Pods of one release on nodes of their own, where there are enough: a node that fails takes one of them.
    apart = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": mine}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {**_meta(serving, release), "annotations": notes},
        "spec": {
            "replicas": serving.gateway.replicas,
            "revisionHistoryLimit": 1,
            "selector": mine,
            # New pods first: pods that are replaced take nothing from the requests.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {
                "metadata": {"labels": labels(serving, release), "annotations": {SHA256: marks.sha256, **again}},
                "spec": {**_pod(serving, release, marks), "topologySpreadConstraints": [apart]},
            },
        },
    }


def _meta(serving: Serving, release: Release) -> Object:
    return {"name": name(serving, release), "namespace": serving.namespace, "labels": labels(serving, release)}


def _pod(serving: Serving, release: Release, marks: Marks) -> Object:
    gpu = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}] if serving.gateway.gpus else []
    return {
        "serviceAccountName": "forja-stage",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # Otherwise Triton is process 1, which nothing in its container can kill, and its python backend must: see files/model.py.
        "shareProcessNamespace": True,
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER, "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": gpu,
        "initContainers": [_fetch(serving, marks)],
        "containers": [_triton(serving, release)],
        "volumes": [
            {"name": "repository", "emptyDir": {"sizeLimit": "20Gi"}},
            {"name": "scratch", "emptyDir": {"sizeLimit": "1Gi"}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{SHM_MIB}Mi"}},
        ],
    }  # fmt: skip


def _fetch(serving: Serving, marks: Marks) -> Object:
    return {
        "name": "fetch",
        "image": serving.gateway.fetch_image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-m", "forja.serving.fetch", marks.path, marks.sha256, REPOSITORY],
        "env": [*_env(), {"name": "FORJA_LAKE", "value": serving.lake}],
        "envFrom": [{"secretRef": {"name": secret}} for secret in serving.secrets],
        "resources": _resources(serving.gateway, gpus=0),
        "securityContext": _restricted(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "repository", "mountPath": REPOSITORY}, {"name": "scratch", "mountPath": "/tmp"}],  # noqa: S108
    }


def _triton(serving: Serving, release: Release) -> Object:
    ready = f"/v2/models/{release.model}/versions/{release.version}/ready"
    return {
        "name": "triton",
        "image": serving.gateway.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-m", "forja.serving.server", REPOSITORY],
        "env": _env(),
        "ports": [{"name": "http", "containerPort": HTTP, "protocol": "TCP"}],
        "resources": _resources(serving.gateway, gpus=serving.gateway.gpus),
        "securityContext": _restricted(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        # A server that is up but couldn't load its model is alive: who released it reads the reason there.
        "startupProbe": _probe("/v2/health/live", period=1, failures=60),
        "livenessProbe": _probe("/v2/health/live", period=10, failures=3),
        "readinessProbe": _probe(ready, period=2, failures=3),
        "lifecycle": {"preStop": {"sleep": {"seconds": DRAIN_S}}},
        "volumeMounts": [
            {"name": "repository", "mountPath": REPOSITORY, "readOnly": True},
            {"name": "scratch", "mountPath": "/tmp"},  # noqa: S108 - a volume of the pod's own
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - likewise
        ],
    }


def _env() -> list[Object]:
    return [{"name": name, "value": value} for name, value in {"HOME": "/tmp", "FORJA_STATE": "/tmp/state"}.items()]  # noqa: S108


def _probe(path: str, *, period: int, failures: int) -> Object:
    return {"httpGet": {"path": path, "port": "http"}, "periodSeconds": period, "failureThreshold": failures, "timeoutSeconds": 5}


def _restricted() -> Object:
    return {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def _resources(gateway: Gateway, *, gpus: int) -> Object:
    """Requests equal to limits, so that the pod is of the class Guaranteed."""
    wanted = {"cpu": f"{round(gateway.cpus * 1000)}m", "memory": f"{round(gateway.memory_gib * 1024)}Mi"}
    if gpus:
        wanted["nvidia.com/gpu"] = str(gpus)
    return {"requests": wanted, "limits": dict(wanted)}
