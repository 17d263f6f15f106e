"""The DAG mig_layout through Airflow's scheduler, on a simulated node: done, already in force, and taken back."""

from __future__ import annotations

import json

from cluster.mig import ADMIN, BALANCED, gpu, run_on, running, space, state
from cluster.mig_manager import managing
from cluster.platform import Platform

__all__ = ["gpu", "space"]

STEPS = ("assert", "plan", "cordon", "drain", "apply", "verify", "uncordon", "revert")


def states(platform: Platform, run: str) -> dict[str, str | None]:
    found = platform.tasks("mig_layout", run)
    return {name: found[name].state for name in STEPS}


def change(platform: Platform, node: str, layout: str) -> tuple[str, str]:
    """A run, and how it ended."""
    run = platform.trigger("mig_layout", {"node": node, "layout": layout})
    return run, platform.wait("mig_layout", run, 240)


def test_a_change_by_the_scheduler(platform: Platform, gpu: str, space: str) -> None:
    kube = platform.kube
    before = state(kube, gpu)
    run_on(kube, space, gpu)
    with managing(ADMIN, gpu):
        run, ended = change(platform, gpu, "balanced")
        assert (ended, states(platform, run)) == ("success", {**dict.fromkeys(STEPS, "success"), "revert": "skipped"})
        assert state(kube, gpu) == {**before, "label": "balanced", "offers": BALANCED}
        plan = platform.log("mig_layout", run, "plan")
        assert f"simulated node {gpu}" in plan
        assert "├" in plan
        assert f"{space}/train" in platform.log("mig_layout", run, "drain")
        record = json.loads(platform.lake.get(f"platform/mig/{gpu}/{run}.json"))
        assert (record["outcome"], record["simulated"], record["offers"]) == ("changed", True, BALANCED)
        assert b"<svg" in platform.lake.get(f"platform/mig/{gpu}/{run}.svg")

        run, ended = change(platform, gpu, "balanced")
        assert (ended, states(platform, run)) == ("success", {**dict.fromkeys(STEPS, "skipped"), "assert": "success"})
        assert "is in force" in platform.log("mig_layout", run, "assert")


def test_a_change_that_fails_is_taken_back(platform: Platform, gpu: str, space: str) -> None:
    kube = platform.kube
    before = state(kube, gpu)
    run_on(kube, space, gpu)
    with managing(ADMIN, gpu, "fails"):
        run, ended = change(platform, gpu, "balanced")
    assert ended == "failed"
    done = dict.fromkeys(("assert", "plan", "cordon", "drain", "revert"), "success")
    assert states(platform, run) == {**done, "apply": "failed", "verify": "upstream_failed", "uncordon": "upstream_failed"}
    assert state(kube, gpu) == before
    platform.until("the evicted pod is back", lambda: running(kube, space))
    assert "mig-manager" in platform.log("mig_layout", run, "apply")
    assert "the layout before is in force" in platform.log("mig_layout", run, "revert")
    record = json.loads(platform.lake.get(f"platform/mig/{gpu}/{run}.json"))
    assert (record["outcome"], record["layout"], record["simulated"]) == ("reverted", "all-disabled", True)


def test_a_layout_that_the_node_can_not_have_fails_before_it_is_touched(platform: Platform, gpu: str) -> None:
    before = state(platform.kube, gpu)
    platform.kube.patch("Node", gpu, {"metadata": {"labels": {"nvidia.com/gpu.product": "NVIDIA-A30"}}})
    run, ended = change(platform, gpu, "train-and-serve")
    assert ended == "failed"
    assert states(platform, run) == {**dict.fromkeys(STEPS, "upstream_failed"), "assert": "failed", "revert": "skipped"}
    assert state(platform.kube, gpu) == before
