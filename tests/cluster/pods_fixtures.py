"""What the files of tests about pods share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from cluster import access, pod_work
from cluster.platform import Platform

__all__ = ["CROWDED", "NAMESPACE", "ended", "holding", "left", "of", "tenants"]

NAMESPACE, CROWDED = "forja-test-pods", "forja-test-crowded"
"""Namespaces of the pods of dags/pods.py."""


@pytest.fixture(scope="module")
def tenants(platform: Platform) -> Iterator[None]:
    """The namespaces of dags/pods.py, restricted as tenants' are, the second with a quota of one GPU."""
    with contextlib.ExitStack() as stack:
        for name in (NAMESPACE, CROWDED):
            stack.enter_context(access.tenant(platform.kube, name, platform.lake_env))
        quota = {"metadata": {"name": "gpus", "namespace": CROWDED}, "spec": {"hard": {"requests.nvidia.com/gpu": "1"}}}
        platform.kube.apply({"apiVersion": "v1", "kind": "ResourceQuota", **quota}, manager=access.MANAGER)
        platform.until("the quota to be counted", lambda: "hard" in (platform.kube.get("ResourceQuota", "gpus", CROWDED) or {})["status"])
        yield


def of(platform: Platform, work: pod_work.Work) -> list[dict[str, Any]]:
    """Pods of this work, those on their way out among them."""
    found = [p for namespace in (NAMESPACE, CROWDED) for p in platform.pods(namespace)]
    return [p for p in found if f"raw={work.conf['raw']}" in p["spec"]["containers"][0]["args"]]


def left(platform: Platform, work: pod_work.Work) -> list[str]:
    """Pods of this work that are still there, but for those that are on their way out."""
    return [p["metadata"]["name"] for p in of(platform, work) if "deletionTimestamp" not in p["metadata"]]


def ended(platform: Platform, work: pod_work.Work) -> None:
    """Wait until the pod of this work has ended well."""
    platform.until("the pod's end", lambda: [p["status"]["phase"] for p in of(platform, work)] == ["Succeeded"])


def holding(namespace: str, *, gpus: int) -> dict[str, Any]:
    """A restricted pod that has GPUs and does nothing."""
    safe = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True, "runAsUser": 10001}
    seccomp = {"seccompProfile": {"type": "RuntimeDefault"}}
    limits = {"limits": {"nvidia.com/gpu": str(gpus)}} if gpus else {}
    container = {"name": "c", "image": "forja.test/pause:1", "securityContext": {**safe, **seccomp}, "resources": limits}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "holder", "namespace": namespace}, "spec": {"containers": [container]}}
