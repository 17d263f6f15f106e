"""What ``forja run`` shows of a failed task's log."""

from __future__ import annotations

from typing import Any

import pytest

from forja.services import airflow_api

ENTRIES: dict[str, tuple[Any, list[str]]] = {
    "a line": ({"event": "epoch 1/15", "timestamp": "t"}, ["epoch 1/15"]),
    "a fold": ({"event": "::group::Pre Execute"}, []),
    "an exception": (
        {"event": "Task failed with exception", "error_detail": [{"exc_type": "AirflowFailException", "exc_value": "BadInput: raw"}]},
        ["Task failed with exception", "AirflowFailException: BadInput: raw"],
    ),
    "plain text": ("hello", ["hello"]),
}


@pytest.mark.parametrize("case", ENTRIES, ids=str)
def test_log_entries_become_lines(case: str) -> None:
    entry, lines = ENTRIES[case]
    assert airflow_api._lines(entry) == lines
