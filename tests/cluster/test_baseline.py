"""The security baseline on the real cluster: green when it is there; a control that is taken away turns its verdict, and only its."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cluster import baseline_site
from cluster.baseline_site import IMAGE, TEAMS, install
from cluster.kit.node import Node

from forja import kube as k8s
from forja.baseline import admission, manifests, plan, pods, policies, report
from forja.baseline.probes import CONTROLS, Verdict
from forja.errors import Refused
from forja.kube import Kube
from forja.sites import Site

PASS, FAIL, OPEN = Verdict.PASS, Verdict.FAIL, Verdict.NOT_PROVEN
ENFORCE = "pod-security.kubernetes.io/enforce"
GREEN = {team: dict.fromkeys(CONTROLS, PASS) for team in TEAMS}


@pytest.fixture(scope="module")
def bare(kube: Kube) -> Iterator[Site]:
    """Two tenants' namespaces without a baseline."""
    with baseline_site.bare(kube) as site:
        yield site


@pytest.fixture(scope="module")
def site(kube: Kube, bare: Site) -> Site:
    """The same with a baseline; a test that breaks it mends it."""
    install(kube, bare, adopt=True)
    return bare


def table(found: report.Report) -> dict[str, dict[str, Verdict]]:
    """Verdicts; on a surprise pytest shows the report's lines."""
    print("\n".join(found.lines()))
    return found.table


def red(*cells: tuple[str, str, Verdict]) -> dict[str, dict[str, Verdict]]:
    """All green but these."""
    found = {team: dict(row) for team, row in GREEN.items()}
    for team, control, verdict in cells:
        found[team][control] = verdict
    return found


def failed(found: report.Report, team: str, control: str) -> set[str]:
    """Names of the probes that didn't pass."""
    return {f.probe.name for f in found.findings if (f.probe.team, f.probe.control) == (team, control) and f.verdict is not PASS}


def test_without_a_baseline_everything_gets_through(kube: Kube, bare: Site) -> None:
    found = report.prove(kube, bare)
    assert table(found) == {team: dict.fromkeys(CONTROLS, FAIL) for team in TEAMS}
    through = {f.probe.name for f in found.findings if f.probe.control == "network" and f.probe.refused and f.verdict is FAIL}
    refused = {f.probe.name for f in found.findings if f.probe.control == "network" and f.probe.refused}
    assert through == refused, "reached before the policies are there: what blocks later is the policies"


def test_namespaces_of_others_are_not_taken_over(kube: Kube) -> None:
    with baseline_site.bare(kube) as site:
        changes = plan.plan(kube, site)
        assert [c.name for c in changes if c.verb == "refuse"] == [f"Namespace {t.namespace}" for t in site.tenants.values()]
        with pytest.raises(Refused, match=r"no label forja\.dev/tenant"):
            plan.apply(kube, changes)
        for tenant in site.tenants.values():
            assert list(plan.owned(kube, tenant.namespace)) == [], "it is all or nothing"


def test_green_and_nothing_left_behind(kube: Kube, site: Site) -> None:
    found = report.prove(kube, site)
    assert table(found) == GREEN
    assert {f.probe.control for f in found.findings} == set(CONTROLS)
    assert found.server.startswith("v1.")
    until(lambda: not [p for ns in baseline_site.namespaces(site) for p in kube.list("Pod", ns, labels=pods.LABEL)])


def test_applied_twice_changes_nothing(kube: Kube, site: Site) -> None:
    before = versions(kube, site)
    assert install(kube, site) == []
    assert versions(kube, site) == before


def versions(kube: Kube, site: Site) -> dict[str, str]:
    """Resource version of every object of the baseline."""
    found = [o for t in site.tenants.values() for o in plan.owned(kube, t.namespace)]
    found += [n for t in site.tenants.values() if (n := kube.get("Namespace", t.namespace))]
    assert len(found) == 2 * 15
    return {f"{o['kind']} {o['metadata'].get('namespace')}/{o['metadata']['name']}": o["metadata"]["resourceVersion"] for o in found}


def label(value: str | None, key: str = ENFORCE) -> Callable[[Kube, str], object]:
    return lambda kube, ns: kube.patch("Namespace", ns, {"metadata": {"labels": {key: value}}})


def weakened(kube: Kube, ns: str) -> None:
    kube.patch("Namespace", ns, {"metadata": {"labels": {ENFORCE: None, "pod-security.kubernetes.io/warn": "restricted"}}})


