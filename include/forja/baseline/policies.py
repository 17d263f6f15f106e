"""The proof that a tenant's network policies are the baseline's, and no others.

Policies add up: one that somebody else made, or one rule more in one of ours, opens a door beside those that calls can try. So the policies
themselves are compared with the rendered ones.
"""

from __future__ import annotations

import json
from typing import Any

from forja.baseline import manifests
from forja.baseline.admission import Case
from forja.baseline.probes import Answer, Outcome, Probe
from forja.errors import ForjaError
from forja.kube import Kube, Object
from forja.sites import Site, Tenant

NAME = "the policies are the baseline's"
WRONG = "what policies allow adds up, and these are not as the baseline has them: look at each, delete it or run ./forja baseline apply"
DIFFERS = "not as rendered"


def cases(kube: Kube, site: Site, tenant: Tenant) -> list[Case]:
    """One probe that compares a tenant's policies with the rendered ones."""
    wanted = {o["metadata"]["name"]: _effect(o["spec"]) for o in manifests.render(site, tenant) if o["kind"] == "NetworkPolicy"}
    probe = Probe(team=tenant.team, control="network", name=NAME, refused=False, reason=DIFFERS, wrong=WRONG)

    def look() -> Answer:
        try:
            found = {p["metadata"]["name"]: _effect(p["spec"]) for p in kube.list("NetworkPolicy", tenant.namespace)}
        except ForjaError as error:
            return Answer(outcome=Outcome.ERRED, said=str(error))
        odd = [_told(name, wanted.get(name), found.get(name)) for name in sorted(wanted.keys() | found.keys())]
        said = "; ".join(line for line in odd if line)
        if said:
            return Answer(outcome=Outcome.REFUSED, said=f"{DIFFERS}: {said}")
        return Answer(outcome=Outcome.SUCCEEDED, said=f"all {len(found)} policies are as rendered: {', '.join(sorted(found))}")

    return [(probe, look)]


def _told(name: str, wanted: Object | None, found: Object | None) -> str:
    """What is wrong with one policy; empty when nothing is."""
    if wanted == found:
        return ""
    if found is None:
        return f"{name} is missing"
    return f"{name} is " + ("unknown" if wanted is None else "changed") + f": {json.dumps(found, sort_keys=True)[:200]}"


def _effect(spec: Object) -> dict[str, Any]:
    """What a policy does: rules of a direction that it isn't about do nothing, and no rules are the same as an empty list."""
    directions = spec.get("policyTypes") or ["Ingress", *(["Egress"] if spec.get("egress") else [])]
    rules = {direction: spec.get(direction.lower()) or [] for direction in sorted(directions)}
    return {"pods": spec.get("podSelector") or {}, **rules}
