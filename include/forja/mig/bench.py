"""How long an exact plan takes: the worst case, as the first call of a process, its import not counted."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from forja.mig import planner
from forja.mig.tables import GPUS, Gpu
from forja.settings import ROOT

WORST = 8
"""Cases, the slowest of all in one process, that are measured again in fresh ones."""

PROCESSES = 7
"""Fresh processes for each of them."""

FIRST = """
import json, sys, time
from forja.mig import planner, tables
gpu, wanted = tables.GPUS[sys.argv[1]], json.loads(sys.argv[2])
begin = time.perf_counter()
planner.fits(gpu, wanted)
print(time.perf_counter() - begin)
"""


def measure(worst: int = WORST, processes: int = PROCESSES) -> dict[str, Any]:
    """Time of the slowest plan over all GPUs and all sets of instances, those that fit and those that are one too many.

    Returns:
        ``plan_ms``: the largest median, over the slowest cases, of the first call in fresh processes, in milliseconds.
        ``plan_max_ms``: the slowest of all those first calls. ``plan_case``: which case that median belongs to.
        ``plan_sets``: how many sets were planned to find them. The planner keeps nothing between calls.
    """
    times: list[tuple[float, str, dict[str, int]]] = []
    for gpu in GPUS.values():
        for wanted in cases(gpu):
            least = min(_once(gpu, wanted) for _ in range(2))
            times.append((least, gpu.name, wanted))
    times.sort(key=lambda case: case[0], reverse=True)
    medians, slowest = [], 0.0
    for _, name, wanted in times[:worst]:
        first = [_first(name, wanted) for _ in range(processes)]
        medians.append((statistics.median(first), f"{name}: {', '.join(f'{n} x {p}' for p, n in wanted.items())}"))
        slowest = max(slowest, *first)
    median, case = max(medians)
    return {
        "plan_ms": round(median * 1000, 3), "plan_max_ms": round(slowest * 1000, 3), "plan_case": case, "plan_sets": len(times),
    }  # fmt: skip


def cases(gpu: Gpu) -> list[dict[str, int]]:
    """All sets of instances that fit, and those sets with one instance more."""
    fitting = {tuple(sorted(layout.counts.items())) for layout in planner.layouts(gpu)}
    more = {
        tuple(sorted({**dict(counts), name: dict(counts).get(name, 0) + 1}.items()))
        for counts, name in itertools.product(fitting, gpu.profiles)
    }
    return [dict(counts) for counts in sorted(fitting | more)]


def _once(gpu: Gpu, wanted: dict[str, int]) -> float:
    begin = time.perf_counter()
    planner.fits(gpu, wanted)
    return time.perf_counter() - begin


def _first(name: str, wanted: dict[str, int]) -> float:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "include")}
    done = subprocess.run([sys.executable, "-c", FIRST, name, json.dumps(wanted)], env=env, capture_output=True, text=True, check=True)
    return float(done.stdout)
