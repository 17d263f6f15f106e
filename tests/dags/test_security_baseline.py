"""The DAG security_baseline in the real task runner: what each verdict does to a run. Only the cluster's answers are stand-ins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forja.baseline import plan, report
from forja.baseline.plan import Change
from forja.baseline.probes import CONTROLS, Answer, Finding, Outcome, Probe, Verdict
from forja.errors import Refused
from forja.lake import Lake
from forja.sites import Site
from forja_airflow import clusters


@pytest.fixture
def dag(airflow_home: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from airflow.dag_processing.dagbag import DagBag

    monkeypatch.setenv("FORJA_SITE", "small-cluster")
    monkeypatch.setattr(clusters, "connect", lambda conn_id: conn_id)
    found = DagBag(dag_folder=str(Path(__file__).resolve().parents[2] / "dags")).dags["security_baseline"]
    for task in found.tasks:
        task.retry_delay = task.retry_delay * 0
    return found


def proof(verdict: Verdict) -> report.Report:
    answer = Answer(outcome=Outcome.REFUSED, said="create Pod: 403 Forbidden")
    findings = [
        Finding(
            probe=Probe(team="vision", control=control, name="a pod", refused=True), answer=answer, why="so",
            verdict=verdict if control == "network" else Verdict.PASS,
        )
        for control in CONTROLS
    ]  # fmt: skip
    return report.Report(site="small-cluster", server="v1", started="2026-01-01T00:00:00+00:00", seconds=1.0, findings=tuple(findings))


def stand_in(monkeypatch: pytest.MonkeyPatch, verdicts: Iterator[Verdict], refused: bool = False) -> list[str]:
    """Proofs that give these verdicts one after the other; what was done to the cluster."""
    done: list[str] = []
    missing = Change(verb="create", manifest={"kind": "Namespace", "metadata": {"name": "forja-vision"}})

    def apply(kube: Any, changes: list[Change]) -> None:
        assert (kube, changes) == ("forja_baseline", [missing])
        if refused:
            raise Refused("the baseline can't be applied to Namespace forja-vision")
        done.append("apply")

    def prove(kube: Any, site: Site) -> report.Report:
        done.append("assert")
        return proof(next(verdicts))

    monkeypatch.setattr(plan, "plan", lambda kube, site: [missing])
    monkeypatch.setattr(plan, "apply", apply)
    monkeypatch.setattr(report, "prove", prove)
    return done


def states(dag: Any) -> dict[str, Any]:
    return {i.task_id: i for i in dag.test().get_task_instances()}


PASS, FAIL, OPEN = Verdict.PASS, Verdict.FAIL, Verdict.NOT_PROVEN
RUNS = {
    # verdicts of assert_before and assert_after: what becomes of assert_after
    "red before, green after": ([FAIL, PASS], "success"),
    "not proven before, green after": ([OPEN, PASS], "success"),
    "red after": ([PASS, FAIL], "failed"),
}


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_only_the_last_proof_decides(dag: Any, case: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts, state = RUNS[case]
    done = stand_in(monkeypatch, iter(verdicts))
    tasks = states(dag)
    assert {name: str(i.state) for name, i in tasks.items()} == {
        "assert_before": "success", "plan": "success", "apply": "success", "assert_after": state,
    }  # fmt: skip
    assert done == ["assert", "apply", "assert"]
    facts = [tasks[t].xcom_pull(task_ids=t, key="facts") for t in ("assert_before", "assert_after")]
    assert [f["table"]["vision"]["network"] for f in facts] == [v.value for v in verdicts]
    lake = Lake(str(place / "state" / "lake"))
    records = list(lake.list("platform/baseline"))
    assert sorted(f["record"] for f in facts) == records
    probes = json.loads(lake.get(facts[1]["record"]))["probes"]
    assert {p["said"] for p in probes} == {"create Pod: 403 Forbidden"}
    plans = [tasks[t].xcom_pull(task_ids=t, key="facts") for t in ("plan", "apply")]
    assert plans == [[{"verb": "create", "object": "Namespace forja-vision", "fields": []}]] * 2


def test_not_proven_is_tried_again_and_fails_in_the_end(dag: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = stand_in(monkeypatch, iter([PASS, OPEN, OPEN]))
    after = states(dag)["assert_after"]
    assert str(after.state) in ("up_for_retry", "failed")
    assert done[:3] == ["assert", "apply", "assert"]


def test_what_fails_is_not_tried_again(dag: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = stand_in(monkeypatch, iter([PASS, FAIL]))
    after = states(dag)["assert_after"]
    assert (str(after.state), after.try_number, done.count("assert")) == ("failed", 1, 2)


def test_objects_of_others_stop_the_run(dag: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = stand_in(monkeypatch, iter([FAIL]), refused=True)
    tasks = states(dag)
    assert {name: str(i.state) for name, i in tasks.items()} == {
        "assert_before": "success", "plan": "success", "apply": "failed", "assert_after": "upstream_failed",
    }  # fmt: skip
    assert done == ["assert"]


def test_a_site_without_tenants_has_nothing_to_secure(dag: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = stand_in(monkeypatch, iter([]))
    monkeypatch.setenv("FORJA_SITE", "local")
    assert {str(i.state) for i in states(dag).values()} == {"skipped"}
    assert done == []
