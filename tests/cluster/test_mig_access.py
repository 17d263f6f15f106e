"""The rights of k8s/access/mig.yaml: they are enough for a change and its way back, each of them is needed, and they are no more."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from cluster.kit.places import ROOT
from cluster.mig import ADMIN, gpu, quick, run_on, space, state
from cluster.mig_manager import managing, wait_until

from forja.errors import Refused
from forja.kube import ApiError, Kube
from forja.mig import probe, whole

__all__ = ["gpu", "space"]

ACCESS = [d for d in yaml.safe_load_all((ROOT / "k8s" / "access" / "mig.yaml").read_text()) if d]
ACCOUNT = "system:serviceaccount:forja:forja-mig"


def rules() -> Iterator[tuple[str, str, str]]:
    """Every single right: kind of the role, resource, verb."""
    for role in ACCESS:
        for rule in role.get("rules", []):
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            for resource in rule["resources"]:
                for verb in rule["verbs"]:
                    yield role["kind"], resource, verb


@pytest.fixture
def account(kube: Kube) -> Kube:
    """The cluster as the DAG's service account."""
    kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "forja"}}, manager="forja-tests")
    for manifest in ACCESS:
        kube.apply(manifest, manager="forja-tests")
    return kube.impersonating(ACCOUNT)


def test_enough_for_a_change_and_for_its_way_back(kube: Kube, account: Kube, gpu: str, space: str) -> None:
    run_on(kube, space, gpu)
    with managing(ADMIN, gpu):
        assert whole.make(account, quick(gpu, "balanced"), lambda _: None) == "changed"
    before = state(kube, gpu)
    with managing(ADMIN, gpu, "fails"), pytest.raises(Refused, match="'failed'"):
        whole.make(account, quick(gpu, "halves"), lambda _: None)
    assert state(kube, gpu) == before


@pytest.mark.parametrize("right", list(rules()), ids=" ".join)
def test_each_right_is_needed(kube: Kube, gpu: str, space: str, right: tuple[str, str, str]) -> None:
    """Somebody who has all but one can't make the change, and it is this one that the API names."""
    user = f"less-{abs(hash(right)) % 10**8}"
    made = []
    try:
        for manifest in _without(right, user):
            kube.apply(manifest, manager="forja-tests")
            made.append(manifest)
        run_on(kube, space, gpu)
        with managing(ADMIN, gpu), pytest.raises((ApiError, Refused)) as refused:
            whole.make(kube.impersonating(user), quick(gpu, "balanced"), lambda _: None)
        _, resource, verb = right
        assert f'User "{user}" cannot {verb} resource "{resource}"' in str(refused.value)
    finally:
        for manifest in made:
            kube.delete(manifest["kind"], manifest["metadata"]["name"], manifest["metadata"].get("namespace", ""))


def _without(right: tuple[str, str, str], user: str) -> Iterator[dict[str, Any]]:
    """The access of a user with all rights but one."""
    for manifest in copy.deepcopy(ACCESS):
        if manifest["kind"] in ("ServiceAccount", "Namespace"):
            continue
        manifest["metadata"]["name"] += f"-{user}"
        if "roleRef" in manifest:
            manifest["roleRef"]["name"] += f"-{user}"
            manifest["subjects"] = [{"kind": "User", "name": user, "apiGroup": "rbac.authorization.k8s.io"}]
        for rule in manifest.get("rules", []):
            if manifest["kind"] == right[0] and right[1] in rule["resources"]:
                rule["verbs"] = [v for v in rule["verbs"] if v != right[2]] or ["watch"]
        yield manifest


