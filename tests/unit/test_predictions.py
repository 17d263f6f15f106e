"""The predictions table: the rows of a run come once and together, whoever else commits meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from forja import predictions
from forja.errors import Conflict, Damaged
from forja.lake import Lake

pytestmark = pytest.mark.ml


def batches(run: str, count: int = 3) -> Iterator[pa.RecordBatch]:
    yield pa.RecordBatch.from_pylist([{"key": f"k{i}", "run": run} for i in range(count)], schema=predictions.schema())


def commit(lake: Lake, path: str, run: str) -> None:
    """Another writer's commit: from a thread of its own, since the one that asks for batches is Delta's."""
    thread = threading.Thread(target=predictions.append, args=(lake, path, run, lambda: batches(run), lambda: None))
    thread.start()
    thread.join()


def test_a_run_comes_once_when_another_try_commits_meanwhile(tmp_path: Path) -> None:
    lake, path = Lake(str(tmp_path)), "t/r/predictions"
    calls = []

    def overtaken() -> Iterator[pa.RecordBatch]:
        calls.append(1)
        commit(lake, path, "a")
        yield from batches("a")

    predictions.append(lake, path, "a", overtaken, lambda: None)
    predictions.append(lake, path, "a", lambda: batches("a"), lambda: None)
    assert len(calls) == 1
    assert lake.table(path).to_pyarrow_table()["run"].to_pylist() == ["a"] * 3


def test_another_run_that_commits_meanwhile_is_no_harm(tmp_path: Path) -> None:
    lake, path = Lake(str(tmp_path)), "t/r/predictions"
    others = iter("bc")

    def overtaken() -> Iterator[pa.RecordBatch]:
        for other in others:
            commit(lake, path, other)
            break
        yield from batches("a")

    predictions.append(lake, path, "a", overtaken, lambda: None)
    assert sorted(lake.table(path).to_pyarrow_table()["run"].to_pylist()) == [run for run in "abc" for _ in range(3)]


def test_a_run_that_is_always_overtaken_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake, path = Lake(str(tmp_path)), "t/r/predictions"
    monkeypatch.setattr(predictions, "TRIES", 3)
    numbers = iter(range(99))

    def overtaken() -> Iterator[pa.RecordBatch]:
        commit(lake, path, f"b{next(numbers)}")
        yield from batches("a")

    with pytest.raises(Conflict, match="3 times"):
        predictions.append(lake, path, "a", overtaken, lambda: None)
    assert "a" not in lake.table(path).to_pyarrow_table()["run"].to_pylist()


def test_what_the_rows_raise_is_passed_on_and_nothing_is_committed(tmp_path: Path) -> None:
    lake, path = Lake(str(tmp_path)), "t/r/predictions"

    def broken() -> Iterator[pa.RecordBatch]:
        yield from batches("a")
        raise Damaged("a chunk is gone")

    with pytest.raises(Damaged, match="a chunk is gone"):
        predictions.append(lake, path, "a", broken, lambda: None)
    assert lake.table(path).version() == 0


def test_a_run_that_was_taken_over_commits_nothing(tmp_path: Path) -> None:
    def lost() -> None:
        raise Conflict("taken over")

    with pytest.raises(Conflict, match="taken over"):
        predictions.append(Lake(str(tmp_path)), "t/r/predictions", "a", lambda: batches("a"), lost)