def opened(kube: Kube, ns: str) -> None:
    kube.patch("NetworkPolicy", "forja-models", {"spec": {"ingress": [{"ports": [{"port": 8000}]}]}}, ns)


def opened_by_default(direction: str) -> Callable[[Kube, str], object]:
    return lambda kube, ns: kube.patch("NetworkPolicy", "forja-default-deny", {"spec": {direction: [{}]}}, ns)


def dropped(kind: str, name: str) -> Callable[[Kube, str], object]:
    return lambda kube, ns: kube.delete(kind, name, ns)


def quota(**hard: str | None) -> Callable[[Kube, str], object]:
    change = {"spec": {"hard": {f"requests.nvidia.com/{k}": v for k, v in hard.items()}}}
    return lambda kube, ns: kube.patch("ResourceQuota", "forja-gpu", change, ns)


Mutation = Callable[[Kube, str], object]
MUTATIONS: Mapping[str, tuple[tuple[str, str, Mutation], ...]] = {
    # Two at once, of different tenants and controls: each turns its own cell and no other.
    "label off, quota deleted": (("a", "pod-security", label(None)), ("b", "gpu-quota", dropped("ResourceQuota", "forja-gpu"))),
    "enforce becomes warn, quota raised": (("b", "pod-security", weakened), ("a", "gpu-quota", quota(gpu="3"))),
    "default deny deleted, a MIG resource no longer named": (
        ("a", "network", dropped("NetworkPolicy", "forja-default-deny")), ("b", "gpu-quota", quota(**{"mig-1g.10gb": None})),
    ),
    "models open to all, a lower standard": (
        ("b", "network", opened), ("a", "pod-security", label("baseline")),
    ),
    "DNS no longer allowed, quota lowered": (
        ("a", "network", dropped("NetworkPolicy", "forja-dns")), ("b", "gpu-quota", quota(gpu="0")),
    ),
    "all may come in by a rule more, load balancers": (
        ("a", "network", opened_by_default("ingress")),
        ("b", "gpu-quota", lambda kube, ns: kube.patch(
            "ResourceQuota", "forja-objects", {"spec": {"hard": {"services.loadbalancers": None}}}, ns)),
    ),
    "all may go out by a rule more": (("b", "network", opened_by_default("egress")),),
}  # fmt: skip


def known(kube: Kube, site: Site, team: str, control: str) -> bool:
    """Whether admission has heard of a change to one of its controls: it works with copies that are a moment old."""
    make = {"pod-security": admission.pod_security, "gpu-quota": admission.gpu_quota}.get(control)
    return make is None or any(f.verdict is FAIL for f in admission.run(make(kube, site, site.tenants[team], IMAGE), settle_s=0))


@pytest.mark.parametrize("case", MUTATIONS, ids=str)
def test_a_control_taken_away_turns_its_verdict_and_only_its(kube: Kube, site: Site, case: str) -> None:
    for team, control, mutate in MUTATIONS[case]:
        mutate(kube, site.tenants[team].namespace)
        until(lambda team=team, control=control: known(kube, site, team, control))
    try:
        assert table(report.prove(kube, site)) == red(*((team, control, FAIL) for team, control, _ in MUTATIONS[case]))
    finally:
        mended = install(kube, site)
    assert len(mended) == len(MUTATIONS[case]), "drift is seen, and mended"
    assert install(kube, site) == []


def test_a_policy_of_others_opens_everything_and_stays(kube: Kube, site: Site) -> None:
    namespace = site.tenants["b"].namespace
    everything: dict[str, Any] = {
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "open", "namespace": namespace},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [{}], "egress": [{}]},
    }  # fmt: skip
    kube.create(everything)
    try:
        assert install(kube, site) == []
        found = report.prove(kube, site)
        assert table(found) == red(("b", "network", FAIL))
        assert kube.get("NetworkPolicy", "open", namespace) is not None
        # What only the neighbour's policies can hold back, they do.
        assert failed(found, "b", "network").isdisjoint({"b release to a model:8000", "b gang to a model:9999"})
    finally:
        kube.delete("NetworkPolicy", "open", namespace)


