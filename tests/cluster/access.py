"""What an administrator does before the first run: namespaces, service accounts, Services, the lake's Secret, tokens."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from cluster.kit.places import ROOT
from cluster.kit.versions import NODE_IP

from forja.baseline import manifests
from forja.kube import Kube, place
from forja.sites import Site

MANAGER = "forja-tests"
ACCESS = ROOT / "k8s" / "access"


def documents(name: str) -> list[dict[str, Any]]:
    """Manifests of k8s/access; none when the file isn't there."""
    path = ACCESS / f"{name}.yaml"
    return [d for d in yaml.safe_load_all(path.read_text()) if d] if path.is_file() else []


def install(kube: Kube, site: Site, ports: Mapping[str, int], lake: Mapping[str, str]) -> None:
    """Everything of the cluster's side, for the tenants of a site."""
    _apply(kube, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "forja"}})
    for tenant in site.tenants.values():
        make_tenant(kube, tenant.namespace, lake)
    for name in ("launcher", "release", "baseline", "mig"):
        for manifest in documents(name):
            _apply(kube, manifest)
    for name, port in ports.items():
        for manifest in service(name, port):
            _apply(kube, manifest)


def make_tenant(kube: Kube, namespace: str, lake: Mapping[str, str]) -> None:
    """A tenant's namespace with the baseline's accounts and their rights there, and with the Secret that stage pods name."""
    _apply(kube, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    for manifest in yaml.safe_load_all((manifests.FOLDER / "accounts.yaml").read_text()):
        _apply(kube, manifests.fill(manifest, {"namespace": namespace}, "accounts.yaml"))
    data = {k: base64.b64encode(v.encode()).decode() for k, v in lake.items()}
    _apply(kube, {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "forja-lake", "namespace": namespace}, "data": data})


@contextlib.contextmanager
def tenant(kube: Kube, namespace: str, lake: Mapping[str, str]) -> Iterator[str]:
    """A tenant of a test's own, in which the launcher may start restricted pods; deleted at the end."""
    make_tenant(kube, namespace, lake)
    kube.patch("Namespace", namespace, {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}})
    try:
        yield namespace
    finally:
        kube.delete("Namespace", namespace)
        deadline = time.monotonic() + 90
        while kube.get("Namespace", namespace) is not None and time.monotonic() < deadline:
            time.sleep(0.5)  # until then nobody could make it again


def service(name: str, port: int) -> Iterator[dict[str, Any]]:
    """A Service of namespace forja that leads to a process on the node's address."""
    meta = {"name": name, "namespace": "forja"}
    yield {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"ports": [{"name": "", "port": port, "protocol": "TCP"}]}}
    yield {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": f"{name}-1", "namespace": "forja", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4", "endpoints": [{"addresses": [NODE_IP], "conditions": {"ready": True}}],
        "ports": [{"name": "", "port": port, "protocol": "TCP"}],
    }  # fmt: skip


def kubeconfig(kube: Kube, admin: Path, account: str, folder: Path) -> Path:
    """A kubeconfig file with a fresh token of a service account of namespace forja, and nothing of the administrator's."""
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 6 * 3600}}
    path = f"{place('ServiceAccount', 'forja')}/{account}/token"
    token = kube.request("POST", path, request)["status"]["token"]
    cluster = yaml.safe_load(admin.read_text())["clusters"][0]["cluster"]
    if file := cluster.pop("certificate-authority", ""):
        cluster["certificate-authority-data"] = base64.b64encode(Path(file).read_bytes()).decode()
    made = {
        "apiVersion": "v1", "kind": "Config", "current-context": account,
        "clusters": [{"name": "c", "cluster": cluster}], "users": [{"name": account, "user": {"token": token}}],
        "contexts": [{"name": account, "context": {"cluster": "c", "user": account}}],
    }  # fmt: skip
    written = folder / f"{account}.kubeconfig"
    written.touch(mode=0o600)
    written.write_text(json.dumps(made))
    return written


def accounts() -> dict[str, str]:
    """Airflow connection to the service account behind it, for those whose manifests are there."""
    names = {"launcher": "kubernetes_default", "baseline": "forja_baseline", "mig": "forja_mig"}
    found = {}
    for file, connection in names.items():
        for manifest in documents(file):
            if manifest["kind"] == "ServiceAccount" and manifest["metadata"].get("namespace") == "forja":
                found[connection] = manifest["metadata"]["name"]
    return found


def _apply(kube: Kube, manifest: dict[str, Any]) -> None:
    kube.apply(manifest, manager=MANAGER)
