"""The DAG security_baseline through Airflow's scheduler, with its own account's token: mended and green, or red and failed."""

from __future__ import annotations

import json
from typing import Any

from cluster.baseline_site import install
from cluster.platform import Platform

from forja.baseline.probes import CONTROLS
from forja.services import airflow_api

DAG = "security_baseline"
STEPS = ("assert_before", "plan", "apply", "assert_after")
GREEN = {team: dict.fromkeys(CONTROLS, "pass") for team in ("maintenance", "vision")}


def run(platform: Platform) -> tuple[str, str, dict[str, Any]]:
    """A run, how it ended, and its tasks."""
    name = platform.trigger(DAG)
    ended = platform.wait(DAG, name, 400)
    return name, ended, dict(platform.tasks(DAG, name))


def quiet(platform: Platform) -> None:
    """Wait for the end of the run that a fresh Airflow starts by itself, as the schedule says: it would mend what a test breaks."""
    platform.airflow.wait_for_dag(DAG)

    def ended() -> bool:
        runs = platform.airflow._ask("GET", f"/api/v2/dags/{DAG}/dagRuns", params={"limit": 100})["dag_runs"]
        return any(r["run_type"] == "scheduled" for r in runs) and all(r["state"] in airflow_api.ENDED for r in runs)

    platform.until("the scheduled run to end", ended, 400)


def facts(platform: Platform, name: str, task: str) -> Any:
    return platform.airflow.xcom(DAG, name, platform.tasks(DAG, name)[task], "facts")


def test_drift_is_shown_and_mended(platform: Platform) -> None:
    quiet(platform)
    install(platform.kube, platform.site, adopt=True)
    vision, maintenance = (platform.site.tenants[team].namespace for team in ("vision", "maintenance"))
    assert platform.kube.delete("NetworkPolicy", "forja-default-deny", vision)
    assert platform.kube.delete("ResourceQuota", "forja-gpu", maintenance)
    name, ended, tasks = run(platform)
    print(platform.log(DAG, name, "assert_after"))
    assert (ended, {step: tasks[step].state for step in STEPS}) == ("success", dict.fromkeys(STEPS, "success"))

    before, after = (facts(platform, name, task) for task in ("assert_before", "assert_after"))
    red = {"maintenance": {**GREEN["maintenance"], "gpu-quota": "fail"}, "vision": {**GREEN["vision"], "network": "fail"}}
    assert (before["table"], after["table"]) == (red, GREEN)
    mended = [f"create NetworkPolicy {vision}/forja-default-deny", f"create ResourceQuota {maintenance}/forja-gpu"]
    for task in ("plan", "apply"):
        assert sorted(f"{c['verb']} {c['object']}" for c in facts(platform, name, task)) == sorted(mended)
        assert f"+ NetworkPolicy {vision}/forja-default-deny" in platform.log(DAG, name, task)
    record = json.loads(platform.lake.get(after["record"]))
    assert (record["verdict"], record["table"]) == ("pass", GREEN)
    assert all(probe["said"] for probe in record["probes"])


def test_what_it_may_not_mend_fails_the_run(platform: Platform) -> None:
    install(platform.kube, platform.site, adopt=True)
    namespace = platform.site.tenants["maintenance"].namespace
    platform.kube.create({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "open", "namespace": namespace},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{}]},
    })  # fmt: skip
    try:
        name, ended, tasks = run(platform)
    finally:
        platform.kube.delete("NetworkPolicy", "open", namespace)
    assert (ended, {step: tasks[step].state for step in STEPS}) == ("failed", {**dict.fromkeys(STEPS, "success"), "assert_after": "failed"})
    assert tasks["assert_after"].tries == 1, "what fails is not tried again"
    assert "maintenance network: fail" in platform.log(DAG, name, "assert_after")
    assert facts(platform, name, "assert_after")["table"] == {**GREEN, "maintenance": {**GREEN["maintenance"], "network": "fail"}}
