"""Manifests that come with the sources of their projects: prepared once for the pinned versions, kept in the cache."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from cluster.kit.api import documents
from cluster.kit.build import binary, source
from cluster.kit.places import KIT, Places
from cluster.kit.versions import JOBSET_PORT, NODE_IP

STAGES = (
    "node/fast/node-initialize.yaml",
    "node/heartbeat-with-lease/node-heartbeat-with-lease.yaml",
    "pod/fast/pod-ready.yaml",
    "pod/fast/pod-complete.yaml",
    "pod/fast/pod-delete.yaml",
)
"""What kwok pretends: nodes are Ready and renew their leases; pods run at once, those of Jobs end well, deleted ones are gone."""

ROUTES = ("gatewayclasses", "gateways", "listenersets", "httproutes", "grpcroutes", "referencegrants", "backendtlspolicies")
"""Kinds of the Gateway API; routes of TCP, UDP and TLS are left out."""


def make(places: Places) -> None:
    """Write the manifests that aren't there: jobset, gateway-api, envoy-gateway and kwok-stages, as NAME.yaml."""
    wanted = _digest()
    stamp = places.manifests / "digest"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    shutil.rmtree(places.manifests, ignore_errors=True)
    places.manifests.mkdir(parents=True)
    _write(places, "jobset", jobset(places))
    gateway = source(places, "envoy-gateway", "sigs.k8s.io/gateway-api") / "config" / "crd" / "standard"
    _write(
        places, "gateway-api", (d for name in ROUTES for d in documents((gateway / f"gateway.networking.k8s.io_{name}.yaml").read_text()))
    )
    own = source(places, "envoy-gateway", "github.com/envoyproxy/gateway") / "charts" / "gateway-crds-helm" / "templates" / "generated"
    _write(places, "envoy-gateway", (d for path in sorted(own.glob("*.yaml")) for d in documents(_plain(path.read_text()))))
    stages = source(places, "kwok", "sigs.k8s.io/kwok") / "kustomize" / "stage"
    (places.manifests / "kwok-stages.yaml").write_text("\n---\n".join((stages / name).read_text() for name in STAGES))
    stamp.write_text(wanted)


def read(places: Places, name: str) -> list[dict[str, Any]]:
    """Prepared manifests."""
    return documents((places.manifests / f"{name}.yaml").read_text())


def jobset(places: Places) -> Iterator[dict[str, Any]]:
    """JobSet's own manifests, for a controller that runs beside the node instead of in a pod, with a certificate from outside."""
    home = source(places, "jobset", "sigs.k8s.io/jobset")
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(home / "config", Path(scratch) / "config")
        command = [str(binary(places, "kubectl")), "kustomize", f"{scratch}/config/default"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for manifest in documents(text):
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if kind in ("Deployment", "Secret", "ConfigMap") or (kind == "Service" and "webhook" not in name):
            continue
        if kind == "Service":
            manifest["spec"].pop("selector")
            manifest["spec"]["ports"] = [{"name": "", "port": 443, "protocol": "TCP", "targetPort": JOBSET_PORT}]
        if kind == "CustomResourceDefinition":
            manifest["spec"].pop("conversion", None)
        manifest["metadata"].pop("annotations", None)
        yield manifest
    yield {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "jobset-webhook-1", "namespace": "jobset-system", "labels": {"kubernetes.io/service-name": "jobset-webhook-service"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [NODE_IP], "conditions": {"ready": True}}],
        "ports": [{"name": "", "port": JOBSET_PORT, "protocol": "TCP"}],
    }  # fmt: skip


def _digest() -> str:
    parts = [
        Path(__file__).read_bytes(),
        *((KIT / "go" / module / "go.mod").read_bytes() for module in ("jobset", "envoy-gateway", "kwok")),
    ]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _write(places: Places, name: str, manifests: Iterator[dict[str, Any]]) -> None:
    (places.manifests / f"{name}.yaml").write_text(yaml.dump_all(manifests, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper)))


def _plain(text: str) -> str:
    """A template of Helm without its directives, which are whole lines here."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("{{"))
