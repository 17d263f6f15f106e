"""A whole stack on free ports and in a temporary folder, shared by all tests of a session.

It never meets a stack that somebody runs: other state folder, other ports. A test says what it needs:

    def test_x(stack: Stack) -> None:
        stack.need("kafka", "mlflow")

Only the standard library and the launcher are used, so the fixture works in every environment.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from forja.settings import PORTS, ROOT, Settings

WATCH = "import subprocess, sys; sys.stdin.read(); subprocess.run([sys.argv[1], 'down'], stdout=subprocess.DEVNULL)"
"""Waits until the writing end of its pipe closes, which happens however the tests end, kill -9 included; then stops the stack."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A stack of the tests' own."""

    settings: Settings
    env: Mapping[str, str]
    """Environment of processes that use it: FORJA_STATE, FORJA_PORT_<NAME>."""

    def forja(self, *arguments: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Run ./forja against this stack."""
        done = subprocess.run([ROOT / "forja", *arguments], env={**self.env, **env}, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"./forja {' '.join(arguments)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def need(self, *services: str) -> None:
        """Start services, if they don't run yet, and wait until they answer."""
        self.forja("up", "--json", "--only", ",".join(services))

    def status(self) -> dict[str, dict[str, Any]]:
        """Status of each program by its name."""
        return {p["name"]: p for p in json.loads(self.forja("status", "--json", check=False).stdout)["programs"]}

    def wait(self, what: str, ask: Callable[[], object], seconds: float = 90) -> None:
        """Wait until ``ask()`` is true; an error counts as no."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError, KeyError):
                if ask():
                    return
            time.sleep(0.2)
        raise AssertionError(f"not within {seconds} s: {what}\n{self.forja('status', check=False).stdout}")


@contextlib.contextmanager
def free_ports(width: int = 64) -> Iterator[int]:
    """First of ``width`` free ports below those that the kernel gives to outgoing connections, held while in use.

    A stack doesn't listen on all of its ports at once, so looking at what is free isn't enough: a lock keeps other stacks away.
    """
    bases = list(range(20_000, 31_000, width))
    random.shuffle(bases)
    for base in bases:
        with contextlib.ExitStack() as held:
            lock = held.enter_context(open(Path(tempfile.gettempdir()) / f"forja-test-ports-{base}", "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.ExitStack() as sockets:
                    for port in range(base, base + width):
                        sockets.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            yield base
            return
    raise AssertionError("no free range of ports")


@contextlib.contextmanager
def new_stack() -> Iterator[Stack]:
    """A stack with nothing started; stopped and deleted at the end."""
    with free_ports() as base:
        yield from _stack(base)


def _stack(base: int) -> Iterator[Stack]:
    state = Path(tempfile.mkdtemp(prefix="forja-test-"))
    own = {k: v for k, v in os.environ.items() if not k.startswith(("FORJA_PORT_", "AIRFLOW_", "MLFLOW_"))}
    for name in ("FORJA_LAKE", "FORJA_KAFKA", "FORJA_ENDPOINT", "FORJA_SITE", "FORJA_PROGRAM"):
        own.pop(name, None)
    # triton comes last in PORTS: its range is the rest.
    env = {**own, "FORJA_STATE": str(state), **{f"FORJA_PORT_{name.upper()}": str(base + i) for i, name in enumerate(PORTS)}}
    # In a session of its own, Ctrl-C doesn't reach it.
    watcher = subprocess.Popen([sys.executable, "-c", WATCH, str(ROOT / "forja")], env=env, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield Stack(settings=Settings.from_env(env), env=env)
    finally:
        assert watcher.stdin is not None
        watcher.stdin.close()
        watcher.wait(timeout=90)
        shutil.rmtree(state, ignore_errors=True)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The session's stack."""
    with new_stack() as made:
        yield made


@pytest.fixture
def small_stack() -> Iterator[Stack]:
    """A stack for one test that breaks things."""
    with new_stack() as made:
        yield made
