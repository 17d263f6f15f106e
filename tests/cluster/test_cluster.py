"""That the test cluster is what it claims to be, so that a test that passes in it says something."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cluster import restricted
from cluster.kit import ClusterError, down, simulated, versions
from cluster.kit.api import Api
from cluster.kit.node import Node
from cluster.kit.places import Places, places

from forja.kube import ApiError, Kube, place

Tenant = Callable[..., str]
Run = Callable[..., restricted.Ended]

SLEEP = "import time; time.sleep(3600)"
PROBE = """
import http.server, urllib.request
class Probe(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        try:
            said = b"reached " + urllib.request.urlopen("http://{address}/", timeout=1).read()
        except OSError:
            said = b"blocked"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(said)
http.server.HTTPServer(("", 8081), Probe).serve_forever()
"""
"""A pod that tries an address whenever it's asked to."""

TOLERATE = {"tolerations": [{"key": "kwok.x-k8s.io/node", "operator": "Exists"}], "nodeSelector": {"type": "kwok"}}


def ready(found: dict[str, Any] | None) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in (found or {}).get("status", {}).get("conditions", []))


def service(namespace: str, name: str, app: str, **spec: Any) -> dict[str, Any]:
    spec = {"selector": {"app": app}, "ports": [{"port": 80, "targetPort": 8080}], **spec}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def test_nodes_are_what_the_readme_says(kube: Kube) -> None:
    found = {n["metadata"]["name"]: n for n in kube.list("Node")}
    assert {versions.NODE, *versions.SIMULATED_NODES} <= set(found)
    assert all(ready(found[n]) for n in (versions.NODE, *versions.SIMULATED_NODES))
    real = found[versions.NODE]["status"]
    assert real["nodeInfo"]["kubeletVersion"] == f"v{versions.KUBERNETES}"
    assert real["nodeInfo"]["containerRuntimeVersion"] == f"containerd://{versions.CONTAINERD}"
    assert {r: int(real["allocatable"][r]) for r in versions.RESOURCES} == versions.RESOURCES
    for name in versions.SIMULATED_NODES:
        assert found[name]["status"]["allocatable"]["nvidia.com/gpu"] == "8"
        assert found[name]["metadata"]["labels"]["nvidia.com/gpu.product"] == "NVIDIA-H100-80GB-HBM3"
        assert simulated.TAINT in found[name]["spec"]["taints"]


@pytest.mark.parametrize(
    ("code", "exit_code", "reason"),
    [
        pytest.param("print('done')", 0, "Completed", id="a good end"),
        pytest.param("import sys; print('done'); sys.exit(7)", 7, "Error", id="an exit code"),
        pytest.param("print('done'); bytearray(200 << 20)", 137, "OOMKilled", id="more memory than its limit"),
    ],
)
def test_a_pod_ends_as_its_process_does(tenant: Tenant, run_pod: Run, code: str, exit_code: int, reason: str) -> None:
    ended = run_pod(tenant(), code, resources={"memory": "64Mi"})
    assert (ended.code, ended.reason, ended.log) == (exit_code, reason, "done\n")


def test_names_are_found_from_pods_and_from_the_tests(kube: Kube, tenant: Tenant, run_pod: Run) -> None:
    namespace = tenant()
    address = kube.create(service(namespace, "web", "none"))["spec"]["clusterIP"]
    names = [f"web.{namespace}.svc.cluster.local", f"web.{namespace}.svc", f"web.{namespace}"]
    code = f"import socket; print(*{{socket.gethostbyname(n) for n in {['web', *names]}}})"
    assert run_pod(namespace, code).log.split() == [address]
    restricted.wait("the name outside pods", lambda: _addresses(names[1]) == [address])
    assert _addresses(f"nothing.{namespace}.svc") == []
    missing = run_pod(namespace, "import socket; socket.gethostbyname('nothing')")
    assert missing.code == 1
    assert "gaierror" in missing.log