DOORS: Mapping[str, dict[str, Any]] = {
    "out to any web server": {
        "policyTypes": ["Egress"],
        "egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": [{"port": 443}]}],
    },
    "in on a port that nobody tries": {"policyTypes": ["Ingress"], "ingress": [{"ports": [{"port": 8002}]}]},
}


def test_a_door_that_no_call_tries_is_seen(kube: Kube, site: Site) -> None:
    for team, (name, spec) in zip(TEAMS, DOORS.items(), strict=True):
        meta = {"name": f"door-{team}", "namespace": site.tenants[team].namespace, "annotations": {"what": name}}
        kube.create({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta, "spec": {"podSelector": {}, **spec},
        })  # fmt: skip
    try:
        found = report.prove(kube, site)
        assert table(found) == red(("a", "network", FAIL), ("b", "network", FAIL))
        for team in TEAMS:
            assert failed(found, team, "network") == {policies.NAME}, "no call finds it"
        said = {f.probe.team: f.answer.said for f in found.findings if f.probe.name == policies.NAME}
        assert all(f"door-{team} is unknown" in said[team] for team in TEAMS)
    finally:
        for team in TEAMS:
            kube.delete("NetworkPolicy", f"door-{team}", site.tenants[team].namespace)


def test_policies_where_the_calls_come_from_are_not_taken_for_the_tenants(kube: Kube, site: Site) -> None:
    """Out of the gateway's namespace to 8000 alone, out of the probes' to DNS and what tenants may reach."""
    assert site.gateway is not None and site.baseline is not None  # noqa: PT018
    dns = {
        "to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}],
        "ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")],
    }
    egress = {
        site.gateway.namespace: [{"ports": [{"protocol": "TCP", "port": 8000}]}],
        site.baseline.probe_namespace: [dns, *map(manifests.rule, site.baseline.allow)],
    }
    for namespace, rules in egress.items():
        kube.create({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "out", "namespace": namespace},
            "spec": {"podSelector": {}, "policyTypes": ["Egress"], "egress": rules},
        })  # fmt: skip
    try:
        found = report.prove(kube, site)
    finally:
        for namespace in egress:
            kube.delete("NetworkPolicy", "out", namespace)
    assert table(found) == red(*((team, "network", OPEN) for team in TEAMS))
    for team in TEAMS:
        assert failed(found, team, "network") == {
            f"gateway to {team} model:9999", f"outside to {team} model:8000", f"outside to {team} pod:8000",
            f"{team} gang to elsewhere:8000", f"{team} release to elsewhere:8000",
        }  # fmt: skip


def test_a_quota_that_was_raised_while_gpus_are_in_use_is_seen(kube: Kube, site: Site) -> None:
    """By as many as are in use: one more than the grant would still be refused."""
    tenant = site.tenants["a"]
    pod = admission.restricted_pod("user", tenant.namespace, IMAGE)
    pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = "2"
    pod["spec"]["schedulingGates"] = [{"name": "forja.dev/never"}]  # it counts, and needs no GPU
    kube.create(pod)
    try:
        green = {f.verdict for f in admission.run(admission.gpu_quota(kube, site, tenant, IMAGE))}
        assert green == {PASS}, "in use, and as granted"
        quota(gpu="4")(kube, tenant.namespace)
        until(lambda: known(kube, site, "a", "gpu-quota"))
        found = {f.probe.name: f.verdict for f in admission.run(admission.gpu_quota(kube, site, tenant, IMAGE))}
        assert {name for name, verdict in found.items() if verdict is FAIL} == {"one more than is left of gpu"}
    finally:
        kube.delete("Pod", "user", tenant.namespace, grace_s=0)
        install(kube, site)


def test_a_tenant_that_left_the_site_file_is_told(kube: Kube, site: Site) -> None:
    fewer = dataclasses.replace(site, tenants={"a": site.tenants["a"]})
    (line,) = [line for line in plan.left(kube, fewer) if site.tenants["b"].namespace in line]
    assert "[tenants.b]" in line
    assert not [line for line in plan.left(kube, site) if site.tenants["b"].namespace in line]
    assert plan.plan(kube, fewer) == [], "apply goes on"


def test_what_is_no_longer_wanted_is_deleted(kube: Kube, site: Site) -> None:
    assert site.baseline is not None
    fewer = dataclasses.replace(site, baseline=dataclasses.replace(site.baseline, allow=site.baseline.allow[:1]))
    gone = [f"delete NetworkPolicy {t.namespace}/forja-platform-release" for t in site.tenants.values()]
    assert install(kube, fewer) == gone
    assert install(kube, fewer) == []
    assert len(install(kube, site)) == 2


