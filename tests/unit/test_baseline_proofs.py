"""What the proofs ask and compare beyond single calls: quotas in use, other resources, policies of others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from forja.baseline import admission, manifests, network, plan, pods, policies, resources
from forja.baseline.probes import Finding, Outcome, Verdict, judge
from forja.errors import Unavailable
from forja.kube import ApiError, Object
from forja.sites import Site, load_site

GPU = "nvidia.com/gpu"
FITS, OVER = "all that is left of gpu", "one more than is left of gpu"


@pytest.fixture
def site() -> Site:
    return load_site("small-cluster")


def with_baseline(site: Site, **changes: Any) -> Site:
    assert site.baseline is not None
    return dataclasses.replace(site, baseline=dataclasses.replace(site.baseline, **changes))


class Quota:
    """An API server with one quota of GPUs; ``after`` happens once a pod was asked for."""

    def __init__(self, hard: int, used: int, after: Callable[[Quota], None] = lambda quota: None) -> None:
        self.hard, self.used, self.after, self.asked = hard, used, after, list[int]()

    def list(self, kind: str, namespace: str = "", **_: str) -> list[Object]:
        hard = {f"requests.{GPU}": str(self.hard)}
        return [{"metadata": {"name": "q"}, "spec": {"hard": hard}, "status": {"hard": hard, "used": {f"requests.{GPU}": str(self.used)}}}]

    def create(self, manifest: Object, *, dry_run: bool = False) -> Object:
        asked = int(manifest["spec"]["containers"][0]["resources"]["limits"].get(GPU, 0))
        self.asked.append(asked)
        over = self.used + asked > self.hard
        self.after(self)
        if over and asked:
            raise ApiError("create", 403, "Forbidden", f"exceeded quota: q, requested: requests.{GPU}={asked}, used: , limited: ")
        return manifest


def asked(quota: Quota, site: Site) -> Mapping[str, Finding]:
    cases = admission.gpu_quota(quota, site, site.tenant("vision"), "image:1")  # type: ignore[arg-type]
    mine = [case for case in cases if case[0].name in (FITS, OVER)]
    return {f.probe.name: f for f in admission.run(mine, settle_s=0)}


@pytest.mark.parametrize(("used", "fits", "over"), [(0, 4, 5), (3, 1, 2), (4, 0, 1), (9, 0, 1)])
def test_what_is_left_and_one_more_is_asked_for(site: Site, used: int, fits: int, over: int) -> None:
    quota = Quota(4, used)
    assert {f.verdict for f in asked(quota, site).values()} == {Verdict.PASS}
    assert sorted(quota.asked) == [fits, over]


@pytest.mark.parametrize("used", [0, 1, 4])
@pytest.mark.parametrize("hard", [5, 8])
def test_a_raised_quota_is_seen_whatever_is_in_use(site: Site, hard: int, used: int) -> None:
    assert asked(Quota(hard, used), site)[OVER].verdict is Verdict.FAIL


def test_what_was_freed_meanwhile_is_no_raised_quota(site: Site) -> None:
    """Read as 4 of 4 in use, and free when it was asked for: it may be had."""
    quota = Quota(4, 4)

    def read(kind: str, namespace: str = "", **_: str) -> list[Object]:
        found = Quota.list(quota, kind, namespace)
        quota.used = 3
        return found

    quota.list = read  # type: ignore[method-assign]
    cases = admission.gpu_quota(quota, site, site.tenant("vision"), "image:1")  # type: ignore[arg-type]
    probe, call = next(c for c in cases if c[0].name == OVER)
    quota.used = 4
    answer = call.args[2]()  # type: ignore[attr-defined]
    assert judge(probe, {probe.name: answer}).verdict is Verdict.NOT_PROVEN
    assert "4 -> 3" in answer.said


def test_what_was_taken_meanwhile_is_no_lowered_quota(site: Site) -> None:
    quota = Quota(4, 3)
    quota.used = 3

    def read(kind: str, namespace: str = "", **_: str) -> list[Object]:
        found = Quota.list(quota, kind, namespace)
        quota.used = 4
        return found

    quota.list = read  # type: ignore[method-assign]
    cases = admission.gpu_quota(quota, site, site.tenant("vision"), "image:1")  # type: ignore[arg-type]
    _, call = next(c for c in cases if c[0].name == FITS)
    quota.used = 3
    assert call.args[2]().outcome is Outcome.ERRED  # type: ignore[attr-defined]


def test_resources_of_the_site_file_are_in_the_quota(site: Site) -> None:
    more = with_baseline(site, resources={"nvidia.com/gpu.shared": 0, "nvidia.com/x": 2, "nvidia.com/mig-1g.10gb": 0})
    quota = next(o for o in manifests.render(more, more.tenant("vision")) if o["metadata"]["name"] == "forja-gpu")
    hard = quota["spec"]["hard"]
    assert (hard["requests.nvidia.com/gpu.shared"], hard["requests.nvidia.com/x"]) == ("0", "2")
    assert hard["requests.nvidia.com/mig-1g.10gb"] == "7", "what a tenant is granted counts"
    names = [p.name for p, _ in admission.gpu_quota(Quota(4, 0), more, more.tenant("vision"), "image:1")]  # type: ignore[arg-type]
    assert "one more than is left of x" in names


def test_a_resource_that_is_no_gpu_may_be_ignored() -> None:
    nodes = [{"metadata": {"name": "n"}, "status": {"allocatable": {"nvidia.com/hostdev": "4", "nvidia.com/gpu.shared": "4"}}}]
    assert resources.unnamed(nodes, [], ["nvidia.com/hostdev"]) == {"nvidia.com/gpu.shared": ["n"]}


class Offers:
    """A node that offers what no quota names."""

    def list(self, kind: str, namespace: str = "", **_: str) -> list[Object]:
        nodes = [{"metadata": {"name": "n"}, "status": {"allocatable": {"nvidia.com/gpu.shared": "4"}}}]
        return nodes if kind == "Node" else []


def test_an_unlimited_resource_says_what_to_do(site: Site) -> None:
    cases = admission.gpu_quota(Offers(), site, site.tenant("vision"), "image:1")  # type: ignore[arg-type]
    (found,) = admission.run([c for c in cases if c[0].name == "resources that nodes offer are named"], settle_s=0)
    assert (found.verdict, found.why) == (Verdict.FAIL, admission.UNLIMITED)
    assert "resources" in found.why
    assert "ignore" in found.why


def test_a_load_balancer_is_asked_for_without_ports_of_nodes(site: Site) -> None:
    """Those have a limit of their own, which would refuse it first."""

    class Watch(Quota):
        def create(self, manifest: Object, *, dry_run: bool = False) -> Object:
            made.append(manifest)
            return manifest

    made: list[Object] = []
    cases = admission.gpu_quota(Watch(4, 0), site, site.tenant("vision"), "image:1")  # type: ignore[arg-type]
    probe, call = next(c for c in cases if c[0].name == "a Service with a load balancer")
    call()
    assert probe.refused
    assert "services.loadbalancers" in probe.reason
    assert made[0]["spec"]["type"] == "LoadBalancer"
    assert made[0]["spec"]["allocateLoadBalancerNodePorts"] is False


class Policies:
    """An API server with network policies, as it gives them: empty lists are left out."""

    def __init__(self, found: Sequence[Object] | Exception) -> None:
        self.found = found

    def list(self, kind: str, namespace: str = "", **_: str) -> Sequence[Object]:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def stored(site: Site) -> dict[str, Object]:
    rendered = [o for o in manifests.render(site, site.tenant("vision")) if o["kind"] == "NetworkPolicy"]
    return {o["metadata"]["name"]: {**o, "spec": {k: v for k, v in o["spec"].items() if v != []}} for o in rendered}


def look(site: Site, found: Sequence[Object] | Exception) -> Finding:
    return admission.run(policies.cases(Policies(found), site, site.tenant("vision")), settle_s=0)[0]  # type: ignore[arg-type]


def test_policies_as_rendered_pass(site: Site) -> None:
    assert look(site, list(stored(site).values())).verdict is Verdict.PASS


DOORS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "everything may come in": ("forja-default-deny", lambda spec: spec.update(ingress=[{}])),
    "everything may go out": ("forja-default-deny", lambda spec: spec.update(egress=[{}])),
    "a port more": ("forja-models", lambda spec: spec["ingress"][0]["ports"].append({"protocol": "TCP", "port": 8002})),
    "other pods": ("forja-release", lambda spec: spec.update(podSelector={})),
}


@pytest.mark.parametrize("case", DOORS, ids=str)
def test_a_policy_that_differs_is_named(site: Site, case: str) -> None:
    name, change = DOORS[case]
    found = stored(site)
    change(found[name]["spec"])
    finding = look(site, list(found.values()))
    assert finding.verdict is Verdict.FAIL
    assert name in finding.answer.said
    assert finding.why == policies.WRONG


def test_a_policy_of_somebody_else_is_named(site: Site) -> None:
    other = {"metadata": {"name": "mine"}, "spec": {"podSelector": {}, "egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]}}
    finding = look(site, [*stored(site).values(), other])
    assert finding.verdict is Verdict.FAIL
    assert "mine" in finding.answer.said


def test_a_policy_that_is_gone_is_named(site: Site) -> None:
    found = stored(site)
    del found["forja-dns"]
    finding = look(site, list(found.values()))
    assert finding.verdict is Verdict.FAIL
    assert "forja-dns" in finding.answer.said


def test_rules_without_effect_are_no_difference(site: Site) -> None:
    """Rules for a direction that the policy isn't about: the API server takes them, and nothing reads them."""
    found = stored(site)
    found["forja-dns"]["spec"]["ingress"] = [{}]
    assert look(site, list(found.values())).verdict is Verdict.PASS