def test_network_policies_are_enforced(kube: Kube, tenant: Tenant) -> None:
    """Reached, denied, reached by the one that is allowed, reached again; asked from the node, which no policy keeps out."""
    namespace, port = tenant(), [{"name": "http", "containerPort": 8080}]
    server = restricted.start(kube, namespace, restricted.SERVER, name="web", labels={"app": "web"}, ports=port)["status"]["podIP"]
    code = PROBE.format(address=f"{server}:8080")
    pods = {app: restricted.start(kube, namespace, code, labels={"app": app})["status"]["podIP"] for app in ("friend", "stranger")}

    def tried(app: str) -> str:
        return _fetch(f"http://{pods[app]}:8081/")[1]

    def policy(name: str, **spec: Any) -> None:
        meta = {"name": name, "namespace": namespace}
        kube.create({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta, "spec": spec})

    for app in pods:
        restricted.wait("the server", partial(_is, "reached web", tried, app))
    policy("deny", podSelector={"matchLabels": {"app": "web"}}, policyTypes=["Ingress"])
    for app in pods:
        restricted.wait("the policy", partial(_is, "blocked", tried, app))
    friends = [{"from": [{"podSelector": {"matchLabels": {"app": "friend"}}}], "ports": [{"port": "http"}]}]
    policy("allow", podSelector={"matchLabels": {"app": "web"}}, policyTypes=["Ingress"], ingress=friends)
    restricted.wait("the exception", lambda: tried("friend") == "reached web")
    assert tried("stranger") == "blocked"
    for name in ("deny", "allow"):
        kube.delete("NetworkPolicy", name, namespace)
    restricted.wait("the end of the policies", lambda: tried("stranger") == "reached web")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param({"spec": {"hostNetwork": True}}, 'violates PodSecurity "restricted', id="a pod that isn't restricted"),
        pytest.param({"resources": {"nvidia.com/gpu": 3}}, "exceeded quota: gpus, requested: requests.nvidia.com/gpu=3", id="GPUs"),
        pytest.param({"resources": {"nvidia.com/mig-1g.10gb": 4}}, "exceeded quota: gpus", id="MIG slices"),
        pytest.param({"resources": {"memory": "2Gi"}}, "maximum memory usage per Container is 1Gi", id="the limit range"),
        pytest.param({"resources": {"nvidia.com/gpu": 2}}, "", id="what is allowed"),
    ],
)
def test_admission_refuses(kube: Kube, tenant: Tenant, change: dict[str, Any], says: str) -> None:
    namespace = tenant()
    quota = {"hard": {"requests.nvidia.com/gpu": "2", "requests.nvidia.com/mig-1g.10gb": "3"}}
    limits = {"limits": [{"type": "Container", "max": {"memory": "1Gi"}}]}
    for kind, name, spec in (("ResourceQuota", "gpus", quota), ("LimitRange", "size", limits)):
        kube.create({"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": spec})
    restricted.wait("the quota's status", lambda: (kube.get("ResourceQuota", "gpus", namespace) or {}).get("status", {}).get("hard"))
    wanted = restricted.pod(namespace, SLEEP, resources={"memory": "64Mi"})
    wanted["spec"]["containers"][0]["resources"]["limits"].update(change.get("resources", {}))
    wanted["spec"].update(change.get("spec", {}))
    if not says:
        assert kube.create(wanted)["metadata"]["name"]
        return
    with pytest.raises(ApiError) as refusal:
        kube.create(wanted)
    assert refusal.value.status == 403
    assert says in refusal.value.message


def test_rights_are_enforced(kube: Kube, tenant: Tenant) -> None:
    namespace = tenant()
    nobody = kube.impersonating(f"system:serviceaccount:{namespace}:default")
    with pytest.raises(ApiError) as refusal:
        nobody.list("Pod", namespace)
    assert refusal.value.status == 403
    assert kube.list("Pod", namespace) == []


def test_a_pod_sees_its_share_of_gpus_and_no_more(kube: Kube, tenant: Tenant, run_pod: Run) -> None:
    namespace, code = tenant(), "import os; print(os.environ['NVIDIA_VISIBLE_DEVICES'])"
    for resource, count in (("nvidia.com/gpu", 3), ("nvidia.com/mig-1g.10gb", 2)):
        devices = run_pod(namespace, code, resources={resource: count}).log.strip().split(",")
        assert len(set(devices)) == count
        assert all(d.startswith(resource.rpartition("/")[2].upper()) for d in devices)
    assert run_pod(namespace, code).code == 1  # no GPU asked for: no such variable
    greedy = kube.create(restricted.pod(namespace, code, resources={"nvidia.com/gpu": 9}))["metadata"]["name"]
    assert "Insufficient nvidia.com/gpu" in restricted.wait("the scheduler's answer", lambda: _unschedulable(kube, namespace, greedy))


