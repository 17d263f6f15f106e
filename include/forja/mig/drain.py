"""Taking the pods that use a node's GPUs off it, through the eviction API, so that PodDisruptionBudgets are kept.

Which pods go: those that ask for a GPU or a slice. They hold the device, and a busy GPU can't be cut; mig-manager evicts nobody.
Pods without one stay, for they notice nothing; ``everything`` takes them too, for nodes that mig-manager may reboot.
Pods of DaemonSets and of the node itself (mirror pods) always stay: they would be back at once, and the operator's own are paused
by mig-manager. One of them that asks for a GPU stops the drain, for the GPU can't be cut; so does a pod that nothing would start again.
Both stop it before anything is evicted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from forja.errors import Refused
from forja.kube import ApiError, Kube, Object
from forja.mig import node as nodes

Say = Callable[[str], None]
POLL_S = 1.0
"""Seconds between two looks."""

MIRROR = "kubernetes.io/config.mirror"
OURS = ("app.kubernetes.io/managed-by", "forja")
"""Label of pods that an Airflow task starts again."""


def victims(pods: Sequence[Object], *, everything: bool = False) -> list[Object]:
    """The pods that have to go."""
    return [p for p in pods if not _stays(p) and (everything or uses_gpu(p))]


def uses_gpu(pod: Object) -> bool:
    """Whether a pod asks for a GPU, a slice of one or a share of either, or holds a claim, which may be one."""
    return bool(pod["spec"].get("resourceClaims")) or _asks(pod)


def lost(pods: Sequence[Object]) -> list[str]:
    """Names of pods that nothing would start again elsewhere; those that are ending already aside."""
    return [
        name(p)
        for p in pods
        if not any(o.get("controller") for o in p["metadata"].get("ownerReferences") or [])
        and (p["metadata"].get("labels") or {}).get(OURS[0]) != OURS[1]
        and not p["metadata"].get("deletionTimestamp")
    ]


def name(pod: Object) -> str:
    """Namespace and name."""
    return f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"


def drain(
    kube: Kube, node: str, say: Say, alive: Callable[[], object], *, deadline_s: float, everything: bool = False, force: bool = False
) -> list[str]:
    """Evict the pods that have to go and wait until they are gone. Nothing is evicted before every eviction is allowed.

    Args:
        alive: called while it waits, so that the change's lease holds.
        force: also pods that nothing starts again.

    Returns:
        The pods that left.

    Raises:
        Refused: a pod that would be lost, or until the deadline a pod that holds a GPU and stays, or evictions that a
            PodDisruptionBudget forbids.
    """
    ends = time.monotonic() + deadline_s

    def must_go() -> list[Object]:
        # Each time anew: the scheduler may have bound a pod before it saw the cordon.
        pods = victims(nodes.pods_on(kube, node), everything=everything)
        if lost(pods) and not force:
            raise Refused(
                f"pods on node {node} that nothing would start again", value=lost(pods),
                allowed="pods with a controller, or of Airflow's tasks", do="end them, or allow it: force",
            )  # fmt: skip
        return pods

    pods = must_go()
    for pod in pods:
        say(f"must go: {name(pod)}")
    _until_allowed(kube, node, pods, say, alive, ends)
    evicted: list[str] = []
    refusals: dict[str, str] = {}
    while True:
        pods = must_go()
        if not pods:
            say(f"{len(evicted)} pods evicted; no pod uses a GPU of node {node}")
            return evicted
        for pod in pods:
            if pod["metadata"].get("deletionTimestamp"):
                continue
            refusal = evict(kube, pod)
            if refusal and refusals.get(name(pod)) != refusal:
                say(f"not yet: {name(pod)}: {refusal}")
            elif not refusal:
                say(f"evicted: {name(pod)}")
                evicted.append(name(pod))
            refusals[name(pod)] = refusal
        _wait(node, [f"{name(p)}: {refusals.get(name(p)) or 'is ending'}" for p in pods], alive, ends)


def _until_allowed(kube: Kube, node: str, pods: Sequence[Object], say: Say, alive: Callable[[], object], ends: float) -> None:
    """Wait until each single eviction would pass: a budget that lets none go leaves all pods where they are. And until no pod that
    stays holds a GPU."""
    told: set[str] = set()
    while True:
        refused = [f"{name(p)}: {why}" for p in pods if (why := evict(kube, p, dry_run=True))]
        holders = [p for p in nodes.pods_on(kube, node) if _stays(p) and _asks(p)]
        refused += [f"{name(p)}: asks for a GPU, and its DaemonSet or the kubelet would start it again at once" for p in holders]
        if not refused:
            return
        for line in refused:
            if line not in told:
                say(f"may not go: {line}")
                told.add(line)
        _wait(node, refused, alive, ends)


def _wait(node: str, left: Sequence[str], alive: Callable[[], object], ends: float) -> None:
    if time.monotonic() > ends:
        raise Refused(
            f"node {node} can't be drained", value=list(left), allowed="evictions within the deadline", do="see the budgets and pods"
        )
    alive()
    time.sleep(POLL_S)


def evict(kube: Kube, pod: Object, *, dry_run: bool = False) -> str:
    """Ask for one eviction; the API's words when it refuses for now, empty when the pod goes or is gone."""
    meta = pod["metadata"]
    # The uid keeps a pod of the same name that was started meanwhile, as StatefulSets do.
    options: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": meta["uid"]}}
    if dry_run:
        options["dryRun"] = ["All"]
    body = {
        "apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": meta["name"], "namespace": meta["namespace"]},
        "deleteOptions": options,
    }  # fmt: skip
    try:
        kube.request("POST", f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}/eviction", body)
    except ApiError as error:
        if error.status in (404, 409):
            return ""
        # 429: a budget, or a busy API server. 500: more than one budget for the pod, which the API doesn't support.
        if error.status in (429, 500):
            return error.message
        raise
    return ""


def _asks(pod: Object) -> bool:
    containers = [*pod["spec"].get("containers", []), *pod["spec"].get("initContainers", [])]
    asked = [item for c in containers for part in ("requests", "limits") for item in (c.get("resources", {}).get(part) or {}).items()]
    return any(k.startswith(("nvidia.com/gpu", "nvidia.com/mig-")) and str(n) != "0" for k, n in asked)


def _stays(pod: Object) -> bool:
    owners = pod["metadata"].get("ownerReferences") or []
    return MIRROR in (pod["metadata"].get("annotations") or {}) or any(o.get("kind") == "DaemonSet" for o in owners)
