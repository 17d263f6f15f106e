"""What the DAG files say, without running them."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from forja import recipes
from forja.recipes.base import CHAIN

ROOT = Path(__file__).resolve().parents[2]
RECIPES = recipes.names()
PLATFORM = ("mig_layout", "security_baseline")
"""DAGs beside the recipes', one file each."""
HEAVY = {
    "torch", "polars", "pyarrow", "deltalake", "obstore", "mlflow", "kafka", "numpy", "pandas", "kubernetes", "fastapi", "onnx",
    "tritonclient",
}  # fmt: skip


@pytest.fixture(scope="module")
def bag() -> Any:
    from airflow.dag_processing.dagbag import DagBag

    return DagBag(dag_folder=str(ROOT / "dags"))


def test_no_import_errors_and_one_file_a_recipe(bag: Any) -> None:
    assert bag.import_errors == {}
    assert set(bag.dags) == {name for recipe in RECIPES for name in (recipe, f"{recipe}_ingest")} | set(PLATFORM)
    assert {p.stem for p in (ROOT / "dags").glob("*.py")} == {*RECIPES, *PLATFORM}


@pytest.mark.parametrize("name", PLATFORM)
def test_dags_of_the_platform_tell_what_to_do(bag: Any, name: str) -> None:
    dag = bag.dags[name]
    assert "When a run fails" in dag.doc_md
    assert (dag.catchup, dag.max_active_runs) == (False, 1)
    for task in dag.tasks:
        assert "hen it fails" in task.doc_md, task.task_id
        assert task.owner == "platform"
        assert task.retries > 0
        assert task.execution_timeout is not None


@pytest.mark.parametrize("site", ["local", "cluster"])
def test_parsing_imports_nothing_heavy(site: str) -> None:
    allowed = {"kubernetes"} if site == "cluster" else set()
    code = f"""
import json, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(dag_folder={str(ROOT / "dags")!r})
print(json.dumps([bag.import_errors, sorted(set(sys.modules) & set({HEAVY!r}))]))
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "FORJA_SITE": site}, capture_output=True, text=True, check=True)
    errors, heavy = json.loads(done.stdout.splitlines()[-1])
    assert errors == {}
    assert set(heavy) <= allowed


@pytest.mark.parametrize("name", RECIPES)
def test_arrows(bag: Any, name: str) -> None:
    tasks = bag.dags[name].task_dict
    assert set(tasks) == {"admit", *CHAIN[1:]}
    assert {t: set(task.upstream_task_ids) for t, task in tasks.items()} == {
        "admit": set(),
        "transform": {"admit"},
        "train": {"transform"},
        "register": {"transform", "train"},
        "optimize": {"transform", "register"},
        "gate": {"optimize"},
        "release": {"gate", "register"},
    }
    assert [group for group in bag.dags[name].task_group.children if group in ("data", "model", "engines", "serving")] == [
        "data", "model", "engines", "serving",
    ]  # fmt: skip
    assert tasks["optimize"].is_mapped
    assert set(bag.dags[f"{name}_ingest"].task_dict) == {"ingest"}


@pytest.mark.parametrize("name", RECIPES)
def test_settings(bag: Any, name: str) -> None:
    recipe = recipes.load(name)
    for dag in (bag.dags[name], bag.dags[f"{name}_ingest"]):
        assert dag.doc_md
        assert "When a run fails" in dag.doc_md
        assert dag.is_paused_upon_creation is False
        assert dag.catchup is False
        assert recipe.team in dag.tags
        for task in dag.tasks:
            assert task.owner == recipe.owner
            assert task.doc_md
            assert "hen it fails" in task.doc_md
            assert task.retries > 0
            assert task.execution_timeout is not None
    assert bag.dags[name].max_active_runs > 1, "one run at a time strands asset events"
    assert bag.dags[f"{name}_ingest"].max_active_runs == 1, "the doorbell rings again; queued runs would only pile up"
    assert list(bag.dags[name].params) == ["raw"]


@pytest.mark.parametrize("name", RECIPES)
def test_serialised_form_is_stable(bag: Any, name: str) -> None:
    """An unstable form would make a new DAG version, and a new watcher, at every parse."""
    from airflow.dag_processing.dagbag import DagBag
    from airflow.serialization.serialized_objects import DagSerialization

    again = DagBag(dag_folder=str(ROOT / "dags"))
    for dag_id in (name, f"{name}_ingest"):
        first, second = (json.dumps(DagSerialization.to_dict(b.dags[dag_id]), sort_keys=True, default=str) for b in (bag, again))
        assert first == second


def test_doorbell_is_found_again_from_its_serialised_form() -> None:
    from airflow.sdk.module_loading import import_string

    from forja_airflow.dag import doorbell

    trigger = doorbell(recipes.load("digits")).watchers[0].trigger
    path, arguments = trigger.serialize()
    again = import_string(path)(**arguments)
    assert again.serialize() == (path, arguments)
    assert json.loads(json.dumps(arguments)) == arguments
    assert (again.topic, again.group) == ("vision.digits", "forja-digits")


def test_doorbell_outlives_a_broker_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watcher that raises is started again at once, for ever: it must sit broker errors out."""
    from forja import doorbell
    from forja_airflow.trigger import Doorbell

    tries: list[float] = []

    def connect(bootstrap: str, group: str) -> Any:
        tries.append(time.monotonic())
        raise OSError("connection refused")

    monkeypatch.setattr(doorbell, "connect", connect)
    monkeypatch.setenv("FORJA_KAFKA", "127.0.0.1:30001")

    async def listen() -> None:
        async for _ in Doorbell(topic="t", group="g", every_s=0.1).run():
            raise AssertionError("it rang")

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(listen(), 2)

    asyncio.run(main())
    gaps = [b - a for a, b in itertools.pairwise(tries)]
    assert len(gaps) >= 3
    assert gaps[-1] > 2 * gaps[0], "the pauses grow"
