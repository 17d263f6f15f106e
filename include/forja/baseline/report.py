"""The whole proof: every control of every tenant, with its evidence."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from forja.baseline import admission, manifests, network, pods, policies
from forja.baseline.probes import CONTROLS, Finding, Verdict, judge, worst
from forja.errors import ForjaError
from forja.kube import Kube
from forja.sites import Site

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was asked, what came back, and what is known now."""

    site: str
    server: str
    """Version of the API server; empty when it didn't answer."""
    started: str
    seconds: float
    findings: tuple[Finding, ...]

    @property
    def table(self) -> dict[str, dict[str, Verdict]]:
        """Verdict of each control of each tenant."""
        teams = sorted({f.probe.team for f in self.findings})
        return {
            t: {c: worst(f.verdict for f in self.findings if (f.probe.team, f.probe.control) == (t, c)) for c in CONTROLS} for t in teams
        }

    @property
    def verdict(self) -> Verdict:
        """Of all together."""
        return worst(v for row in self.table.values() for v in row.values())

    def lines(self, *, all_probes: bool = False) -> Iterator[str]:
        """The report as a person reads it: the table, and every probe that didn't pass, or all of them."""
        for team, row in self.table.items():
            for control, verdict in row.items():
                mine = [f for f in self.findings if (f.probe.team, f.probe.control) == (team, control)]
                passed = sum(f.verdict is Verdict.PASS for f in mine)
                yield f"{team:<16} {control:<13} {verdict.upper():<11} {passed} of {len(mine)} probes"
                for f in mine:
                    if all_probes or f.verdict is not Verdict.PASS:
                        must = "must be refused" if f.probe.refused else "must succeed"
                        yield f"    {f.verdict:<10} {f.probe.name} ({must}): {f.why}"
                        yield f"               {f.answer.said[:400]}"

    def facts(self) -> dict[str, Any]:
        """The report as JSON, whole."""
        return {
            "schema": SCHEMA, "site": self.site, "server": self.server, "started": self.started, "seconds": round(self.seconds, 2),
            "verdict": self.verdict.value, "table": {t: {c: v.value for c, v in row.items()} for t, row in self.table.items()},
            "probes": [{**dataclasses.asdict(f.probe), "verdict": f.verdict.value, "why": f.why, "outcome": f.answer.outcome.value,
                        "said": f.answer.said[:2000]} for f in self.findings],
        }  # fmt: skip


def prove(kube: Kube, site: Site, team: str = "", *, image: str = "") -> Report:
    """Ask every control of the tenants to refuse what it must, and to let through what it must.

    Nothing is installed or changed but the probes' pods, which are deleted again. An API server that is away, a pod that can't start or
    any other mishap is a probe that proves nothing, not an error.

    Args:
        team: of this tenant only; of all when empty.
        image: of the probes' pods; that of the site file when empty.

    Raises:
        BadInput: the site has no baseline, or no such tenant.
    """
    began, started = time.monotonic(), datetime.datetime.now(datetime.UTC)
    baseline, _ = manifests.parts(site)
    chosen = manifests.tenants(site, team)
    image = image or baseline.probe_image
    scene = network.scene(site, [t.team for t in chosen])
    asked = [make(kube, site, t, image) for t in chosen for make in (admission.pod_security, admission.gpu_quota)]
    asked += [policies.cases(kube, site, t) for t in chosen]
    with ThreadPoolExecutor(1 + len(asked)) as pool:
        dialled = pool.submit(pods.run, kube, scene, image)
        admitted = [finding for findings in pool.map(admission.run, asked) for finding in findings]
        answers = dialled.result()
    return Report(
        site=site.name, server=_version(kube), started=started.isoformat(timespec="seconds"), seconds=time.monotonic() - began,
        findings=(*admitted, *(judge(p, answers) for p in scene.probes)),
    )  # fmt: skip


def _version(kube: Kube) -> str:
    try:
        return str(kube.request("GET", "/version").get("gitVersion", ""))
    except ForjaError:
        return ""
