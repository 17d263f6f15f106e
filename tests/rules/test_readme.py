"""The README is followed, not read: its recipe in two files becomes DAGs, and its commands exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forja.settings import ROOT

README = (ROOT / "README.md").read_text()
CHECK = """
from airflow.dag_processing.dagbag import DagBag
from forja import recipes, stages
from forja.receipts import Input
recipe = recipes.load("valves")
for verb in recipes.base.STAGES:
    kind = stages.load(verb).STAGE
    inputs = {n: [Input(ref="x", digest="0" * 64)] for n in kind.inputs}
    plan = stages.load(verb).plan(recipe, inputs, {"optimize": "fp32", "export": "cpu"}.get(verb, ""))
    assert plan.recipe == "valves", plan
bag = DagBag(dag_folder="dags")
assert not bag.import_errors, bag.import_errors
assert {"valves", "valves_ingest"} <= set(bag.dag_ids), bag.dag_ids
assert bag.dags["valves"].task_dict["train"].owner == "plant-team"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what Airflow reads."""
    for name in ("include", "dags", "plugins", "k8s"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("requirements.txt", "uv.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_the_recipe_of_the_readme_becomes_dags(clone: Path) -> None:
    (code,) = re.findall(r"```python\n# include/forja/recipes/valves\.py\n(.*?)```", README, re.DOTALL)
    (clone / "include/forja/recipes/valves.py").write_text(code)
    (command,) = re.findall(r"^sed '.*> dags/valves\.py$", README, re.MULTILINE)
    subprocess.run(["bash", "-c", command], cwd=clone, check=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FORJA_", "AIRFLOW"))}
    env |= {
        "PYTHONPATH": f"{clone / 'include'}:{clone / 'plugins'}", "AIRFLOW_HOME": str(clone / "home"), "FORJA_STATE": str(clone / "state"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=clone, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_commands_of_the_readme_exist() -> None:
    from typer.main import get_command

    from forja.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"\./forja ([a-z]+)", README))
    assert named <= known
    assert known - {"setup", "run"} <= named | {"up", "down"}, "a command that the README doesn't tell of"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", README)) <= targets


def test_files_that_the_readme_shows_are_there() -> None:
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / path).is_file(), path
