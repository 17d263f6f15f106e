"""What the launcher's token can do and can't: every call is made for real, with the token that Airflow has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cluster.platform import Platform
from cluster.pods_fixtures import NAMESPACE, holding, tenants

from forja import kube
from forja.kube import ApiError, Kube

__all__ = ["tenants"]

PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
STRANGERS = {"apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "x-"}, "spec": {"containers": [{"name": "c", "image": "i:1"}]}}


@pytest.fixture(scope="module")
def launcher(platform: Platform, tenants: None) -> Kube:
    """The cluster as Airflow's connection kubernetes_default sees it."""
    return kube.connect(platform.accounts / "forja-launcher.kubeconfig")


def test_it_can_do_what_a_pods_life_needs(platform: Platform, launcher: Kube) -> None:
    made = launcher.create(holding(NAMESPACE, gpus=0))
    name = made["metadata"]["name"]
    path = f"{PODS}/{name}"
    assert launcher.request("GET", path)["metadata"]["uid"] == made["metadata"]["uid"]
    assert name in [p["metadata"]["name"] for p in launcher.list("Pod", NAMESPACE)]
    launcher.patch("Pod", name, {"metadata": {"labels": {"already_checked": "True"}}}, NAMESPACE)
    launcher.list("Event", NAMESPACE, fields=f"involvedObject.name={name}")
    platform.until("its log", lambda: launcher.request("GET", f"{path}/log") == "")
    assert launcher.delete("Pod", name, NAMESPACE, grace_s=0)


REFUSED: dict[str, tuple[str, str, object]] = {
    "read secrets": ("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets", None),
    "read the lake's secret": ("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets/forja-lake", None),
    "read configuration": ("GET", f"/api/v1/namespaces/{NAMESPACE}/configmaps", None),
    "list nodes": ("GET", "/api/v1/nodes", None),
    "label a node": ("PATCH", "/api/v1/nodes/node1", {"metadata": {"labels": {"x": "y"}}}),
    "list namespaces": ("GET", "/api/v1/namespaces", None),
    "list the pods of all namespaces": ("GET", "/api/v1/pods", None),
    "list pods of another namespace": ("GET", "/api/v1/namespaces/kube-system/pods", None),
    "list pods of the platform's own namespace": ("GET", "/api/v1/namespaces/forja/pods", None),
    "start a pod in another namespace": ("POST", "/api/v1/namespaces/default/pods", STRANGERS),
    "run something in a pod": ("POST", f"{PODS}/x/exec?command=id&stdout=true", None),
    "attach to a pod": ("POST", f"{PODS}/x/attach?stdout=true", None),
    "forward a port": ("POST", f"{PODS}/x/portforward", None),
    "add a container to a pod": ("PATCH", f"{PODS}/x/ephemeralcontainers", {"spec": {"ephemeralContainers": []}}),
    "replace a pod": ("PUT", f"{PODS}/x", {**STRANGERS, "metadata": {"name": "x", "namespace": NAMESPACE}}),
    "delete all pods at once": ("DELETE", PODS, None),
    "change a pod's status": ("PATCH", f"{PODS}/x/status", {"status": {"phase": "Succeeded"}}),
    "watch pods": ("GET", f"{PODS}?watch=true&timeoutSeconds=1", None),
    "make a token": (
        "POST", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/forja-release/token",
        {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}},
    ),
    "give itself rights": (
        "POST", f"/apis/rbac.authorization.k8s.io/v1/namespaces/{NAMESPACE}/rolebindings",
        {
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "more"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        },
    ),
    "change its own role": ("PATCH", "/apis/rbac.authorization.k8s.io/v1/clusterroles/forja-launcher", {"rules": []}),
    "lift the quota": ("DELETE", f"/api/v1/namespaces/{NAMESPACE}/resourcequotas/gpus", None),
    "remove a network policy": ("DELETE", f"/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies/default-deny", None),
    "change what is served": ("GET", f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments", None),
}  # fmt: skip
"""Call that it must not be able to make: method, path, body."""


@pytest.mark.parametrize("what", REFUSED)
def test_it_can_do_nothing_else(what: str, launcher: Kube) -> None:
    method, path, body = REFUSED[what]
    content = "application/merge-patch+json" if method == "PATCH" else "application/json"
    refused(lambda: launcher.request(method, path, body, content=content))


@pytest.mark.parametrize("user", ["admin", f"system:serviceaccount:{NAMESPACE}:forja-release"])
def test_it_can_be_nobody_else(user: str, launcher: Kube) -> None:
    refused(lambda: launcher.impersonating(user).list("Pod", NAMESPACE))


def test_the_same_calls_are_possible_for_an_administrator(platform: Platform, tenants: None) -> None:
    """So a refusal above is the token's, and not that of a path that nobody could use."""
    for what in ("read secrets", "list nodes", "list the pods of all namespaces", "watch pods", "change what is served"):
        method, path, body = REFUSED[what]
        platform.kube.request(method, path, body)


def refused(call: Callable[[], object]) -> None:
    """The API server refuses by its authorization: 403 with the words of RBAC, not that something is missing or wrong."""
    with pytest.raises(ApiError) as raised:
        call()
    assert raised.value.status == 403
    assert "forja-launcher" in raised.value.message
    assert "cannot" in raised.value.message
