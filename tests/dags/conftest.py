"""An Airflow of the tests' own: its home, database, lake, and environments whose stages do no work but leave receipts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOME = Path(tempfile.mkdtemp(prefix="forja-airflow-"))

# Airflow reads these when it is first imported, so they are set before any test module is.
os.environ.update({
    "AIRFLOW_HOME": str(HOME),
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
    "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
    "AIRFLOW__API_AUTH__JWT_SECRET": "of-these-tests-alone-and-long-enough-for-sha512-in-every-way-there-is",
    "PYTHONPATH": f"{ROOT / 'include'}:{ROOT / 'plugins'}",
})  # fmt: skip


@pytest.fixture(scope="session")
def airflow_home() -> Iterator[Path]:
    """The home, its database made."""
    subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], check=True, capture_output=True)
    yield HOME
    subprocess.run(["rm", "-rf", str(HOME)], check=True)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of one test, with a lake, and environments whose ``forja.stages`` is tests/dags/fake_stage.py."""
    from forja import envs
    from forja.settings import Settings

    monkeypatch.setenv("FORJA_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("FORJA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FORJA_LAKE", str(tmp_path / "state" / "lake"))
    for name in ("control", "ml"):
        python = envs.folder(name, Settings.from_env()) / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).parent / "fake_stage.py"}" "$@"\n')
        python.chmod(0o755)
        (python.parents[1] / envs.MARKER).touch()
    return tmp_path


@pytest.fixture
def append(place: Path) -> Callable[[int], str]:
    """Adds rows to the raw table of digits; gives the reference of the new version."""

    def add(rows: int) -> str:
        import pyarrow as pa
        from deltalake import DeltaTable, write_deltalake

        from forja.lake import Lake
        from forja.stages import ingest

        table = Lake(str(place / "state" / "lake")).uri("vision/digits/raw")
        there = len(list(Path(table).glob("*.parquet")))
        found = [{"key": f"{there}-{n}", "label": "1", "sha256": f"{there}-{n}", "offset": n, "time": n} for n in range(rows)]
        write_deltalake(table, pa.Table.from_pylist(found, schema=pa.schema(ingest.schema())), mode="append")
        return f"vision/digits/raw@{DeltaTable(table).version()}"

    return add


@pytest.fixture
def raw(append: Callable[[int], str]) -> str:
    """A raw table of digits with three rows: its reference."""
    return append(3)
