"""``./forja bench cluster``: what a cluster adds to a stage, how fast a gang is back, how long proofs and plans take.

It uses the test cluster of tests/cluster, which needs root and Go. One that runs already is used as it is, but for ``up``.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

from forja import envs
from forja.errors import BadInput, Unavailable
from forja.settings import ROOT, Settings

PARTS = {
    "plan": ("plan_ms",),
    "up": ("up_s",),
    "baseline": ("baseline_assert_s",),
    "pod": ("pod_added_s",),
    "gang": ("gang_restart_s",),
}
"""Keys that each part measures."""


def main(parts: tuple[str, ...], say: Callable[[str], None]) -> dict[str, Any]:
    """Run the parts; a figure that isn't measured is null with its reason under ``missing``.

    Raises:
        BadInput: an unknown part.
        Unavailable: the cluster or a part of the benchmark failed; the message has its last words.
    """
    if unknown := set(parts) - set(PARTS):
        raise BadInput("parts of the benchmark", value=sorted(unknown), allowed=", ".join(PARTS))
    found: dict[str, Any] = dict.fromkeys(key for keys in PARTS.values() for key in keys)
    for part in (p for p in PARTS if p in parts):
        say(f"{part} ...")
        found |= _plan() if part == "plan" else _up() if part == "up" else _inside(part)
        say("  ".join(f"{key} {found[key]}" for key in PARTS[part]))
    keys = [key for part, keys in PARTS.items() if part not in parts for key in keys]
    return {**found, "missing": dict.fromkeys(keys, "not asked for: see --parts"), "cpus": os.cpu_count()}


def _plan() -> dict[str, Any]:
    from forja.mig import bench

    return bench.measure()


def _up() -> dict[str, Any]:
    """Seconds of ``up`` with everything built, from nothing running to all of it ready."""
    _kit("build")
    _kit("down")
    began = time.monotonic()
    _kit("up")
    seconds = time.monotonic() - began
    return {"up_s": round(seconds, 1)}


def _inside(part: str) -> dict[str, Any]:
    """A part that runs in the cluster's network: tests/cluster/measure.py; its last line is its result."""
    _kit("up")
    python = str(envs.python("control-dev", Settings.from_env()))
    found: dict[str, Any] = json.loads(_kit("exec", "--", python, "-m", "cluster.measure", part).splitlines()[-1])
    return found


def _kit(*arguments: str) -> str:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "include", "plugins"))
    command = [str(envs.python("control-dev", Settings.from_env())), "-m", "cluster.kit", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise Unavailable(f"test cluster: {' '.join(arguments)} ended with status {done.returncode}", value=said, do="make cluster-up")
    return done.stdout
