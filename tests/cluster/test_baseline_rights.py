"""What the account of the DAG security_baseline can do, by its own token: all of its work, and nothing beyond it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from cluster import access, baseline_site
from cluster.baseline_site import TEAMS, install
from cluster.kit.places import places

from forja import kube as k8s
from forja.baseline import plan, report
from forja.baseline.probes import CONTROLS, Verdict
from forja.kube import ApiError, Kube, place
from forja.sites import Site

ACCOUNT = "forja-baseline"
PATH = re.compile(r"/apis?/(?:[a-z0-9.]+/)?v1(?:/namespaces/[^/]+(?=/))?/(?P<kind>[a-z]+)(?:/(?P<name>[^/]+))?$")


class Watched(Kube):
    """A connection that notes which verb of which resource it used."""

    used: set[tuple[str, str]]

    def request(self, method: str, path: str, body: object = None, **more: Any) -> Any:
        """As Kube's."""
        found = PATH.match(path)
        if found:
            one = "get" if found["name"] else "list"
            verb = {"GET": one, "POST": "create", "PATCH": "patch", "DELETE": "delete"}[method]
            # Applying an object that isn't there asks for both.
            verbs = {verb, "create"} if method == "PATCH" and found["kind"] != "namespaces" else {verb}
            self.used |= {(found["kind"], v) for v in verbs}
        return super().request(method, path, body, **more)


@pytest.fixture(scope="module")
def site(kube: Kube) -> Iterator[Site]:
    """Two tenants with a baseline, and the account's rights in them."""
    with baseline_site.bare(kube) as made:
        assert made.gateway is not None and made.baseline is not None  # noqa: PT018
        ours = {"forja-gateway": made.gateway.namespace, "forja-probe": made.baseline.probe_namespace}
        for manifest in access.documents("baseline"):
            meta = manifest["metadata"]
            if manifest["kind"] == "Namespace":
                meta["name"] = ours.get(meta["name"], meta["name"])
            elif meta.get("namespace") in ours:
                meta["namespace"] = ours[meta["namespace"]]
            kube.apply(manifest, manager=access.MANAGER)
        install(kube, made, adopt=True)
        yield made


