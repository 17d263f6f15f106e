"""The simulated nodes: kwok plays two machines with eight H100 GPUs each. Their pods run nothing and have no logs.

Whatever a test learns from them is reported as simulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.kit.api import Api
from cluster.kit.versions import SIMULATED_NODES

TAINT = {"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"}
ALLOCATABLE = {"cpu": "64", "memory": "512Gi", "pods": "110", "nvidia.com/gpu": "8"}
LABELS = {
    "type": "kwok",
    "beta.kubernetes.io/os": "linux",
    "beta.kubernetes.io/arch": "amd64",
    "kubernetes.io/os": "linux",
    "kubernetes.io/arch": "amd64",
    "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3",
    "nvidia.com/gpu.count": "8",
    "nvidia.com/gpu.present": "true",
    "nvidia.com/mig.capable": "true",
    "nvidia.com/mig.strategy": "mixed",
    "nvidia.com/mig.config": "all-disabled",
    "nvidia.com/mig.config.state": "success",
}
"""What GPU feature discovery and the MIG manager would say of such a node."""


def nodes(names: Sequence[str] = SIMULATED_NODES) -> list[dict[str, Any]]:
    """The nodes as they are made."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": name,
                "annotations": {"kwok.x-k8s.io/node": "fake", "node.alpha.kubernetes.io/ttl": "0"},
                "labels": {**LABELS, "kubernetes.io/hostname": name},
            },
            "spec": {"taints": [TAINT]},
            "status": {"allocatable": dict(ALLOCATABLE), "capacity": dict(ALLOCATABLE)},
        }
        for name in names
    ]


def make(api: Api, names: Sequence[str] = SIMULATED_NODES) -> None:
    """Make the nodes; kwok fills in the rest of their status."""
    for node in nodes(names):
        api.request("POST", "/api/v1/nodes", node)


def reset(api: Api, names: Sequence[str] = SIMULATED_NODES) -> None:
    """Bring labels, annotations, taints, cordons and resources back to what they were at the start. Pods stay."""
    merge = "application/merge-patch+json"
    for wanted in nodes(names):
        path = f"/api/v1/nodes/{wanted['metadata']['name']}"
        found = api.request("GET", path)
        meta = {part: _instead(found["metadata"][part], wanted["metadata"][part]) for part in ("labels", "annotations")}
        api.request("PATCH", path, {"metadata": meta, "spec": {"taints": [TAINT], "unschedulable": None}}, content=merge)
        status = {part: _instead(found["status"][part], ALLOCATABLE) for part in ("allocatable", "capacity")}
        api.request("PATCH", f"{path}/status", {"status": status}, content=merge)


def _instead(found: dict[str, str], wanted: dict[str, str]) -> dict[str, str | None]:
    """The merge patch that makes ``wanted`` out of ``found``."""
    return {**dict.fromkeys(found, None), **wanted}
