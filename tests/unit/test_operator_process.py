"""A stage's process: lines as they come, exit status, and nothing left behind however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from forja_airflow import guard
from forja_airflow.process import Process

TREE = """
    # A child in a session of its own that ignores SIGTERM, as a rank of torchrun could.
    import signal, subprocess, sys, time
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('child', flush=True); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
    time.sleep(600)
"""


def command(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", textwrap.dedent(code)]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "GRACE_S", 0.5)


@contextlib.contextmanager
def started(code: str) -> Iterator[Process]:
    process = Process(command(code), dict(os.environ))
    try:
        yield process
    finally:
        process.stop()


def gone(mark: str, within_s: float = 15) -> bool:
    deadline = time.monotonic() + within_s
    while guard.marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not guard.marked(mark)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        pytest.param("", 0, id="success"),
        pytest.param("raise SystemExit(3)", 3, id="refused"),
        pytest.param("1 / 0", 1, id="bug"),
        pytest.param("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, id="killed"),
        pytest.param("import os, signal; os.kill(os.getppid(), signal.SIGKILL); import time; time.sleep(600)", 137, id="guard killed"),
    ],
)
def test_status(code: str, status: int) -> None:
    with started(code) as process:
        list(process.lines())
        assert process.wait() == status
        assert gone(process.mark, 0)


def test_lines_come_while_it_runs() -> None:
    with started("import sys, time; print('one'); print('two', file=sys.stderr); time.sleep(3); print('three', end='')") as process:
        began, seen = time.monotonic(), []
        for line in process.lines():
            seen.append((line, time.monotonic() - began))
    assert [line for line, _ in seen] == ["one", "two", "three"]
    assert seen[1][1] < 2 < seen[2][1]


def test_environment_is_the_one_given_and_input_is_empty() -> None:
    code = "import os, sys; print(sorted(k for k in os.environ if k.startswith('X_'))); print(repr(sys.stdin.read()))"
    process = Process(command(code), {"X_ONE": "1", "PATH": os.environ["PATH"]})
    assert list(process.lines()) == ["['X_ONE']", "''"]
    process.stop()


@pytest.mark.usefixtures("short")
def test_stop_takes_the_whole_tree() -> None:
    with started(TREE) as process:
        assert next(process.lines()) == "child"
        assert len(guard.marked(process.mark)) == 3
        process.stop()
        assert gone(process.mark, 0)


def test_stop_lets_the_stage_release_its_claim() -> None:
    code = """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("released") or 143))
        print("up")
        time.sleep(600)
    """
    with started(code) as process:
        lines = process.lines()
        assert next(lines) == "up"
        os.kill(process.pid, signal.SIGTERM)
        assert list(lines) == ["released"]
        assert process.wait() == 143


def test_killed_group_leaves_no_rank_behind() -> None:
    with started(TREE) as process:
        lines = process.lines()
        assert next(lines) == "child"
        os.killpg(process.pid, signal.SIGKILL)
        assert list(lines) == []
        assert process.wait() == 137
        assert gone(process.mark, 0)


def test_killed_task_takes_the_stage_with_it(tmp_path: Path) -> None:
    """kill -9 of the worker's process: nobody is left to clean up but the guard."""
    task = f"""
        import os
        from forja_airflow.process import Process
        p = Process({command(TREE)!r}, dict(os.environ))
        lines = p.lines()
        next(lines)
        print(p.mark, flush=True)
        list(lines)
    """
    worker = subprocess.Popen(
        command(task), stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, cwd=tmp_path
    )
    assert worker.stdout is not None
    mark = worker.stdout.readline().strip()
    assert len(guard.marked(mark)) == 3
    worker.kill()
    worker.wait()
    assert gone(mark, guard.GRACE_S + 5)


def test_without_the_guard_a_rank_survives() -> None:
    """Must-fail twin: ending the process group alone leaves the rank in its own session."""
    process = subprocess.Popen(command(TREE), stdout=subprocess.PIPE, env={**os.environ, guard.MARK: "twin"}, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    try:
        assert len(guard.marked("twin")) == 1
    finally:
        guard.end("twin", 0)