POD = {"kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [{"name": "c", "image": "a:1"}]}}
DENIED = [
    ("GET", "/api/v1/nodes", None),
    ("DELETE", "/api/v1/nodes/{node}", None),
    ("POST", "/api/v1/nodes", {"kind": "Node", "metadata": {"name": "x"}}),
    ("PATCH", "/api/v1/nodes/{node}/status", {"status": {"allocatable": {"nvidia.com/gpu": "99"}}}),
    ("GET", "/api/v1/secrets", None),
    ("GET", "/api/v1/namespaces/forja/secrets", None),
    ("GET", "/api/v1/configmaps", None),
    ("POST", "/api/v1/namespaces/{space}/pods", POD),
    ("POST", "/api/v1/namespaces/forja/pods", POD),
    ("GET", "/api/v1/namespaces/forja/pods/x", None),
    ("DELETE", "/api/v1/namespaces/forja/pods/x", None),
    ("POST", "/api/v1/namespaces/forja-gateway/pods", POD),
    ("GET", "/api/v1/namespaces/{space}/pods/x", None),
    ("DELETE", "/api/v1/namespaces/{space}/pods/x", None),
    ("DELETE", "/api/v1/namespaces/{space}/pods", None),
    ("PATCH", "/api/v1/namespaces/{space}/pods/x", {}),
    ("GET", "/api/v1/namespaces/{space}/pods/x/log", None),
    ("POST", "/api/v1/namespaces/forja/pods/x/exec", None),
    ("PATCH", "/api/v1/namespaces/forja/pods/x", {}),
    ("GET", "/apis/apps/v1/deployments", None),
    ("GET", "/apis/policy/v1/poddisruptionbudgets", None),
    ("DELETE", "/apis/policy/v1/namespaces/{space}/poddisruptionbudgets/x", None),
    ("POST", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", {"kind": "ClusterRoleBinding", "metadata": {"name": "x"}}),
    ("POST", "/api/v1/namespaces/forja/serviceaccounts/forja-mig/token", {}),
    ("POST", "/api/v1/namespaces/forja-mig/serviceaccounts/default/token", {}),
    ("GET", "/api/v1/namespaces/forja-mig/secrets", None),
    ("PATCH", "/api/v1/namespaces/forja-mig", {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": None}}}),
]
ALLOWED = [
    ("GET", "/api/v1/nodes/{node}", None),
    ("PATCH", "/api/v1/nodes/{node}", {"metadata": {"labels": {"forja.dev/test": "1"}}}),
    ("GET", "/api/v1/pods", None),
]


@pytest.mark.parametrize(("method", "path", "body"), DENIED, ids=lambda v: v if isinstance(v, str) else "")
def test_no_more(account: Kube, gpu: str, space: str, method: str, path: str, body: Any) -> None:
    """Each call is refused by RBAC itself; the twin below shows that the account does reach the API."""
    with pytest.raises(ApiError) as refused:
        account.request(method, path.format(node=gpu, space=space), body, content=_content(method))
    assert (refused.value.status, refused.value.reason) == (403, "Forbidden")
    assert f'User "{ACCOUNT}" cannot' in refused.value.message


@pytest.mark.parametrize(("method", "path", "body"), ALLOWED, ids=lambda v: v if isinstance(v, str) else "")
def test_the_account_reaches_the_api(account: Kube, gpu: str, method: str, path: str, body: Any) -> None:
    assert account.request(method, path.format(node=gpu), body, content=_content(method))


def _content(method: str) -> str:
    return "application/merge-patch+json" if method == "PATCH" else "application/json"


def test_in_its_own_namespace_only_restricted_pods_start(kube: Kube, account: Kube) -> None:
    """The probe is admitted; a pod that could take the node is refused, by Pod Security and not by RBAC."""
    wait_until(lambda: kube.get("ServiceAccount", "default", probe.NAMESPACE), "the namespace's service account")
    pod = probe.manifest(probe.Probe(), "node1", {"nvidia.com/gpu": 1})
    assert account.create(pod, dry_run=True)["metadata"]["name"] == "forja-mig-probe-node1"
    more: list[dict[str, Any]] = [
        {"securityContext": {}},
        {"hostPID": True},
        {"volumes": [{"name": "node", "hostPath": {"path": "/"}}]},
        {"containers": [{**pod["spec"]["containers"][0], "securityContext": {"privileged": True}}]},
    ]
    for spec in more:
        with pytest.raises(ApiError, match="violates PodSecurity") as refused:
            account.create({**pod, "spec": {**pod["spec"], **spec}}, dry_run=True)
        assert refused.value.status == 403


def test_its_own_namespace_holds_nothing_that_a_pod_could_take(kube: Kube, account: Kube) -> None:
    """Whoever makes pods in a namespace can act as its service accounts and mount its Secrets."""
    assert account is not None
    wait_until(lambda: kube.get("ServiceAccount", "default", probe.NAMESPACE), "the namespace's service account")
    assert [a["metadata"]["name"] for a in kube.list("ServiceAccount", probe.NAMESPACE)] == ["default"]
    assert kube.list("Secret", probe.NAMESPACE) == []
    mine = f"system:serviceaccount:{probe.NAMESPACE}:default"
    bound = [b["metadata"]["name"] for b in kube.list("RoleBinding") + kube.list("ClusterRoleBinding") for s in b.get("subjects") or []
             if s["kind"] == "ServiceAccount" and f"system:serviceaccount:{s.get('namespace')}:{s['name']}" == mine]  # fmt: skip
    assert bound == []
