"""Starts the cluster: what doesn't need each other starts at the same time."""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from cluster.kit import ClusterError, config, down, mkimage, netns, pki, simulated, sources
from cluster.kit.api import Api, documents
from cluster.kit.build import binary, build
from cluster.kit.node import Node, until
from cluster.kit.places import KIT, MARKER, ROOT, Places
from cluster.kit.versions import NODE, RESOURCES, SIMULATED_NODES

PATIENCE_S = 90.0


def up(places: Places) -> str:
    """Bring the cluster up, building first what isn't built; what it did, as a line.

    Raises:
        ClusterError: another cluster runs on this machine, the machine lacks something, or a part didn't start.
    """
    with down.alone(places):
        down.only_mine(places)
        node = Node(places)
        if node.first():
            return f"the cluster is up already: kubeconfig {places.kubeconfig}"
        prepare(places)
        return _fresh(places, node)


def prepare(places: Places) -> None:
    """Build programs, manifests and small images that aren't there."""
    build(places)
    sources.make(places)
    mkimage.make(places)


def _fresh(places: Places, node: Node) -> str:
    began = time.monotonic()
    down.clear(places)
    try:
        _start(places, node)
    except BaseException as error:
        kept = places.cache / "failed-logs"
        shutil.rmtree(kept, ignore_errors=True)
        if places.logs.is_dir():
            shutil.copytree(places.logs, kept, ignore_dangling_symlinks=True)
        down.clear(places)
        if isinstance(error, ClusterError):
            raise ClusterError(f"{error} (the logs of this try are in {kept})") from error
        raise
    return f"the cluster is up in {time.monotonic() - began:.1f} s: kubeconfig {places.kubeconfig}"


def _start(places: Places, node: Node) -> None:
    MARKER.write_text(json.dumps({"state": str(places.state), "checkout": str(ROOT)}))
    pki.make(places.state / "pki")
    config.write(places)
    config.make_cgroups()
    netns.make()
    node.boot()
    netns.enter()
    with ThreadPoolExecutor(8) as pool:
        store = pool.submit(_containerd, places, node)
        api = _control_plane(places, node)
        api.apply(_manifests("namespaces"))
        parts = [
            pool.submit(api.apply, _manifests("coredns")),
            pool.submit(_jobset, places, node, api),
            pool.submit(_simulated, places, node, api),
            pool.submit(_gateway, places, node, api),
        ]
        store.result()
        _kubelet(places, node, api)
        _finished(parts)
    _settled(api)


def _control_plane(places: Places, node: Node) -> Api:
    commands = config.commands(places)
    for name in ("etcd", "kube-apiserver"):
        node.start(name, commands[name])
    api = Api(places.kubeconfig)
    until(api.ready, PATIENCE_S, "the API server", every_s=0.1)
    for name in ("kube-controller-manager", "kube-scheduler", "kube-proxy", "netpold"):
        node.start(name, commands[name])
    return api


def _containerd(places: Places, node: Node) -> None:
    """Clear what the last node's pods left in the store, import small images that are new, then start containerd for pods."""
    program = binary(places, "containerd")
    node.start("containerd", [program, "-c", places.state / "config" / "containerd-store.toml"])
    _answers(node)
    for container in node.ctr("containers", "list", "-q").split():
        node.ctr("containers", "rm", container, check=False)
    for sandbox in [line.split()[0] for line in node.ctr("sandboxes", "list").splitlines()[1:] if line.strip()]:
        node.ctr("sandboxes", "rm", "--force", sandbox, check=False)
    _import_small(places, node)
    node.stop("containerd")
    node.start("containerd", config.commands(places)["containerd"])
    _answers(node)


def _import_small(places: Places, node: Node) -> None:
    record = places.containerd / "forja-images.json"
    known = json.loads(record.read_text()) if record.is_file() else {}
    there = set(node.ctr("images", "list", "-q").split())
    for ref, archive in mkimage.make(places):
        if known.get(ref) != archive.name or ref not in there:
            node.import_archive(archive)
            known[ref] = archive.name
    record.write_text(json.dumps(known))


