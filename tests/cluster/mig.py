"""What tests of MIG layouts share: quick changes, and how a node is."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import access
from cluster.kit.places import ROOT, places
from cluster.mig_manager import simulated_node, wait_until

from forja import kube as k8s
from forja.mig import change, drain, layouts, probe
from forja.mig import node as nodes
from forja.mig.change import Change, Times

change.POLL_S = drain.POLL_S = probe.POLL_S = 0.1

ADMIN = places().kubeconfig
WHOLE = {"nvidia.com/gpu": 2}
BALANCED = {"nvidia.com/mig-1g.10gb": 4, "nvidia.com/mig-2g.20gb": 2, "nvidia.com/mig-3g.40gb": 2}
TIMES = Times(drain_s=6, apply_s=10, verify_s=6, revert_s=8)


def quick(node: str, layout: str, holder: str = "test", **options: Any) -> Change:
    """A change with deadlines of seconds."""
    return Change(node=node, layout=layout, holder=holder, known=layouts.load(), **{"times": TIMES, **options})


def state(kube: k8s.Kube, node: str) -> dict[str, Any]:
    """What a change may alter of a node, and what it must have put right."""
    found = nodes.look(kube, node)
    return {
        "label": found.label, "offers": dict(found.offers), "unschedulable": found.unschedulable, "deploy": dict(found.deploy),
        "record": found.record,
    }  # fmt: skip


def probes(kube: k8s.Kube) -> list[str]:
    """Probes that are left behind, those that are ending aside."""
    found = kube.list("Pod", probe.NAMESPACE, labels="forja/probe=mig")
    return [p["metadata"]["name"] for p in found if not p["metadata"].get("deletionTimestamp")]


@pytest.fixture
def gpu(kube: k8s.Kube) -> Iterator[str]:
    """A simulated node of this test's own."""
    for manifest in access.documents("mig"):
        if manifest["kind"] == "Namespace":  # as restricted as administrators make it
            kube.apply(manifest, manager=access.MANAGER)
    wait_until(lambda: kube.get("ServiceAccount", "default", probe.NAMESPACE), "the probes' service account")
    name = f"gpu-{secrets.token_hex(4)}"
    kube.create(simulated_node(name))
    wait_until(lambda: _ready(kube, name), f"simulated node {name} is ready")
    try:
        yield name
    finally:
        for pod in kube.list("Pod", fields=f"spec.nodeName={name}"):
            kube.delete("Pod", pod["metadata"]["name"], pod["metadata"]["namespace"], grace_s=0)
        kube.delete("Node", name)


def _ready(kube: k8s.Kube, name: str) -> bool:
    found = kube.get("Node", name) or {}
    return any(c["type"] == "Ready" and c["status"] == "True" for c in found.get("status", {}).get("conditions", []))


@pytest.fixture
def space(kube: k8s.Kube) -> Iterator[str]:
    """A namespace for pods."""
    name = f"mig-{secrets.token_hex(4)}"
    kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    wait_until(lambda: kube.get("ServiceAccount", "default", name), "the namespace's service account")
    try:
        yield name
    finally:
        kube.delete("Namespace", name)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Environment of a process of its own, whose lock on a node this one sees."""
    monkeypatch.setenv("FORJA_STATE", str(tmp_path))
    path = f"{ROOT / 'include'}:{ROOT / 'tests'}"
    return {"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "FORJA_STATE": str(tmp_path)}


@pytest.fixture
def told() -> list[str]:
    """What a change told."""
    return []


def template(node: str, app: str, resource: str = "nvidia.com/gpu") -> dict[str, Any]:
    """A pod for a simulated node."""
    limits = {resource: "1"} if resource else {"cpu": "10m"}
    spec = {
        "nodeSelector": {"kubernetes.io/hostname": node}, "tolerations": [{"key": "kwok.x-k8s.io/node", "operator": "Exists"}],
        "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "c", "image": "forja.test/pause:1", "resources": {"limits": limits, "requests": limits}}],
    }  # fmt: skip
    return {"metadata": {"labels": {"app": app}}, "spec": spec}


def run_on(kube: k8s.Kube, space: str, node: str, app: str = "train", replicas: int = 1, resource: str = "nvidia.com/gpu") -> None:
    """A Deployment of pods that use a GPU, running on the node."""
    spec = {"replicas": replicas, "selector": {"matchLabels": {"app": app}}, "template": template(node, app, resource)}
    kube.create({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": app, "namespace": space}, "spec": spec})
    wait_until(lambda: len(running(kube, space, app)) == replicas, f"pods of {app} run")


def running(kube: k8s.Kube, space: str, app: str = "train") -> list[str]:
    pods = kube.list("Pod", space, labels=f"app={app}")
    return [p["metadata"]["name"] for p in pods if p["status"].get("phase") == "Running" and not p["metadata"].get("deletionTimestamp")]
