"""``./forja bench run``: how long a newcomer waits, what Airflow adds to the stages, how good the models are, what idling costs.

Everything runs on a stack of its own, on free ports, in a temporary folder; one that somebody runs is left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from forja import envs
from forja.errors import BadInput, ForjaError
from forja.settings import PORTS, ROOT, Settings

PARTS = ("cold", "warm", "models", "idle")
IDLE_S = 60.0
"""Seconds of quiet before memory is measured."""


def main(parts: tuple[str, ...], data: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the parts; a figure that can't be measured is null with its reason under ``missing``."""
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise BadInput("parts of the benchmark", value=sorted(unknown), allowed=", ".join(PARTS))
    keys = (
        "cold_s",
        "warm_s",
        "again_s",
        "overhead_s_per_task",
        "digits_accuracy",
        "digits_int8_disagree",
        "ai4i_ap_delta",
        "idle_pss_gib",
    )
    found: dict[str, Any] = dict.fromkeys(keys)
    missing = dict.fromkeys(keys, "not asked for: see --parts")
    if "cold" in parts:
        found["cold_s"] = cold(say)
    if {"warm", "idle"} & set(parts):
        with stack() as env:
            found |= warm(env, say)
            if "idle" in parts:
                found["idle_pss_gib"] = idle(env, say)
    if "models" in parts:
        found |= models("digits", None, say)
        if data is None:
            missing["ai4i_ap_delta"] = "needs --data, the CSV of AI4I 2020"
        else:
            found |= models("ai4i", data, say)
    return {**found, "missing": {k: why for k, why in missing.items() if found[k] is None}, "cpus": os.cpu_count()}


@contextlib.contextmanager
def stack() -> Iterator[dict[str, str]]:
    """Environment of a stack on free ports in a temporary folder; it is stopped and deleted at the end."""
    folder = Path(tempfile.mkdtemp(prefix="forja-bench-"))
    base = free_ports(64)
    own = {k: v for k, v in os.environ.items() if not k.startswith(("FORJA_", "AIRFLOW_", "MLFLOW_"))}
    # ``triton`` is the last of PORTS: its range is the rest.
    env = {**own, "FORJA_STATE": str(folder), **{f"FORJA_PORT_{n.upper()}": str(base + i) for i, n in enumerate(PORTS)}}
    if "FORJA_CACHE" in os.environ:
        env["FORJA_CACHE"] = os.environ["FORJA_CACHE"]
    try:
        yield env
    finally:
        subprocess.run([ROOT / "forja", "down"], env=env, check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> int:
    """First of ``count`` free ports in a row."""
    for base in range(21_000, 31_000, count):
        with contextlib.ExitStack() as sockets:
            try:
                for port in range(base, base + count):
                    sockets.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return base
    raise ForjaError(f"{count} free ports in a row between 21000 and 31000", do="stop what holds them")


def cold(say: Callable[[str], None]) -> float:
    """Seconds from git clone to the first prediction, with HOME and FORJA_CACHE empty."""
    with stack() as env, tempfile.TemporaryDirectory(prefix="forja-cold-") as folder:
        home = Path(folder)
        env |= {"HOME": str(home / "home"), "FORJA_CACHE": str(home / "cache"), "UV_CACHE_DIR": str(home / "uv")}
        env.pop("XDG_CACHE_HOME", None)
        (home / "home").mkdir()
        say("cold: clone and make run, with empty caches")
        began = time.monotonic()
        _checked(["git", "clone", "--quiet", str(ROOT), str(home / "forja")], env, home)
        _checked(["make", "run"], env, home / "forja")
        return round(time.monotonic() - began, 1)


def warm(env: Mapping[str, str], say: Callable[[str], None]) -> dict[str, Any]:
    """make run on an empty lake, then the same again."""
    say("warm: make run on an empty lake")
    first, warm_s = _run(env)
    say(f"warm: {warm_s} s; again")
    again, again_s = _run(env)
    adopted = [t["task"] for t in again["tasks"] if t["adopted"]]
    return {
        "warm_s": warm_s, "again_s": again_s, "again_adopted": adopted, "overhead_s_per_task": first["overhead_s_per_task"],
        "again_overhead_s_per_task": again["overhead_s_per_task"],
    }  # fmt: skip


def _run(env: Mapping[str, str]) -> tuple[dict[str, Any], float]:
    began = time.monotonic()
    output = _checked(["./forja", "run", "digits", "--json"], env, ROOT)
    return json.loads(output.splitlines()[-1]), round(time.monotonic() - began, 1)


def idle(env: Mapping[str, str], say: Callable[[str], None]) -> float:
    """Memory of everything up with nothing running, in GiB of proportional set size."""
    say(f"idle: {IDLE_S:.0f} s of quiet")
    time.sleep(IDLE_S)
    output = _checked(["./forja", "status", "--json"], env, ROOT)
    return float(json.loads(output)["pss_gib"])


def models(recipe: str, data: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Figures of ``forja.bench.models``."""
    say(f"models: five folds of {recipe}")
    python = envs.python("ml", Settings.from_env())
    env = {**os.environ, "PYTHONPATH": str(ROOT / "include")}
    command = [str(python), "-m", "forja.bench.models", recipe, *([str(data.absolute())] if data else [])]
    found: dict[str, Any] = json.loads(_checked(command, env, ROOT).splitlines()[-1])
    return found


def _checked(command: list[str], env: Mapping[str, str], folder: Path) -> str:
    done = subprocess.run(command, env=dict(env), cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ForjaError(f"{' '.join(command)} ended with status {done.returncode}", value=(done.stdout + done.stderr)[-1500:])
    return done.stdout
