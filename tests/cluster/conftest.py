"""The tests of this folder run inside the test cluster's network (``make test-cluster``); elsewhere each is skipped, and says why."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import restricted
from cluster.kit import build, netns
from cluster.kit.node import Node
from cluster.kit.places import places
from cluster.platform import Platform, attached, running

from forja import kube as k8s

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the cluster where there is none."""
    if _inside():
        return
    lacking = "; ".join(build.missing())
    reason = f"no cluster here: it needs {lacking}" if lacking else "outside the cluster's network: make test-cluster"
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=reason))


def _inside() -> bool:
    return netns.PATH.exists() and netns.PATH.stat().st_ino == Path("/proc/self/ns/net").stat().st_ino


@pytest.fixture(scope="session")
def platform() -> Iterator[Platform]:
    """Kafka, MLflow, the lake and Airflow for all tests of a session.

    With FORJA_PLATFORM, the state folder of one that runs (``python -m cluster.platform``), it is that one.
    """
    there = os.environ.get("FORJA_PLATFORM")
    with attached(Path(there)) if there else running() as made:
        yield made


@pytest.fixture(scope="session")
def node() -> Node:
    """The real node, whose processes a test may stop and start."""
    return Node()


@pytest.fixture(scope="session")
def kube() -> k8s.Kube:
    """The cluster as its administrator."""
    return k8s.connect(places().kubeconfig)


@pytest.fixture
def tenant(kube: k8s.Kube) -> Iterator[Callable[..., str]]:
    """Makes fresh namespaces for tenants, restricted as real ones are; they are deleted after the test."""
    made = []

    def make(team: str = "team", **labels: str) -> str:
        name = f"t-{secrets.token_hex(4)}"
        restricted_by = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/enforce-version": "latest"}
        all_labels = {"forja.dev/tenant": team, **restricted_by, **labels}
        kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": all_labels}})
        made.append(name)
        account = f"{k8s.place('ServiceAccount', name)}/default"
        restricted.wait("the service account default", lambda: _found(kube, account))
        return name

    yield make
    for name in made:
        for pod in kube.list("Pod", name):
            kube.delete("Pod", pod["metadata"]["name"], name, grace_s=0)
        kube.delete("Namespace", name)


@pytest.fixture
def run_pod(kube: k8s.Kube) -> Callable[..., restricted.Ended]:
    """Runs Python code in a restricted pod: ``run_pod(namespace, code, resources={...})``."""

    def run(namespace: str, code: str, **given: Any) -> restricted.Ended:
        return restricted.run(kube, namespace, code, **given)

    return run


def _found(kube: k8s.Kube, path: str) -> object:
    try:
        return kube.request("GET", path)
    except k8s.ApiError as error:
        if error.status != 404:
            raise
        return None