RANK = """
import os, socket, time
rank, master = int(os.environ["JOB_COMPLETION_INDEX"]), "pair-w-0-0.pair"
if rank == 0:
    server = socket.create_server(("", 5000))
    print("rank 0 heard", server.accept()[0].recv(100).decode())
end = time.monotonic() + 60
while rank == 1:
    try:
        socket.create_connection((master, 5000), 3).sendall(b"rank 1")
        break
    except OSError:
        assert time.monotonic() < end
        time.sleep(0.2)
"""


def test_two_pods_of_a_jobset_find_each_other_by_name(kube: Kube, tenant: Tenant) -> None:
    namespace = tenant()
    template = restricted.pod(namespace, RANK)
    job = {"parallelism": 2, "completions": 2, "backoffLimit": 0, "template": {"spec": template["spec"]}}
    network = {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    spec = {"network": network, "replicatedJobs": [{"name": "w", "replicas": 1, "template": {"spec": job}}]}
    meta = {"name": "pair", "namespace": namespace}
    kube.create({"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": meta, "spec": spec})
    restricted.wait("the JobSet", lambda: _condition(kube.get("JobSet", "pair", namespace), "Completed"))
    first = next(p for p in kube.list("Pod", namespace) if p["metadata"]["name"].startswith("pair-w-0-0-"))
    assert restricted.log(kube, namespace, first["metadata"]["name"]) == "rank 0 heard rank 1\n"


def test_a_bad_jobset_is_refused_by_its_webhook(kube: Kube, tenant: Tenant) -> None:
    meta = {"name": "x" * 60, "namespace": tenant()}
    job = {"completions": 2, "parallelism": 2, "template": {"spec": restricted.pod("", SLEEP)["spec"]}}
    spec = {"replicatedJobs": [{"name": "w", "replicas": 1, "template": {"spec": job}}]}
    with pytest.raises(ApiError, match=r"vjobset\.kb\.io"):
        kube.create({"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": meta, "spec": spec})


def test_the_gateway_routes_for_tenants(kube: Kube, tenant: Tenant) -> None:
    namespace, url = tenant(), "http://models.forja-gateway.svc"
    assert _fetch(f"{url}/{namespace}/x")[0] == 404
    restricted.start(kube, namespace, restricted.SERVER, name="web", labels={"app": "web"})
    kube.create(service(namespace, "web", "web"))
    kube.create(route(namespace))
    restricted.wait("the route", lambda: _fetch(f"{url}/{namespace}/x") == (200, "web"))
    kube.delete("HTTPRoute", "web", namespace)
    restricted.wait("the end of the route", lambda: _fetch(f"{url}/{namespace}/x")[0] == 404)


def test_the_gateway_takes_no_routes_from_others(kube: Kube, tenant: Tenant) -> None:
    namespace = tenant()
    kube.patch("Namespace", namespace, {"metadata": {"labels": {"forja.dev/tenant": None}}})
    kube.create(service(namespace, "web", "web"))
    kube.create(route(namespace))

    def reasons() -> list[str]:
        parents = (kube.get("HTTPRoute", "web", namespace) or {}).get("status", {}).get("parents", [])
        return [c["reason"] for p in parents for c in p["conditions"] if c["type"] == "Accepted"]

    assert restricted.wait("the gateway's answer", reasons) == ["NotAllowedByListeners"]


def test_simulated_nodes_run_pods_and_keep_disruption_budgets(kube: Kube, tenant: Tenant) -> None:
    namespace = tenant()
    found = restricted.start(kube, namespace, SLEEP, name="a", labels={"app": "a"}, resources={"nvidia.com/gpu": 8}, spec=TOLERATE)
    assert found["spec"]["nodeName"] in versions.SIMULATED_NODES
    budget = {"minAvailable": 1, "selector": {"matchLabels": {"app": "a"}}}
    meta = {"name": "a", "namespace": namespace}
    kube.create({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": meta, "spec": budget})
    restricted.wait("the budget", lambda: (kube.get("PodDisruptionBudget", "a", namespace) or {}).get("status", {}).get("currentHealthy"))
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta}
    with pytest.raises(ApiError) as refusal:
        kube.request("POST", f"{place('Pod', namespace)}/a/eviction", eviction)
    assert refusal.value.status == 429
    kube.delete("PodDisruptionBudget", "a", namespace)
    kube.request("POST", f"{place('Pod', namespace)}/a/eviction", eviction)
    restricted.wait("the end of the pod", lambda: kube.get("Pod", "a", namespace) is None)


def test_simulated_nodes_can_be_reset(kube: Kube) -> None:
    name, api = "gpu-to-reset", Api(places().kubeconfig)
    simulated.make(api, [name])
    try:
        restricted.wait("the node", lambda: ready(kube.get("Node", name)))
        kube.patch("Node", name, {"metadata": {"labels": {"nvidia.com/mig.config": "x", "extra": "x"}}, "spec": {"unschedulable": True}})
        kube.patch("Node", name, {"status": {"allocatable": {"nvidia.com/gpu": "0", "nvidia.com/mig-1g.10gb": "56"}}}, part="status")
        simulated.reset(api, [name])
        found = kube.get("Node", name) or {}
        assert found["status"]["allocatable"] == simulated.ALLOCATABLE
        assert found["metadata"]["labels"] == {**simulated.LABELS, "kubernetes.io/hostname": name}
        assert found["spec"]["taints"] == [simulated.TAINT]
        assert ready(found)
    finally:
        kube.delete("Node", name)


def test_pods_outlive_a_kubelet_and_devices_come_back(kube: Kube, tenant: Tenant, node: Node, run_pod: Run) -> None:
    namespace = tenant()
    before = restricted.start(kube, namespace, SLEEP, name="a", resources={"nvidia.com/gpu": 1})
    node.stop("kubelet")
    assert node.pid("kubelet") == 0
    node.again("kubelet")
    restricted.wait("the devices", lambda: _allocatable(kube, "nvidia.com/gpu") == 8)
    after = run_pod(namespace, "import os; print(os.environ['NVIDIA_VISIBLE_DEVICES'])", resources={"nvidia.com/gpu": 7})
    assert len(after.log.split(",")) == 7
    same = kube.get("Pod", "a", namespace) or {}
    assert same["status"]["containerStatuses"][0]["containerID"] == before["status"]["containerStatuses"][0]["containerID"]
    assert same["status"]["containerStatuses"][0]["restartCount"] == 0


def test_the_check_of_down_sees_what_is_there() -> None:
    """`down` says that nothing is left: here it would have to say what is."""
    found = " ".join(down.left(places()))
    assert all(word in found for word in ("cgroup /sys/fs/cgroup", "file /run/netns/forja-cluster", "process", "kubelet-", "etcd-"))


def test_a_second_cluster_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=str(places().state)):
        down.only_mine(Places(cache=tmp_path))


def route(namespace: str) -> dict[str, Any]:
    rule = {"matches": [{"path": {"type": "PathPrefix", "value": f"/{namespace}"}}], "backendRefs": [{"name": "web", "port": 80}]}
    spec = {"parentRefs": [{"name": "models", "namespace": "forja-gateway"}], "rules": [rule]}
    meta = {"name": "web", "namespace": namespace}
    return {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": meta, "spec": spec}


def _is(wanted: object, ask: Callable[..., object], *arguments: object) -> bool:
    return ask(*arguments) == wanted


def _fetch(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=3) as answer:  # noqa: S310 (one of this module's own addresses)
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except OSError as error:
        return 0, str(error)


def _addresses(name: str) -> list[str]:
    try:
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET)})
    except socket.gaierror:
        return []


def _unschedulable(kube: Kube, namespace: str, name: str) -> str:
    conditions = (kube.get("Pod", name, namespace) or {}).get("status", {}).get("conditions", [])
    return next((c["message"] for c in conditions if c["type"] == "PodScheduled" and c["status"] == "False"), "")


def _condition(found: dict[str, Any] | None, kind: str) -> bool:
    conditions = (found or {}).get("status", {}).get("conditions", [])
    return any(c["type"] == kind and c["status"] == "True" for c in conditions)


def _allocatable(kube: Kube, resource: str) -> int:
    return int((kube.get("Node", versions.NODE) or {})["status"]["allocatable"].get(resource, 0))
