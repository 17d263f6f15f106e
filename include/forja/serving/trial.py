"""A Triton of one's own: a stage or a command starts it for a model repository, asks it, and ends it.

It is the server that serves on this machine and in the cluster's CPU pods, so what it answers is what clients get.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from forja import envs
from forja.errors import Unavailable
from forja.services import triton as program
from forja.serving import triton
from forja.settings import Settings

START_S = 60.0
"""Seconds until the server answers."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A server that runs."""

    http: str
    """host:port."""
    grpc: str
    metrics: str
    pid: int
    log: Path

    def wait(self, model: str, version: str, seconds: float = START_S, check: Callable[[], None] = lambda: None) -> None:
        """Until it serves a version of a model; Refused with Triton's reason when it can't load it."""
        triton.wait_ready(self.http, model, version, seconds, check)


@contextlib.contextmanager
def server(settings: Settings, repository: Path, scratch: Path, *, nice: int = 0) -> Iterator[Trial]:
    """Run Triton on the loopback with all models of ``repository``, as ``repository.unpack`` lays them; it ends with the block.

    Args:
        scratch: a folder for its log.
        nice: how far it gives way to who measures it on the same cores; a client of another machine would not wait for them.

    Raises:
        BadInput: the serving environment hasn't been made.
        Unavailable: it ended, or doesn't answer in time; the end of its log is in the message.
    """
    python = envs.python("serving", settings)
    program.make_backends(settings, python)
    ports, prefix, log = _free_ports(3), f"forja_trial_{secrets.token_hex(6)}_", scratch / "triton.log"
    command = program.command(settings, python, repository, address="127.0.0.1", ports=ports, shm_prefix=prefix)
    with log.open("wb") as sink:
        # A group of its own: the server and the python processes of its models end together.
        process = subprocess.Popen(
            command, env={**os.environ, **program.environment(python)}, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=lambda: _prepare(nice),
        )  # fmt: skip
    http, grpc, metrics = (f"127.0.0.1:{port}" for port in ports)
    trial = Trial(http=http, grpc=grpc, metrics=metrics, pid=process.pid, log=log)
    try:
        _wait_live(trial, process)
        yield trial
    finally:
        _end(process, prefix)


def _prepare(nice: int) -> None:
    os.nice(nice)
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = program.STACK_MIB << 20
    resource.setrlimit(resource.RLIMIT_STACK, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _free_ports(count: int) -> tuple[int, int, int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        first, second, third = (one.getsockname()[1] for one in sockets)
        return first, second, third
    finally:
        for one in sockets:
            one.close()


def _wait_live(trial: Trial, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while not triton.live(trial.http):
        if process.poll() is not None or time.monotonic() > deadline:
            what = "Triton ended" if process.poll() is not None else f"Triton does not answer after {START_S:g} s"
            raise Unavailable(what, value="\n".join(trial.log.read_text(errors="replace").splitlines()[-5:]))
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes], prefix: str) -> None:
    # At once: there is nothing to save, and an orderly end takes seconds.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for file in Path("/dev/shm").glob(f"{prefix}*"):  # noqa: S108 (where shm_open puts them)
        file.unlink(missing_ok=True)
