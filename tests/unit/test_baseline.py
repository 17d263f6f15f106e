"""What the baseline installs and asks, without a cluster."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import yaml

from forja.baseline import admission, manifests, network, plan, pods, resources
from forja.baseline.probes import Answer, Outcome, Verdict
from forja.errors import BadInput, Refused
from forja.kube import ApiError, Kube, Object
from forja.mig import tables
from forja.settings import ROOT
from forja.sites import Allow, Site, load_site

SITES = ("cluster", "small-cluster")


@pytest.fixture
def site() -> Site:
    return load_site("small-cluster")


class Cluster:
    """Answers as an API server would; a function decides about each object that is created."""

    def __init__(self, decide: Callable[[Object], str | ApiError | None] = lambda manifest: None) -> None:
        self.decide, self.asked, self.quotas, self.nodes = decide, list[Object](), list[Object](), list[Object]()

    def create(self, manifest: Object, *, dry_run: bool = False) -> Object:
        assert dry_run
        self.asked.append(manifest)
        said = self.decide(manifest)
        if isinstance(said, ApiError):
            raise said
        if said:
            raise ApiError("create", 403, "Forbidden", f'pods "forja-probe" is forbidden: {said}')
        return manifest

    def list(self, kind: str, namespace: str = "", **_: str) -> list[Object]:
        return self.nodes if kind == "Node" else self.quotas


def kube(cluster: Cluster) -> Kube:
    return cluster  # type: ignore[return-value]


def objects(site: Site, kind: str, team: str = "vision") -> dict[str, Object]:
    return {o["metadata"]["name"]: o for o in manifests.render(site, site.tenant(team)) if o["kind"] == kind}


@pytest.mark.parametrize("name", SITES)
def test_every_hole_is_filled_and_every_object_is_the_tenants(name: str) -> None:
    site = load_site(name)
    for tenant in site.tenants.values():
        found = manifests.render(site, tenant)
        assert "${" not in json.dumps(found)
        assert found[0]["kind"] == "Namespace", "all others need it"
        assert {o["metadata"].get("namespace") or o["metadata"]["name"] for o in found} == {tenant.namespace}
        assert all(o["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "forja-baseline" for o in found)
        assert len({(o["kind"], o["metadata"]["name"]) for o in found}) == len(found)


def test_namespaces_enforce_one_pinned_version(site: Site) -> None:
    labels = objects(site, "Namespace")["forja-vision"]["metadata"]["labels"]
    assert labels["forja.dev/tenant"] == "vision"
    for mode in ("enforce", "audit", "warn"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"
        assert labels[f"pod-security.kubernetes.io/{mode}-version"].startswith("v1.")


def test_the_quota_names_every_mig_resource(site: Site) -> None:
    hard = objects(site, "ResourceQuota")["forja-gpu"]["spec"]["hard"]
    known = {p.resource for gpu in tables.GPUS.values() for p in gpu.profiles.values()}
    assert len(known) > 60
    assert {f"requests.{name}" for name in known} <= set(hard)
    assert {k: v for k, v in hard.items() if v != "0"} == {"requests.nvidia.com/gpu": "4", "requests.nvidia.com/mig-1g.10gb": "7"}
    assert not any("+" in key for key in hard), "the device plugin writes a dot"


def test_a_slice_that_no_table_holds_is_granted_too(site: Site) -> None:
    tenant = dataclasses.replace(site.tenant("vision"), mig={"9g.999gb": 1})
    assert resources.granted(tenant, {})["nvidia.com/mig-9g.999gb"] == 1


def test_a_resource_that_no_quota_names_is_found() -> None:
    nodes = [
        {"metadata": {"name": name}, "status": {"allocatable": {"cpu": "4", "nvidia.com/gpu": "8", **more}}}
        for name, more in {"n1": {"nvidia.com/gpu.shared": "4"}, "n0": {"nvidia.com/gpu.shared": "4", "nvidia.com/mig-1g.5gb": "7"}}.items()
    ]
    named = ["requests.nvidia.com/gpu", "pods"]
    assert resources.unnamed(nodes, named) == {"nvidia.com/gpu.shared": ["n0", "n1"], "nvidia.com/mig-1g.5gb": ["n0"]}
    assert (
        resources.unnamed(
            [*nodes, {"metadata": {"name": "new"}}], [*named, "requests.nvidia.com/gpu.shared", "requests.nvidia.com/mig-1g.5gb"]
        )
        == {}
    )


def test_what_pods_may_reach_is_what_the_site_file_says(site: Site) -> None:
    found = objects(site, "NetworkPolicy")
    assert found["forja-default-deny"]["spec"] == {
        "podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [], "egress": [],
    }, "a field that isn't named would not be ours, and rules that somebody adds to it would stay"  # fmt: skip
    ports = [rule["ports"][0]["port"] for rule in found["forja-platform"]["spec"]["egress"]]
    assert ports == [9092, 5000, 7070]
    api, gateway = found["forja-platform-release"]["spec"]["egress"]
    assert api == {"to": [{"ipBlock": {"cidr": "10.99.0.1/32"}}], "ports": [{"protocol": "TCP", "port": 6443}]}
    assert gateway["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "forja-gateway"}}}]
    assert found["forja-platform-release"]["spec"]["podSelector"] == {"matchLabels": {"forja/stage": "release"}}
    front = found["forja-models"]["spec"]["ingress"][0]["from"][0]
    assert front == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "forja-gateway"}}}


def test_an_allowed_thing_in_pods_is_named_by_namespace_and_labels() -> None:
    allow = Allow(name="kafka", address="kafka.forja.svc:9092", port=9093, namespace="forja", pods={"app": "kafka"})
    (peer,) = manifests.rule(allow)["to"]
    assert peer == {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "forja"}}, "podSelector": {"matchLabels": {"app": "kafka"}},
    }  # fmt: skip


@pytest.mark.parametrize("part", ["baseline", "gateway", "tenants"])
def test_a_site_that_lacks_a_part_is_refused(site: Site, part: str) -> None:
    lacking = dataclasses.replace(site, **{part: {} if part == "tenants" else None})
    with pytest.raises(BadInput, match=f"no {part}"):
        manifests.parts(lacking)


@pytest.mark.parametrize("name", ["forja", "forja-mig", "forja-gateway", "forja-probe", "forja-maintenance"])
def test_a_tenant_shares_its_namespace_with_nobody(site: Site, name: str) -> None:
    vision = dataclasses.replace(site.tenant("vision"), namespace=name)
    with pytest.raises(BadInput, match=f"namespaces of site small-cluster: got '{name}'"):
        manifests.parts(dataclasses.replace(site, tenants={**site.tenants, "vision": vision}))


def test_an_unknown_hole_is_refused() -> None:
    with pytest.raises(BadInput, match=r"network\.yaml.*'gatway'"):
        manifests.fill({"a": ["${gatway}"]}, {"gateway": "g"}, "network.yaml")


def test_holes_take_lists_alone_and_text_within_text() -> None:
    assert manifests.fill({"a": "${x}", "b": "${y}-${y}", "${y}": 1}, {"x": [1, {"c": 2}], "y": "n"}, "f") == {
        "a": [1, {"c": 2}],
        "b": "n-n",
        "n": 1,
    }


def differing(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths where two objects differ; a part that only one has counts once."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [p for key in a.keys() | b.keys() for p in differing(a.get(key), b.get(key), f"{path}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [p for n, (x, y) in enumerate(zip(a, b, strict=True)) for p in differing(x, y, f"{path}.{n}")]
    return [] if a == b else [path]


def test_each_twin_differs_in_one_field(site: Site) -> None:
    cluster = Cluster()
    cases = admission.pod_security(kube(cluster), site, site.tenant("vision"), "image:1")
    for _, call in cases:
        call()
    good, *twins = cluster.asked
    assert len(twins) == len(admission.POD_SECURITY) >= 10
    for (probe, _), twin in zip(cases[1:], twins, strict=True):
        fields = differing(good, twin)
        assert len(fields) == 1 or probe.name == "a privileged container", (probe.name, fields)


STANDARD = 'violates PodSecurity "restricted:v1.36": '


def verdicts(decide: Callable[[Object], str | ApiError | None], site: Site) -> Mapping[str, Verdict]:
    cases = admission.pod_security(kube(Cluster(decide)), site, site.tenant("vision"), "image:1")
    return {f.probe.name: f.verdict for f in admission.run(cases, settle_s=0)}


def test_a_refusal_by_another_control_is_not_proven(site: Site) -> None:
    found = verdicts(lambda pod: "exceeded quota: forja-objects" if pod["spec"].get("hostNetwork") else None, site)
    assert found["the node's network"] is Verdict.NOT_PROVEN
    assert found["the node's processes"] is Verdict.FAIL
    assert found["a pod that meets the standard"] is Verdict.PASS


def test_a_refusal_of_another_field_is_not_proven(site: Site) -> None:
    found = verdicts(lambda pod: STANDARD + "host namespaces (hostPID=true)" if pod["spec"].get("hostNetwork") else None, site)
    assert found["the node's network"] is Verdict.NOT_PROVEN


@pytest.mark.parametrize("other", ["baseline:v1.36", "restricted:v1.30", "restricted:latest"])
def test_a_lower_or_another_version_is_not_the_standard_wanted(site: Site, other: str) -> None:
    lower = STANDARD.replace("restricted:v1.36", other) + "host namespaces (hostNetwork=true)"
    found = verdicts(lambda pod: lower if pod["spec"].get("hostNetwork") else None, site)
    assert found["the node's network"] is Verdict.NOT_PROVEN


@pytest.mark.parametrize("status", [404, 422, 500])
def test_an_error_is_no_refusal(site: Site, status: int) -> None:
    error = ApiError("create", status, "Whatever", STANDARD + "host namespaces (hostNetwork=true)")
    found = verdicts(lambda pod: error if pod["spec"].get("hostNetwork") else None, site)
    assert found["the node's network"] is Verdict.NOT_PROVEN


def over(*names: str, quota: str = "forja-gpu") -> str:
    listed = ",".join(f"requests.{n}=1" for n in names)
    return f"exceeded quota: {quota}, requested: {listed}, used: {listed}, limited: {listed}"


def test_resources_of_several_quotas_are_all_asked_for() -> None:
    limits = {"one": ("nvidia.com/gpu", "nvidia.com/mig-1g.5gb"), "two": ("nvidia.com/mig-2g.10gb",)}

    def decide(pod: Object) -> str | None:
        wanted = pod["spec"]["containers"][0]["resources"]["limits"]
        return next((over(*hit, quota=q) for q, names in limits.items() if (hit := [n for n in names if n in wanted])), None)

    pod = admission.restricted_pod("x", "ns", "image:1")
    cluster = Cluster(decide)
    assert admission.ask_each(kube(cluster), pod, [n for names in limits.values() for n in names]).outcome is Outcome.REFUSED
    assert len(cluster.asked) == 2
    found = admission.ask_each(kube(cluster), pod, ["nvidia.com/gpu", "nvidia.com/mig-3g.20gb"])
    assert (found.outcome, found.said) == (Outcome.SUCCEEDED, "accepted, so not limited: nvidia.com/mig-3g.20gb")


def test_a_refusal_that_lists_something_else_ends_the_asking() -> None:
    said = "exceeded quota: forja-objects, requested: pods=1, used: pods=200, limited: pods=200"
    answer = admission.ask_each(kube(Cluster(lambda pod: said)), admission.restricted_pod("x", "ns", "image:1"), ["nvidia.com/gpu"])
    assert answer.outcome is Outcome.REFUSED
    assert "requests.nvidia.com" not in answer.said, "no reason of this control"


def test_a_quota_that_is_not_in_force_yet_proves_nothing(site: Site) -> None:
    cluster = Cluster()
    cases = admission.gpu_quota(kube(cluster), site, site.tenant("vision"), "image:1")
    hard = {"requests.nvidia.com/gpu": "4"}
    for status in ({}, {"hard": {}}, {"hard": {"requests.nvidia.com/gpu": "5"}}):
        cluster.quotas = [{"metadata": {"name": "late"}, "spec": {"hard": hard}, "status": status}]
        assert {f.verdict for f in admission.run(cases, settle_s=0)} == {Verdict.NOT_PROVEN}
    assert cluster.asked == []
    cluster.quotas = [{"metadata": {"name": "late"}, "spec": {"hard": hard}, "status": {"hard": hard}}]
    assert Verdict.FAIL in {f.verdict for f in admission.run(cases, settle_s=0)}


@pytest.mark.parametrize("teams", [["maintenance", "vision"], ["vision"]], ids=str)
def test_every_witness_is_called_and_names_are_unique(site: Site, teams: list[str]) -> None:
    scene = network.scene(site, teams)
    called = {c.name for c in scene.calls} | {s.ready for s in scene.servers}
    assert len({c.name for c in scene.calls}) == len(scene.calls)
    assert {p.team for p in scene.probes} == set(teams)
    for probe in scene.probes:
        assert probe.witnesses, probe.name
        assert {*probe.witnesses, *probe.also} <= called, probe.name
        assert probe.name not in {*probe.witnesses, *probe.also}
    for team in teams:
        mine = [p for p in scene.probes if p.team == team]
        assert {p.refused for p in mine} == {True, False}


def test_one_tenant_alone_has_no_neighbour(site: Site) -> None:
    alone = dataclasses.replace(site, tenants={"vision": site.tenant("vision")})
    assert not [p for p in network.scene(alone, ["vision"]).probes if "maintenance" in p.name]


CALL = network.Call(client=network.Client(name="c", role="c", namespace="n"), host="h", port=1, refused=False)
WANTED = pods.Wanted(manifest={"metadata": {"namespace": "n", "name": "p"}})
ENDINGS: dict[str, tuple[Object | None, str]] = {
    "gone": (None, "it is gone"),
    "image missing": (
        {"phase": "Pending", "containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull", "message": "no such"}}}]},
        "ErrImagePull: no such",
    ),
    "no node": ({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}]}, "0/3 nodes"),
    "out of memory": ({"phase": "Failed", "containerStatuses": [{"state": {"terminated": {"reason": "OOMKilled"}}}]}, "OOMKilled"),
    "simulated": ({"phase": "Running", "conditions": []}, "Running"),
    "garbled": ({"phase": "Succeeded", "containerStatuses": [{"state": {"terminated": {"message": "Traceback"}}}]}, "Traceback"),
    "half a report": ({"phase": "Succeeded", "containerStatuses": [{"state": {"terminated": {"message": "{}"}}}]}, "{}"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDINGS, ids=str)
def test_a_pod_that_reports_nothing_is_an_error_with_its_reason(case: str) -> None:
    status, why = ENDINGS[case]
    found = pods._answers([CALL], WANTED, None if status is None else {"status": status})
    assert found[CALL.name].outcome is Outcome.ERRED
    assert why in found[CALL.name].said


def test_a_report_is_read() -> None:
    message = json.dumps({"0": ["refused", "h:1: no answer in 1.5 s"]})
    pod = {"status": {"phase": "Succeeded", "containerStatuses": [{"state": {"terminated": {"message": message}}}]}}
    assert pods._answers([CALL], WANTED, pod) == {CALL.name: Answer(outcome=Outcome.REFUSED, said="h:1: no answer in 1.5 s")}


@pytest.mark.parametrize(
    ("fields", "mine"),
    [
        ([], False),
        ([{"manager": "forja-baseline", "operation": "Apply", "fieldsV1": {"f:spec": {}}}], True),
        ([{"manager": "forja-baseline", "operation": "Apply", "fieldsV1": {}}], False),
        ([{"manager": "forja-baseline", "operation": "Update", "fieldsV1": {"f:spec": {}}}], False),
        ([{"manager": "kubectl", "operation": "Apply", "fieldsV1": {"f:spec": {}}}], False),
    ],
)
def test_ours_is_what_the_api_server_says_we_applied(fields: list[Any], mine: bool) -> None:
    labels = {"app.kubernetes.io/managed-by": "forja-baseline"}
    assert plan.ours({"metadata": {"labels": labels, "managedFields": fields}}) is mine


def test_differences_are_told_by_field() -> None:
    before, after = {"a": {"b": 1, "c": [1]}, "d": 4}, {"a": {"b": 2, "c": [1]}, "e": 5}
    assert list(plan.difference(before, after)) == ["a.b: 1 -> 2", "d: 4 -> nothing", "e: nothing -> 5"]
    assert list(plan.difference({"l": [{"a": 1}, 2]}, {"l": [2, 3]})) == ['l: - {"a": 1}', "l: + 3"]
    assert list(plan.difference({"l": [1, 2]}, {"l": [2, 1]})) == ["l: [1, 2] -> [2, 1]"], "order may matter"
    assert list(plan.difference({"l": [1, 1]}, {"l": [1]})) == ["l: [1, 1] -> [1]"]


def test_one_foreign_object_stops_all() -> None:
    meta = {"name": "x", "namespace": "n"}
    changes = [
        plan.Change(verb="create", manifest={"kind": "ResourceQuota", "metadata": meta}),
        plan.Change(verb="refuse", manifest={"kind": "NetworkPolicy", "metadata": meta}, fields=("it is there",)),
    ]
    with pytest.raises(Refused, match="NetworkPolicy n/x: it is there"):
        plan.apply(kube(Cluster()), changes)


@pytest.mark.parametrize("name", SITES)
def test_the_launcher_is_bound_by_the_baseline_and_nowhere_else(name: str) -> None:
    """Bound in k8s/access too, it would fail for other tenants, and the baseline would meet a binding that isn't its own."""
    site = load_site(name)
    namespaces = {t.namespace for t in site.tenants.values()}
    for path in sorted((ROOT / "k8s" / "access").glob("*.yaml")):
        found = [d["metadata"].get("namespace") for d in yaml.safe_load_all(path.read_text())]
        assert namespaces.isdisjoint(found), path.name
    for tenant in site.tenants.values():
        bindings = [o["roleRef"]["name"] for o in manifests.render(site, tenant) if o["kind"] == "RoleBinding"]
        assert bindings.count("forja-launcher") == 1