def _answers(node: Node) -> None:
    until(lambda: "Server" in node.ctr("version", check=False), 30, "containerd", every_s=0.1)


def _kubelet(places: Places, node: Node, api: Api) -> None:
    commands = config.commands(places)
    node.start("kubelet", commands["kubelet"])
    for resource in RESOURCES:
        node.start(config.plugin(resource), commands[config.plugin(resource)])
    until(lambda: ready(api.get(f"/api/v1/nodes/{NODE}")), PATIENCE_S, f"{NODE} to be Ready", every_s=0.2)


def _jobset(places: Places, node: Node, api: Api) -> None:
    authority = base64.b64encode((places.state / "pki" / "ca.crt").read_bytes()).decode()
    manifests = sources.read(places, "jobset")
    for webhook in (w for m in manifests for w in m.get("webhooks", ())):
        webhook["clientConfig"]["caBundle"] = authority
    api.apply(manifests)
    node.start("jobset", config.commands(places)["jobset"])
    until(lambda: _http_status("127.0.0.1", 18081, "/readyz") == 200, PATIENCE_S, "the JobSet controller", every_s=0.2)


def _simulated(places: Places, node: Node, api: Api) -> None:
    node.start("kwok", config.commands(places)["kwok"])
    simulated.make(api)


def _gateway(places: Places, node: Node, api: Api) -> None:
    api.apply(_manifests("gateway-rights"))
    api.apply(sources.read(places, "gateway-api"))
    api.apply(sources.read(places, "envoy-gateway"))
    certificates = ["env", f"KUBECONFIG={places.kubeconfig}", "ENVOY_GATEWAY_NAMESPACE=forja-gateway"]
    node.run(*certificates, binary(places, "envoy-gateway"), "certgen", "--disable-topology-injector")
    api.apply(_manifests("gateway"))


def _settled(api: Api) -> None:
    """Wait for what the parts become by themselves."""
    for name in SIMULATED_NODES:
        until(lambda name=name: ready(api.get(f"/api/v1/nodes/{name}")), PATIENCE_S, f"{name} to be Ready", every_s=0.2)
    for resource, count in RESOURCES.items():
        until(lambda r=resource, n=count: _allocatable(api, r) == n, PATIENCE_S, f"{count} {resource} on {NODE}", every_s=0.2)
    for namespace, name in (("kube-system", "coredns"), ("forja-gateway", "models")):
        path = f"/apis/apps/v1/namespaces/{namespace}/deployments/{name}"
        until(lambda path=path: _available(api.get(path)), PATIENCE_S, f"Deployment {namespace}/{name}", every_s=0.2)
    gateway = "/apis/gateway.networking.k8s.io/v1/namespaces/forja-gateway/gateways/models"
    until(lambda: condition(api.get(gateway), "Programmed"), PATIENCE_S, "the Gateway models to be Programmed", every_s=0.2)


def condition(found: dict[str, Any] | None, kind: str) -> bool:
    """Whether an object has a condition that is True."""
    conditions = ((found or {}).get("status") or {}).get("conditions") or []
    return any(c["type"] == kind and c["status"] == "True" for c in conditions)


def ready(found: dict[str, Any] | None) -> bool:
    """Whether a node or a pod is Ready."""
    return condition(found, "Ready")


def _available(found: dict[str, Any] | None) -> bool:
    return bool(((found or {}).get("status") or {}).get("availableReplicas"))


def _allocatable(api: Api, resource: str) -> int:
    found = api.get(f"/api/v1/nodes/{NODE}") or {}
    return int(found.get("status", {}).get("allocatable", {}).get(resource, 0))


def _http_status(host: str, port: int, path: str) -> int:
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def _manifests(name: str) -> list[dict[str, Any]]:
    return documents((KIT / "manifests" / f"{name}.yaml").read_text())


def _finished(parts: list[Future[None]]) -> None:
    for part in parts:
        part.result()
