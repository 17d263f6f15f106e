"""The DAGs run in the real task runner; only the stages' processes are stand-ins (see fake_stage.py)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forja import receipts
from forja.lake import Lake

CHAIN = ("transform", "train", "register", "optimize", "gate", "release")


@pytest.fixture(scope="module")
def bag(airflow_home: Path) -> Any:
    from airflow.dag_processing.dagbag import DagBag

    return DagBag(dag_folder=str(Path(__file__).resolve().parents[2] / "dags"))


def run(bag: Any, name: str, **options: Any) -> dict[str, list[Any]]:
    """Task instances of one run, by task."""
    dag = bag.dags[name]
    for task in dag.tasks:
        task.retry_delay = task.retry_delay * 0
    ended = dag.test(**options)
    found: dict[str, list[Any]] = {}
    for instance in ended.get_task_instances():
        found.setdefault(instance.task_id, []).append(instance)
    return found


def states(tasks: dict[str, list[Any]]) -> dict[str, set[str]]:
    return {name: {str(i.state) for i in items} for name, items in tasks.items()}


def xcom(instance: Any, key: str) -> Any:
    return instance.xcom_pull(task_ids=instance.task_id, key=key, map_indexes=instance.map_index)


def test_chain_then_adoption(bag: Any, place: Path, raw: str) -> None:
    first = run(bag, "digits")
    assert states(first) == {name: {"success"} for name in ("admit", *CHAIN)}
    assert len(first["optimize"]) == 3
    lake = Lake(str(place / "state" / "lake"))
    left = [p for p in lake.list("vision/digits") if "/receipt" in p]
    assert len(left) == len(CHAIN) + 2
    transform = receipts.load(lake, next(p for p in left if "/transform/" in p))
    assert transform.inputs["raw"][0].ref == raw

    (train,) = first["train"]
    facts = xcom(train, "facts")
    assert facts["adopted"] is False
    assert 0 < facts["ended"] - facts["spawned"] < 30
    assert xcom(train, "return_value") == next(p for p in left if "/train/" in p)
    assert xcom(train, "_link_ReceiptLink") == f"/forja/receipts/{xcom(train, 'return_value')}"
    assert xcom(train, "_link_ReportLink").endswith("/receipt.json#report")
    assert xcom(train, "_link_MlflowLink").endswith("/#/runs/abc123")
    (gate,) = first["gate"]
    assert xcom(gate, "_link_ReportLink") == f"/forja/report/{xcom(gate, 'return_value')}"

    again = run(bag, "digits")
    assert states(again) == states(first)
    assert [p for p in lake.list("vision/digits") if "/receipt" in p] == left
    for verb in CHAIN:
        assert all(xcom(i, "facts")["adopted"] for i in again[verb]), verb
    # Memoised work starts no process; stages that look at the world each time do, and find it unchanged.
    spawned = {verb for verb in CHAIN if xcom(again[verb][0], "facts")["spawned"] is not None}
    assert spawned == {"register", "release"}


def test_ingest_announces_a_version_once(bag: Any, raw: str, append: Callable[[int], str]) -> None:
    assert states(run(bag, "digits_ingest")) == {"ingest": {"success"}}
    assert states(run(bag, "digits_ingest")) == {"ingest": {"skipped"}}
    append(2)
    assert states(run(bag, "digits_ingest")) == {"ingest": {"success"}}


@pytest.mark.parametrize(
    ("behaviour", "tries"),
    [
        pytest.param("exit:2", 1, id="bad input is not tried again"),
        pytest.param("exit:6", 1, id="damaged is not tried again"),
        pytest.param("refuse", 1, id="refused is not tried again"),
    ],
)
def test_exit_status_that_no_retry_mends(
    bag: Any, place: Path, raw: str, monkeypatch: pytest.MonkeyPatch, behaviour: str, tries: int
) -> None:
    monkeypatch.setenv("FAKE_STAGE", f"transform={behaviour}")
    tasks = run(bag, "digits")
    (transform,) = tasks["transform"]
    assert (str(transform.state), transform.try_number) == ("failed", tries)
    assert states(tasks)["release"] == {"upstream_failed"}


@pytest.mark.parametrize("behaviour", ["exit:4", "exit:5", "exit:1"])
def test_exit_status_that_a_retry_may_mend(bag: Any, place: Path, raw: str, monkeypatch: pytest.MonkeyPatch, behaviour: str) -> None:
    monkeypatch.setenv("FAKE_STAGE", f"transform={behaviour}")
    tasks = run(bag, "digits")
    assert str(tasks["transform"][0].state) == "up_for_retry" or tasks["transform"][0].try_number == 3


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["starting", "BadInput: no such class", "Epoch: 3"], "BadInput: no such class"),
        (["Loss: 0.3", "Epoch: 3"], "Epoch: 3"),
        (
            ["Traceback (most recent call last):", "torch.cuda.OutOfMemoryError: 3 GiB", "Rank: 1 ended"],
            "torch.cuda.OutOfMemoryError: 3 GiB",
        ),
        (["ValueError: first", "Unavailable: then"], "Unavailable: then"),
        (["MemoryError", "Epoch: 4"], "MemoryError"),
        (["Conflict: taken", "UserWarning: deprecated", "ErrorRate: 0.1"], "Conflict: taken"),
    ],
)
def test_reason_is_the_last_error_and_not_any_word_with_a_colon(lines: list[str], reason: str) -> None:
    from forja_airflow.said import why

    found = ""
    for line in lines:
        found = why(found, line)
    assert found == reason


def test_log_has_the_stages_lines(bag: Any, place: Path, raw: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "forja.stage")
    run(bag, "digits_ingest")
    lines = [r.getMessage() for r in caplog.records if r.name == "forja.stage"]
    assert lines[0] == "./forja stage ingest --recipe digits"
    assert lines[-1].startswith("receipt vision/digits/ingest/")


@pytest.mark.parametrize(
    ("conf", "state"),
    [
        pytest.param({"raw": "vision/digits/raw@0"}, "success", id="a version by hand"),
        pytest.param({"raw": "vision/digits/raw@99"}, "failed", id="no such version"),
    ],
)
def test_raw_by_hand(bag: Any, place: Path, raw: str, conf: dict[str, str], state: str) -> None:
    assert states(run(bag, "digits", run_conf=conf, mark_success_pattern="|".join(CHAIN)))["admit"] == {state}
