"""Claims: one holder, dead holders are replaced, a holder that wakes up too late stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from forja import claims
from forja.errors import Conflict
from forja.lake import Lake
from forja.settings import ROOT

HOLDER = """
import sys, time
from forja import claims
from forja.lake import Lake
claim = claims.take(Lake(sys.argv[1]), "team/r/train/k", done=lambda: False, say=print)
print("held", flush=True)
time.sleep(60)
"""


def take(lake: Lake, done: Callable[[], bool] = lambda: False, said: list[str] | None = None) -> claims.Claim | None:
    return claims.take(lake, "team/r/train/k", done=done, say=(said if said is not None else []).append)


def holder(lake: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lake)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "include")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_run_waits_and_then_adopts(tmp_path: Path) -> None:
    lake, said = Lake(str(tmp_path)), []
    first = take(lake)
    assert first is not None
    finished = threading.Event()
    threading.Timer(1.0, finished.set).start()
    assert take(lake, finished.is_set, said) is None
    assert len(said) == 1
    assert f"process {os.getpid()}" in said[0]
    first.release()
    assert not list(lake.list("team"))


def test_a_released_claim_can_be_taken(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    for _ in range(2):
        claim = take(lake)
        assert claim is not None
        claim.release()


def test_killed_holder_is_replaced_at_once(tmp_path: Path) -> None:
    process = holder(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    claim = take(Lake(str(tmp_path)))
    assert claim is not None
    assert claim.number == 2
    assert time.monotonic() - began < claims.DEAD_S / 3
    claim.release()


def test_zombie_holder_counts_as_dead(tmp_path: Path) -> None:
    process = holder(tmp_path)
    os.kill(process.pid, signal.SIGKILL)  # not waited for: its entry stays in the process table
    time.sleep(0.3)
    claim = take(Lake(str(tmp_path)))
    assert claim is not None
    claim.release()
    process.wait()


def test_stopped_holder_elsewhere_is_replaced_and_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.2)
    monkeypatch.setattr(claims, "DEAD_S", 1.0)
    lake = Lake(str(tmp_path))
    sleeper = take(lake)
    assert sleeper is not None
    sleeper._stop.set()  # as a machine that is suspended: no beat any more
    sleeper._thread.join()
    path = "team/r/train/k/claim-000001.json"
    lake.replace(path, json.dumps({**json.loads(lake.get(path)), "host": "elsewhere"}).encode())
    successor = take(lake)
    assert successor is not None
    assert successor.number == 2
    sleeper._stop.clear()
    sleeper._beat()  # it wakes up
    with pytest.raises(Conflict, match="took over"):
        sleeper.check()
    sleeper.release()
    assert list(lake.list("team")), "a holder that lost must leave its successor's claim alone"
    successor.release()


def test_holder_that_finishes_late_leaves_its_successors_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stood still, was replaced, and finishes before its next beat could tell it."""
    monkeypatch.setattr(claims, "BEAT_S", 60.0)
    lake = Lake(str(tmp_path))
    late = take(lake)
    assert late is not None
    lake.create("team/r/train/k/claim-000002.json", b"{}")
    late.release()
    assert list(lake.list("team")) == ["team/r/train/k/claim-000002.json"]


def test_beating_holder_elsewhere_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.2)
    monkeypatch.setattr(claims, "DEAD_S", 1.0)
    lake = Lake(str(tmp_path))
    first = take(lake)
    assert first is not None
    first.body["host"] = "elsewhere"
    deadline = time.monotonic() + 3
    assert take(lake, lambda: time.monotonic() > deadline) is None
    first.check()
    first.release()


def test_of_many_one_gets_it(tmp_path: Path) -> None:
    lake, got = Lake(str(tmp_path)), []

    def one() -> None:
        got.append(take(Lake(str(tmp_path)), lambda: len(got) > 0))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [c for c in got if c is not None]
    assert len(held) == 1
    held[0].release()
    assert not list(lake.list("team"))
