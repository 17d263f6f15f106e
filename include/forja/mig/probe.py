"""A pod that asks for one of each of a node's GPU resources: the proof that what a node offers can be had."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from forja.errors import Refused
from forja.kube import Kube, Object
from forja.sites import Site

SCRIPT = "import os; print(os.environ.get('NVIDIA_VISIBLE_DEVICES', 'no variable NVIDIA_VISIBLE_DEVICES'))"
NAMESPACE = "forja-mig"
"""Where the pod lives, alone: whoever makes pods in a namespace can act as any of its service accounts and mount its Secrets."""
POLL_S = 0.5
"""Seconds between two looks."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """How the pod looks."""

    image: str = "forja/control:0.1.0"
    """An image with Python."""
    namespace: str = NAMESPACE

    @classmethod
    def of_site(cls, site: Site) -> Probe:
        """With the image that the site's control stages run in."""
        images = [p.image for p in site.profiles.values() if p.environment == "control" and p.image]
        return cls(image=images[0]) if images else cls()


def run(
    kube: Kube, probe: Probe, node: str, offers: Mapping[str, int], say: Callable[[str], None], alive: Callable[[], object], *, ends: float
) -> None:
    """Start the pod on the node through the scheduler, wait until it has run, remove it.

    Args:
        ends: deadline by ``time.monotonic``.

    Raises:
        Refused: it wasn't scheduled or didn't run in time, with the scheduler's or the kubelet's words.
    """
    if not offers:
        say("no probe: the layout leaves no GPU resource to ask for")
        return
    clear(kube, probe, node, alive, ends=ends)
    pod = manifest(probe, node, offers)
    name = pod["metadata"]["name"]
    kube.create(pod)
    try:
        while True:
            status = (kube.get("Pod", name, probe.namespace) or {}).get("status", {})
            if status.get("phase") in ("Running", "Succeeded"):
                say(f"a pod that asked for one each of {', '.join(offers)} on {node}: {status['phase']}")
                return
            if status.get("phase") == "Failed":
                raise Refused(f"probe on node {node}", value=_why(status), allowed="a pod that runs")
            _wait(alive, ends, f"probe on node {node} doesn't run: {_why(status)}")
    finally:
        kube.delete("Pod", name, probe.namespace)


def clear(kube: Kube, probe: Probe, node: str, alive: Callable[[], object], *, ends: float) -> None:
    """Remove the pod that a change which was killed left behind, and wait until it is gone: it has the name of the next one, and a
    slice that can't be cut while it is held."""
    while kube.delete("Pod", _name(node), probe.namespace):
        _wait(alive, ends, f"pod {probe.namespace}/{_name(node)} of a change before doesn't go away")


def manifest(probe: Probe, node: str, offers: Mapping[str, int]) -> Object:
    """The pod: one container for each resource, bound to the node by affinity so that the scheduler has to agree."""
    tight: dict[str, Any] = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    containers = []
    for i, resource in enumerate(offers):
        amounts = {"cpu": "10m", "memory": "32Mi", resource: "1"}
        containers.append({
            "name": f"probe-{i}", "image": probe.image, "command": ["python3", "-c", SCRIPT], "securityContext": tight,
            "resources": {"requests": amounts, "limits": amounts}, "terminationMessagePolicy": "FallbackToLogsOnError",
        })  # fmt: skip
    on = {"nodeSelectorTerms": [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}]}
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": _name(node), "namespace": probe.namespace,
            "labels": {"app.kubernetes.io/managed-by": "forja", "forja/probe": "mig"},
        },
        "spec": {
            "restartPolicy": "Never", "automountServiceAccountToken": False, "terminationGracePeriodSeconds": 1, "containers": containers,
            "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": on}},
            # The node is cordoned, and GPU nodes are tainted; only a node that is not ready stays out of reach.
            "tolerations": [{"operator": "Exists", "effect": "NoSchedule"}],
            "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
        },
    }  # fmt: skip


def _name(node: str) -> str:
    return f"forja-mig-probe-{node}"[:253].rstrip("-.")


def _wait(alive: Callable[[], object], ends: float, what: str) -> None:
    if time.monotonic() > ends:
        raise Refused(what, allowed="within the deadline")
    alive()
    time.sleep(POLL_S)


def _why(status: Mapping[str, Any]) -> str:
    """What the scheduler, the kubelet or the container says."""
    told = [c.get("message", "") for c in status.get("conditions", []) if c.get("status") == "False"]
    for container in status.get("containerStatuses", []):
        state = container.get("state", {})
        told += [s.get("message") or s.get("reason", "") for s in (state.get("waiting"), state.get("terminated")) if s]
    return "; ".join(t for t in told if t) or status.get("phase") or "no status yet"
