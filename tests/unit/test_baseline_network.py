"""Who calls whom in the proof of the network, and what a policy of other namespaces than the tenants' makes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from forja.baseline import network
from forja.baseline.network import Call, Server
from forja.baseline.probes import Answer, Outcome, Verdict, judge, worst
from forja.sites import Site, load_site


@pytest.fixture
def site() -> Site:
    return load_site("small-cluster")


def network_verdicts(site: Site, *silent: Callable[[str], bool]) -> dict[str, Verdict]:
    """Verdicts of a proof in which all came out as it must, but the calls whose names match got no answer."""
    scene = network.scene(site, ["vision"])
    answers = {s.ready: Answer(outcome=Outcome.SUCCEEDED, said="ready") for s in scene.servers}
    for call in scene.calls:
        no = call.refused or any(match(call.name) for match in silent)
        answers[call.name] = Answer(outcome=Outcome.REFUSED if no else Outcome.SUCCEEDED, said="no answer" if no else "connected")
    return {p.name: judge(p, answers).verdict for p in scene.probes}


def test_a_proof_that_came_out_as_it_must_passes(site: Site) -> None:
    assert set(network_verdicts(site).values()) == {Verdict.PASS}


def test_who_cannot_leave_its_namespace_shows_no_path(site: Site) -> None:
    """The listener is up, but what holds outside's calls back may be a policy of its own namespace."""
    found = network_verdicts(site, lambda name: name == "outside to gateway pod:8000")
    assert found["outside to vision pod:8000"] is Verdict.NOT_PROVEN
    assert found["outside to vision model:8000"] is Verdict.NOT_PROVEN


def test_what_only_its_own_namespace_reaches_shows_no_path(site: Site) -> None:
    found = network_verdicts(site, lambda name: name == "gateway to elsewhere:8000")
    assert found["vision gang to elsewhere:8000"] is Verdict.NOT_PROVEN
    assert found["vision release to elsewhere:8000"] is Verdict.NOT_PROVEN


def test_who_reaches_a_port_nowhere_shows_no_path_to_it(site: Site) -> None:
    found = network_verdicts(site, lambda name: name == "gateway to elsewhere:9999")
    assert found["gateway to vision model:9999"] is Verdict.NOT_PROVEN
    assert found["vision gang to elsewhere:8000"] is Verdict.PASS, "of another port"


Holds = Callable[[Call], bool]
"""Whether some policy keeps a call from getting through."""


def into(call: Call) -> str:
    """Namespace of what is called; empty when it is no pod of ours."""
    return call.host.namespace if isinstance(call.host, Server) else ""


def known(call: Call, site: Site) -> bool:
    """Whether DNS is asked, or what the site file lets tenants reach."""
    assert site.baseline is not None
    return not call.port or f"{call.host}:{call.port}" in {a.address for a in site.baseline.allow}


OTHERS: dict[str, Callable[[Site], Holds]] = {
    "none": lambda site: lambda call: False,
    "out of the gateway's namespace to 8000 alone": lambda site: lambda c: c.client.namespace == "forja-gateway" and c.port != 8000,
    "nothing out of the gateway's namespace": lambda site: lambda c: c.client.namespace == "forja-gateway",
    "nothing into the gateway's namespace": lambda site: lambda c: into(c) == "forja-gateway",
    "out of forja-probe to what tenants may reach": lambda site: lambda c: c.client.namespace == "forja-probe" and not known(c, site),
    "out of forja-probe to DNS alone": lambda site: lambda c: c.client.namespace == "forja-probe" and bool(c.port),
    "nothing into forja-probe": lambda site: lambda c: into(c) == "forja-probe",
    "into forja-probe from itself alone": lambda site: lambda c: into(c) == "forja-probe" != c.client.namespace,
    "into forja-probe on 8000 alone": lambda site: lambda c: into(c) == "forja-probe" and c.port != 8000,
}
"""Policies that aren't the tenants', in the namespaces that the proof calls from and to."""


def proof(site: Site, holds: Holds) -> dict[tuple[str, bool], Verdict]:
    """Verdicts by name of the probe and whether it must be refused, of a proof in which ``holds`` alone decides what gets through."""
    scene = network.scene(site, sorted(site.tenants))
    answers = {s.ready: Answer(outcome=Outcome.SUCCEEDED, said="ready") for s in scene.servers}
    for call in scene.calls:
        held = holds(call)
        answers[call.name] = Answer(outcome=Outcome.REFUSED if held else Outcome.SUCCEEDED, said="no answer" if held else "connected")
    return {(p.name, p.refused): judge(p, answers).verdict for p in scene.probes}


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_no_policy_of_other_namespaces_is_taken_for_the_tenants(site: Site, case: str) -> None:
    """Nothing enforces the tenants' policies: whatever is kept from getting through, somebody else keeps it."""
    found = proof(site, OTHERS[case](site))
    wrong = [name for (name, refused), verdict in found.items() if refused and verdict is Verdict.PASS]
    assert wrong == []


@pytest.mark.parametrize("case", [case for case in OTHERS if case != "none"], ids=str)
def test_a_policy_of_other_namespaces_is_no_pass_beside_the_tenants_own(site: Site, case: str) -> None:
    others, names = OTHERS[case](site), {c.name for c in network.scene(site, sorted(site.tenants)).calls if c.refused}
    assert set(proof(site, lambda call: call.name in names).values()) == {Verdict.PASS}
    found = proof(site, lambda call: call.name in names or others(call))
    assert worst(found.values()) is not Verdict.PASS


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("outside to vision pod:8000", Verdict.PASS),
        ("vision gang to elsewhere:8000", Verdict.PASS),
        ("vision gang to models.forja-gateway.svc:80", Verdict.PASS),
        ("vision gang to kafka.forja.svc:9092", Verdict.NOT_PROVEN),
    ],
)
def test_a_rejection_counts_where_the_witness_shows_that_the_port_listens(site: Site, name: str, verdict: Verdict) -> None:
    """Of what must succeed it doesn't: it is no pod of ours, and may just have gone down."""
    scene = network.scene(site, ["vision"])
    probe = next(p for p in scene.probes if p.name == name)
    answers = {w: Answer(outcome=Outcome.SUCCEEDED, said="connected") for w in (*probe.witnesses, *probe.also)}
    answers[name] = Answer(outcome=Outcome.REFUSED, said="x: rejected, Connection refused")
    assert judge(probe, answers).verdict is verdict
    nothing = {**answers, **{w: Answer(outcome=Outcome.REFUSED, said="rejected") for w in probe.witnesses}}
    assert judge(probe, nothing).verdict is Verdict.NOT_PROVEN
