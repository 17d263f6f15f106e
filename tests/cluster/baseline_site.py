"""A site of the baseline's tests: two tenants, a gateway's namespace and one without policies, all of these tests alone."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import socket
import threading
from collections.abc import Iterator

from cluster.kit.versions import NODE_IP

from forja.baseline import plan
from forja.kube import Kube
from forja.sites import Allow, Baseline, Site, Tenant, load_site

IMAGE = "forja.test/python:3.11"
TEAMS = ("a", "b")


@contextlib.contextmanager
def listener() -> Iterator[int]:
    """What stands for Kafka, MLflow and the lake: a process of the node that accepts connections; its port."""
    with socket.create_server((NODE_IP, 0), backlog=64) as server:
        threading.Thread(target=_accept, args=(server,), daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def _accept(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            server.accept()[0].close()


def make(port: int) -> Site:
    """The site, whose tenants may reach the node's ``port``; nothing of it is in the cluster yet."""
    base, mark = load_site("small-cluster"), secrets.token_hex(3)
    assert base.gateway is not None
    allow = (
        Allow(name="lake", address=f"{NODE_IP}:{port}", port=port, cidr=f"{NODE_IP}/32"),
        Allow(name="kubernetes", address="kubernetes.default.svc:443", port=6443, cidr=f"{NODE_IP}/32", stage="release"),
    )
    return dataclasses.replace(
        base, name="test",
        tenants={
            "a": Tenant(team="a", namespace=f"t-{mark}-a", gpus=2, mig={"1g.10gb": 3}),
            "b": Tenant(team="b", namespace=f"t-{mark}-b", gpus=1),
        },
        gateway=dataclasses.replace(base.gateway, namespace=f"t-{mark}-gate"),
        baseline=Baseline(probe_image=IMAGE, probe_namespace=f"t-{mark}-probe", allow=allow),
    )  # fmt: skip


def namespaces(site: Site) -> list[str]:
    """All namespaces of the site, tenants' first."""
    assert site.gateway is not None and site.baseline is not None  # noqa: PT018
    return [*(t.namespace for t in site.tenants.values()), site.gateway.namespace, site.baseline.probe_namespace]


@contextlib.contextmanager
def bare(kube: Kube) -> Iterator[Site]:
    """The site with its namespaces, and no baseline yet; all is deleted at the end."""
    with listener() as port:
        site = make(port)
        try:
            for name in namespaces(site):
                kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
            yield site
        finally:
            for name in namespaces(site):
                kube.delete("Namespace", name)


def install(kube: Kube, site: Site, *, adopt: bool = False) -> list[str]:
    """Apply the baseline; what was changed."""
    changes = plan.plan(kube, site, adopt=adopt)
    plan.apply(kube, changes)
    return [f"{c.verb} {c.name}" for c in changes]
