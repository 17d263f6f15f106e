"""A slot as Compose runs it: its own supervisord, which the release stage's calls find by its socket. Real Triton, no Docker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forja.errors import Unavailable
from forja.services import container, envoy, supervisor, triton
from forja.settings import ROOT, Settings

NAME = "triton-digits-blue"


def until(settings: Settings, env: dict[str, str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if container.healthy(settings, NAME, env):
                return
        except (Unavailable, OSError):
            pass
        time.sleep(0.1)
    pytest.fail(f"{NAME} is not healthy: {supervisor.tail(settings, NAME)}")


def pid(settings: Settings) -> int:
    with supervisor.connection(settings, NAME) as rpc:
        return int(rpc.getProcessInfo(NAME)["pid"])


def test_a_slot_has_a_supervisord_of_its_own(tmp_path: Path) -> None:
    ports = {"FORJA_PORT_TRITON": "33100", "FORJA_PORT_ENVOY": "33000", "FORJA_PORT_ENVOY_ADMIN": "33001"}
    env = {**os.environ, **ports, "FORJA_STATE": str(tmp_path / "s"), "PYTHONPATH": str(ROOT / "include")}
    settings = Settings.from_env(env)
    with pytest.raises(Unavailable):
        supervisor.start_program(settings, NAME)
    process = subprocess.Popen([sys.executable, "-m", "forja.services.container", "slot", NAME], env=env)
    try:
        until(settings, env)  # an empty slot is healthy, its server stopped
        assert pid(settings) == 0
        supervisor.start_program(settings, NAME)
        until(settings, env)
        first = pid(settings)
        os.kill(first, signal.SIGKILL)
        while pid(settings) in (0, first):
            time.sleep(0.1)
        until(settings, env)
        supervisor.stop_program(settings, NAME)
        assert pid(settings) == 0
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_only_envoys_listener_leaves_the_container(tmp_path: Path) -> None:
    settings = Settings.from_env({"FORJA_STATE": str(tmp_path / "s"), "FORJA_CACHE": str(Settings.from_env().cache)})
    envoy.prepare(settings)
    program = container.envoy_program(settings)
    text = Path(program.command[program.command.index("-c") + 1]).read_text()
    assert text.count('"0.0.0.0"') == 1
    assert '"127.0.0.1"' in text
    assert triton.slot(settings, "digits", "blue").program == NAME