@pytest.mark.parametrize("error", [ApiError("list", 403, "Forbidden", "cannot list"), Unavailable("away")], ids=["403", "away"])
def test_policies_that_cannot_be_read_prove_nothing(site: Site, error: Exception) -> None:
    assert look(site, error).verdict is Verdict.NOT_PROVEN


def test_a_pod_whose_making_got_no_answer_is_deleted(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The API server may have made it before the connection broke."""

    class Lost:
        gone: list[str] = []  # noqa: RUF012

        def list(self, kind: str, namespace: str = "", **_: str) -> list[Object]:
            return []

        def create(self, manifest: Object) -> Object:
            raise Unavailable("the answer is lost")

        def delete(self, kind: str, name: str, namespace: str) -> bool:
            self.gone.append(name)
            return True

    monkeypatch.setattr(pods, "WAVE_S", 0.1)
    scene = network.scene(site, ["vision"])
    pods.run(Lost(), scene, "image:1")  # type: ignore[arg-type]
    assert len(Lost.gone) == len(scene.servers)


OURS = [{"manager": "forja-baseline", "operation": "Apply", "fieldsV1": {"f:metadata": {}}}]


def namespace(name: str, team: str, fields: list[Any]) -> Object:
    return {"kind": "Namespace", "metadata": {"name": name, "labels": {"forja.dev/tenant": team}, "managedFields": fields}}


class Namespaces(Policies):
    """An API server that lists namespaces."""


def left(site: Site, found: Sequence[Object] | Exception) -> list[str]:
    kube: Any = Namespaces(found)
    return plan.left(kube, site)


def test_tenants_that_left_the_site_file_are_told(site: Site) -> None:
    old, foreign = namespace("forja-old", "old", OURS), namespace("forja-other", "other", [])
    (line,) = left(site, [old, foreign, namespace("forja-vision", "vision", OURS)])
    assert line.startswith("! Namespace forja-old")
    assert "[tenants.old]" in line
    assert "baseline remove --tenant old" in line


def test_namespaces_that_may_not_be_listed_are_told_in_one_line(site: Site) -> None:
    (line,) = left(site, ApiError("list", 403, "Forbidden", "cannot list"))
    assert "not looked" in line
    with pytest.raises(ApiError):
        left(site, ApiError("list", 500, "InternalError", "etcd"))


def test_the_account_of_the_mig_probe_makes_pods_in_a_namespace_of_its_own() -> None:
    """Whoever makes pods in a namespace can act as its service accounts: none of Forja's may live there."""
    import yaml

    from forja.mig import probe

    documents = [d for path in sorted((manifests.ROOT / "k8s" / "access").glob("*.yaml")) for d in yaml.safe_load_all(path.read_text())]
    there = [d for d in documents if d["metadata"].get("namespace") == probe.NAMESPACE]
    assert sorted(d["kind"] for d in there) == ["Role", "RoleBinding"]
    (made,) = [d for d in documents if d["kind"] == "Namespace" and d["metadata"]["name"] == probe.NAMESPACE]
    assert made["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert probe.Probe().namespace == probe.NAMESPACE
    makers = [d for d in documents if d["kind"] == "Role" and any("create" in r["verbs"] and "pods" in r["resources"] for r in d["rules"])]
    assert {d["metadata"]["namespace"] for d in makers} == {probe.NAMESPACE}
