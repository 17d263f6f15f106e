"""What `./forja bench cluster` measures in the cluster's network: `python -m cluster.measure PART`; its last line is one JSON object."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from cluster import baseline_site, gangs, pod_pair
from cluster.kit.places import places
from cluster.platform import running

from forja import kube
from forja.baseline import report
from forja.baseline.probes import Verdict


def baseline() -> dict[str, Any]:
    """Seconds of one whole proof: two fresh tenants, three controls, all probes; nothing counts unless everything passes."""
    admin = kube.connect(places().kubeconfig)
    with baseline_site.bare(admin) as site:
        baseline_site.install(admin, site, adopt=True)
        began = time.monotonic()
        found = report.prove(admin, site)
        seconds = time.monotonic() - began
    assert found.verdict is Verdict.PASS, "\n".join(found.lines())
    return {"baseline_assert_s": round(seconds, 1), "baseline_probes": len(found.findings)}


def pod() -> dict[str, Any]:
    """See pod_pair.py."""
    with running() as platform:
        return pod_pair.measure(platform, say=say)


def gang() -> dict[str, Any]:
    """Seconds from kill -9 of a member to the first step of all after the restart: the worse of both members."""
    with running() as platform, gangs.tenant(platform):
        found = {f"member_{member}_s": round(gangs.measure(platform, member), 1) for member in (0, 1)}
    return {"gang_restart_s": max(found.values()), **found}


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


PARTS = {"baseline": baseline, "pod": pod, "gang": gang}


def main(part: str) -> None:
    """Measure one part."""
    print(json.dumps(PARTS[part]()))


if __name__ == "__main__":
    main(*sys.argv[1:])