@pytest.fixture(scope="module")
def keeper(kube: Kube, site: Site, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """The account, by a token of its own."""
    config = access.kubeconfig(kube, places().kubeconfig, ACCOUNT, tmp_path_factory.mktemp("account"))
    made = Watched(k8s.connect(config)._client)
    made.used = set()
    return made


def test_all_of_its_work_and_no_right_to_spare(kube: Kube, site: Site, keeper: Watched) -> None:
    namespace = site.tenants["a"].namespace
    meta = {"name": "old", "namespace": namespace, "labels": {"app.kubernetes.io/managed-by": "forja-baseline"}}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "forja-release"}
    for old in (
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
        {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": meta, "spec": {"hard": {"pods": "300"}}},
        {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta, "spec": {"podSelector": {}}},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": meta, "roleRef": reference, "subjects": []},
    ):
        kube.apply(old, manager=plan.MANAGER)
    for kind, name in (
        ("ServiceAccount", "forja-stage"), ("RoleBinding", "forja-launcher"), ("RoleBinding", "forja-release"),
        ("ResourceQuota", "forja-gpu"), ("NetworkPolicy", "forja-dns"),
    ):  # fmt: skip
        assert kube.delete(kind, name, namespace)
    kube.patch("Namespace", namespace, {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": None}}})
    mended = install(keeper, site)
    assert len(mended) == 6 + 4
    assert sum(line.startswith("delete ") for line in mended) == 4
    assert plan.plan(keeper, site) == []

    found = report.prove(keeper, site)
    print("\n".join(found.lines()))
    assert found.table == {team: dict.fromkeys(CONTROLS, Verdict.PASS) for team in TEAMS}

    rules = [r for m in access.documents("baseline") if m["kind"] == "ClusterRole" for r in m["rules"] if r["verbs"] != ["bind"]]
    granted = {(kind, verb) for r in rules for kind in r["resources"] for verb in r["verbs"]}
    assert keeper.used == granted


POD = "/api/v1/namespaces/{tenant}/pods/x"
RBAC = "/apis/rbac.authorization.k8s.io/v1"
ADMIN = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}
BARRED: dict[str, tuple[str, str, Any]] = {
    "read a tenant's Secrets": ("GET", "/api/v1/namespaces/{tenant}/secrets", None),
    "read one Secret": ("GET", "/api/v1/namespaces/{tenant}/secrets/forja-lake", None),
    "read a log": ("GET", f"{POD}/log", None),
    "run something in a pod": ("POST", f"{POD}/exec", None),
    "add a container to a pod": ("PATCH", f"{POD}/ephemeralcontainers", {}),
    "make a tenant's token": ("POST", "/api/v1/namespaces/{tenant}/serviceaccounts/forja-release/token", {}),
    "make a namespace": ("POST", "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}),
    "delete a tenant's namespace": ("DELETE", "/api/v1/namespaces/{tenant}", None),
    "weaken another namespace": ("PATCH", "/api/v1/namespaces/kube-system", {"metadata": {"labels": {"x": "y"}}}),
    "change a node": ("PATCH", "/api/v1/nodes/node1", {"metadata": {"labels": {"x": "y"}}}),
    "make a pod elsewhere": ("POST", "/api/v1/namespaces/kube-system/pods", {}),
    "make a policy elsewhere": ("POST", "/apis/networking.k8s.io/v1/namespaces/kube-system/networkpolicies", {}),
    "make a role": ("POST", f"{RBAC}/namespaces/{{tenant}}/roles", {}),
    "change its own role": ("PATCH", f"{RBAC}/clusterroles/forja-baseline-tenant", {"rules": []}),
    "bind a role elsewhere": ("POST", f"{RBAC}/namespaces/kube-system/rolebindings", {}),
    "bind a role everywhere": ("POST", f"{RBAC}/clusterrolebindings", {}),
}


@pytest.mark.parametrize("what", BARRED, ids=str)
def test_may_not(kube: Kube, site: Site, keeper: Watched, what: str) -> None:
    method, path, body = BARRED[what]
    content = "application/merge-patch+json" if method == "PATCH" else "application/json"
    with pytest.raises(ApiError, match=f'User "system:serviceaccount:forja:{ACCOUNT}" cannot ') as raised:
        keeper.request(method, path.format(tenant=site.tenants["a"].namespace), body, content=content)
    assert (raised.value.status, raised.value.reason) == (403, "Forbidden")


def test_may_not_bind_a_role_with_more_rights(site: Site, keeper: Watched) -> None:
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "roleRef": ADMIN,
        "metadata": {"name": "more", "namespace": site.tenants["a"].namespace},
        "subjects": [{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": "forja"}],
    }  # fmt: skip
    with pytest.raises(ApiError, match="attempting to grant RBAC permissions not currently held") as raised:
        keeper.create(binding)
    assert raised.value.status == 403


def test_may_not_act_as_somebody_else(keeper: Watched) -> None:
    with pytest.raises(ApiError, match="cannot impersonate"):
        Kube(keeper._client).impersonating("admin").get("Namespace", "default")


def test_tenants_that_left_are_not_looked_for(site: Site, keeper: Watched) -> None:
    """It may see a namespace by its name, and list none."""
    (line,) = plan.left(keeper, site)
    assert "not looked for" in line


def test_a_new_tenant_needs_an_administrator(kube: Kube, keeper: Watched) -> None:
    with baseline_site.listener() as port:
        new = baseline_site.make(port)
    with pytest.raises(ApiError, match='cannot patch resource "namespaces"'):
        install(keeper, new)
    assert kube.get("Namespace", new.tenants["a"].namespace) is None
    review = {
        "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "metadata": {},
        "spec": {
            "user": f"system:serviceaccount:forja:{ACCOUNT}",
            "resourceAttributes": {"verb": "get", "version": "v1", "resource": "namespaces", "name": new.tenants["a"].namespace},
        },
    }  # fmt: skip
    assert kube.request("POST", place("SubjectAccessReview"), review)["status"]["allowed"], "it may see that it is missing"
