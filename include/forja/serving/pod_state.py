"""What the pods of a release say about why they don't serve."""

from __future__ import annotations

from collections.abc import Iterator

from forja.errors import BY_EXIT_CODE, ForjaError, Unavailable
from forja.kube import Object

HOPELESS = {
    "ErrImageNeverPull", "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError",
}  # fmt: skip
"""Reasons for which the kubelet goes on trying, later and later: the retry of the stage is the better second try."""


def failure(deployment: Object, pods: list[Object]) -> ForjaError | None:
    """Why waiting is useless, None while it may help.

    Args:
        deployment: what makes the pods.
        pods: those that aren't being deleted.

    Returns:
        The error of the container that fetches as it was (by its exit status), Unavailable for the rest.
    """
    for condition in deployment.get("status", {}).get("conditions", []):
        # The admission's refusal: a quota, the Pod Security Standard. Other errors of making a pod pass.
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True" and "forbidden" in condition.get("message", ""):
            return Unavailable(f"pods of {deployment['metadata']['name']} are refused", value=condition["message"], do="free or raise it")
    for pod, status in _containers(pods):
        error = _ended(pod["metadata"]["name"], status)
        if error is not None:
            return error
    return None


def _ended(pod: str, status: Object) -> ForjaError | None:
    waiting = status.get("state", {}).get("waiting", {})
    if waiting.get("reason") in HOPELESS:
        what = f"pod {pod}: container {status['name']} doesn't start ({waiting['reason']})"
        return Unavailable(what, value=waiting.get("message"), do="look at the image, the secret and the site file")
    ended = status.get("state", {}).get("terminated") or (status.get("lastState", {}).get("terminated") if waiting else None)
    if not ended or not ended.get("exitCode"):
        return None
    said = (ended.get("message") or "").strip()
    kind = BY_EXIT_CODE.get(ended["exitCode"], Unavailable) if status["name"] == "fetch" else Unavailable
    if status["name"] == "fetch" and ended["exitCode"] == Unavailable.exit_code:
        return None  # the lake was away: the kubelet starts it again
    what = f"pod {pod}: container {status['name']} ended with {ended['exitCode']} ({ended.get('reason')})"
    return kind(what, value=said[-1500:] or "no word", do=f"kubectl describe pod {pod}")


def pending(pods: list[Object]) -> str:
    """What the pods wait for, for a message."""
    found = []
    for pod in pods:
        for condition in pod.get("status", {}).get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                found.append(f"{pod['metadata']['name']}: {condition.get('message', 'not scheduled')}")
    for pod, status in _containers(pods):
        waiting = status.get("state", {}).get("waiting")
        if waiting:
            found.append(f"{pod['metadata']['name']}: {status['name']} {waiting.get('reason')} {waiting.get('message', '')}".strip())
    return "; ".join(found) or ("no pod yet" if not pods else "its server runs and doesn't answer")


def running(pod: Object, container: str) -> bool:
    """Whether a container of the pod runs."""
    return any(status["name"] == container and "running" in status.get("state", {}) for _, status in _containers([pod]))


def ready(pod: Object) -> bool:
    """Whether the pod passes its readiness probe."""
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", []))


def _containers(pods: list[Object]) -> Iterator[tuple[Object, Object]]:
    for pod in pods:
        status = pod.get("status", {})
        for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
            yield pod, container