def test_an_image_that_is_not_there_proves_nothing(kube: Kube, site: Site) -> None:
    found = report.prove(kube, site, image="10.99.0.1:9/none:1")
    assert table(found) == red(("a", "network", OPEN), ("b", "network", OPEN))
    said = {f.answer.said for f in found.findings if f.probe.control == "network"}
    assert any("ErrImage" in s or "ImagePull" in s for s in said)
    assert found.verdict is OPEN


def test_a_target_that_is_down_proves_nothing(kube: Kube, site: Site) -> None:
    assert site.baseline is not None
    with baseline_site.listener() as port:
        pass  # closed again
    lake, api = site.baseline.allow
    down = dataclasses.replace(lake, address=f"10.99.0.1:{port}")
    found = report.prove(kube, dataclasses.replace(site, baseline=dataclasses.replace(site.baseline, allow=(down, api))), "a")
    assert table(found) == {"a": {**GREEN["a"], "network": OPEN}}
    assert failed(found, "a", "network") == {f"a gang to 10.99.0.1:{port}"}


def test_an_api_server_that_is_away_proves_nothing(site: Site, tmp_path: Path) -> None:
    config = tmp_path / "config"
    cluster, user, context = {"server": "https://127.0.0.1:9"}, {"token": "t"}, {"cluster": "c", "user": "u"}
    config.write_text(json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "x", "contexts": [{"name": "x", "context": context}],
        "clusters": [{"name": "c", "cluster": cluster}], "users": [{"name": "u", "user": user}],
    }))  # fmt: skip
    found = report.prove(k8s.connect(config), site)
    assert found.table == {team: dict.fromkeys(CONTROLS, OPEN) for team in TEAMS}


def test_without_the_right_to_create_pods_nothing_is_proven(kube: Kube, site: Site) -> None:
    nobody = kube.impersonating("nobody")
    found = report.prove(nobody, site)
    assert found.table == {team: dict.fromkeys(CONTROLS, OPEN) for team in TEAMS}, "403 of RBAC is not the control's"


def test_without_an_enforcer_no_network_verdict_passes(kube: Kube, site: Site, node: Node) -> None:
    node.stop("netpold")
    try:
        found = report.prove(kube, site)
    finally:
        node.again("netpold")
    until(lambda: node.pid("netpold"))
    assert table(found) == red(("a", "network", FAIL), ("b", "network", FAIL)), "the policies are there, and nothing enforces them"


def test_pods_of_a_killed_proof_are_deleted_by_the_next(kube: Kube, site: Site) -> None:
    namespace = site.tenants["a"].namespace
    left = admission.restricted_pod("left", namespace, IMAGE)
    left["metadata"]["labels"] = {pods.LABEL: "gone"}
    left["spec"]["containers"][0]["command"] = ["python3", "-c", "pass"]
    kube.create(left)
    until(lambda: (kube.get("Pod", "left", namespace) or {})["status"]["phase"] == "Succeeded")
    pods.sweep(kube, namespace)
    assert kube.get("Pod", "left", namespace) is not None, "it may be of a proof that runs now"
    until(lambda: pods.sweep(kube, namespace, older_s=1) or kube.get("Pod", "left", namespace) is None)


def test_removed_leaves_nothing_and_turns_red(kube: Kube, site: Site) -> None:
    kept = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "mine", "namespace": site.tenants["a"].namespace}}
    kube.create(kept)
    assert len(plan.remove(kube, site)) == 2 * 15
    for tenant in site.tenants.values():
        assert list(plan.owned(kube, tenant.namespace)) == []
        live = kube.get("Namespace", tenant.namespace)
        assert live is not None
        assert list(live["metadata"]["labels"]) == ["kubernetes.io/metadata.name"]
    assert kube.get("ConfigMap", "mine", site.tenants["a"].namespace) is not None
    assert plan.remove(kube, site) == []
    assert {v for row in report.prove(kube, site).table.values() for v in row.values()} == {FAIL}
    install(kube, site, adopt=True)
    plan.remove(kube, site, namespaces=True)
    until(lambda: not any(kube.get("Namespace", t.namespace) for t in site.tenants.values()))


def until(done: Callable[[], object], seconds: float = 60) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.3)
