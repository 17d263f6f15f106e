"""The processes beside the cluster: none outlives the tests that started it, and a stranger on their address is noticed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import services

from forja.services import launch

SERVER = "sleep 1000 & echo $! > children; exec sleep 1000"
"""A server as MLflow's: its work is done by a child, which goes on when the server is killed."""
TESTS = f"""
import os, sys, time
from pathlib import Path
from cluster import services
from forja.settings import Settings
with services.watched(Settings.from_env(), os.environ):
    services.Processes(Path(os.environ["FORJA_STATE"])).start("server", ["sh", "-c", {SERVER!r}], cwd=Path.cwd())
    print("started", flush=True)
    time.sleep(1000)
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_killed_tests_leave_no_child_of_a_server(tmp_path: Path) -> None:
    env = {**os.environ, "FORJA_STATE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", TESTS], env=env, stdout=subprocess.PIPE, cwd=tmp_path) as tests:
        assert tests.stdout is not None
        assert tests.stdout.readline() == b"started\n"
        deadline = time.monotonic() + 10
        while not (tmp_path / "children").exists() or not (tmp_path / "children").read_text().strip():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child = int((tmp_path / "children").read_text())
        assert not gone(child)
        try:
            tests.send_signal(signal.SIGKILL)
            deadline = time.monotonic() + 30
            while not gone(child):
                assert time.monotonic() < deadline, "the server's child lives on"
                time.sleep(0.1)
        finally:
            launch.end(f"{tmp_path}/beside")


def test_a_stranger_on_the_address_is_noticed() -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        port = stranger.getsockname()[1]
        services.free("mlflow", "127.0.0.1", port)
        stranger.listen()
        with pytest.raises(AssertionError, match=f"mlflow: something listens on 127.0.0.1:{port} already"):
            services.free("mlflow", "127.0.0.1", port)
