"""What a pod adds to a stage: the same quick stage as a process of Airflow's machine and as a pod, through Airflow's scheduler."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable
from typing import Any

from cluster.platform import Platform


def measure(platform: Platform, pairs: int = 15, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Median of what the pod adds, over pairs one after the other; the image is on the node, and the first pair isn't counted.

    Returns:
        ``pod_added_s``: seconds from start to end of the task as a pod, less those of the task as a process; ``pairs``: each.
    """
    platform.forja("produce", "digits")
    found = []
    for number in range(pairs + 1):
        found.append(pair(platform))
        say(f"pair {number}: {found[-1]}")
    added = [one["pod_s"] - one["process_s"] for one in found[1:]]
    return {"pod_added_s": round(statistics.median(added), 2), "pairs": found[1:]}


def pair(platform: Platform) -> dict[str, float]:
    """Seconds of the stage's task as a process, then as a pod."""
    return {f"{how}_s": _seconds(platform, f"pods_pair_{how}") for how in ("process", "pod")}


def _seconds(platform: Platform, dag: str) -> float:
    """From a task's start to its end, by Airflow's own times."""
    run = platform.trigger(dag)
    state = platform.wait(dag, run)
    task = platform.tasks(dag, run)["ingest"]
    assert state == "success", platform.log(dag, run, "ingest")
    return round((datetime.datetime.fromisoformat(task.ended) - datetime.datetime.fromisoformat(task.started)).total_seconds(), 3)
