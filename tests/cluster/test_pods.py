"""Stages in pods, through Airflow's scheduler: how they end well, and how each thing that can be wrong is told.

The stage is stand_in.py in the image of the control environment; everything around it is real.
"""

from __future__ import annotations

import pytest
from cluster import pod_work
from cluster.platform import Platform
from cluster.pods_fixtures import CROWDED, holding, left, tenants

__all__ = ["tenants"]

WRONG = {
    "pods_image": ("", ("ErrImagePull", '"10.99.0.1:7070/absent:1"')),
    "pods_gpu": ("", ("no node within 8 s: 0/3 nodes are available", "1 Insufficient nvidia.com/gpu")),
    "pods_too_many": ("", ("exceeded quota: gpus, requested: requests.nvidia.com/gpu=2", "ask for less")),
    "pods_memory": ("eat=1000", ("OOMKilled: the stage needed more than its 256Mi of memory", "raise memory_gib")),
    "pods_late": ("wait", ("DeadlineExceeded",)),
    "pods_once": ("exit=5", ("stage ended with status 5", "Unavailable: the service is down; to do: wait")),
}
"""DAG: what its stage does, and words of the reason that its task gives."""


@pytest.fixture(scope="module")
def wrong(platform: Platform, tenants: None) -> dict[str, tuple[str, pod_work.Work]]:
    """A run of each DAG in which something is wrong, all at once: they mostly wait."""
    found = {}
    for dag, (does, _) in WRONG.items():
        work = pod_work.new(platform, does)
        found[dag] = platform.trigger(dag, work.conf), work
    return found


def test_a_quick_stage(platform: Platform, tenants: None) -> None:
    work = pod_work.new(platform)
    run = platform.trigger("pods_brief", work.conf)
    assert platform.wait("pods_brief", run) == "success", platform.log("pods_brief", run, "transform")
    task = platform.tasks("pods_brief", run)["transform"]
    log = platform.airflow.log("pods_brief", run, task)
    assert [line for line in log if "works on version" in line][1:] == []  # each line once
    assert any(line.startswith("receipt vision/digits/transform/") for line in log)
    assert platform.airflow.xcom("pods_brief", run, task) == next(x for x in log if x.startswith("receipt ")).removeprefix("receipt ")
    facts = platform.airflow.xcom("pods_brief", run, task, "facts")
    assert facts["spawned"] <= facts["ended"]
    assert not facts["adopted"]
    # Nothing of the pod's spec: neither variables nor the Secret's name.
    assert [line for line in log if "forja-lake" in line or "FORJA_KAFKA" in line or "kafka.forja.svc" in line] == []
    assert work.starts == 1
    again = platform.trigger("pods_brief", work.conf)
    assert platform.wait("pods_brief", again) == "success"
    assert any(
        line.startswith("adopted: ") for line in platform.airflow.log("pods_brief", again, platform.tasks("pods_brief", again)["transform"])
    )
    assert work.starts == 1
    assert left(platform, work) == []


def test_a_slow_stage_gives_its_slot_back_and_tells_its_log_meanwhile(platform: Platform, tenants: None) -> None:
    work = pod_work.new(platform, "wait")
    run = platform.trigger("pods_again", work.conf)
    platform.wait_task("pods_again", run, "transform", "deferred")
    platform.until("the log to be told", lambda: f"works on version {work.version}" in platform.log("pods_again", run, "transform"))
    assert platform.tasks("pods_again", run)["transform"].state == "deferred"
    work.go()
    assert platform.wait("pods_again", run) == "success", platform.log("pods_again", run, "transform")
    lines = platform.airflow.log("pods_again", run, platform.tasks("pods_again", run)["transform"])
    for text in ("works on version", "is done", "written"):
        assert sum(text in line for line in lines) == 1, lines  # told once, whoever told it
    assert (work.starts, left(platform, work)) == (1, [])


@pytest.mark.parametrize("dag", WRONG)
def test_what_is_wrong_is_told(dag: str, platform: Platform, wrong: dict[str, tuple[str, pod_work.Work]]) -> None:
    run, work = wrong[dag]
    assert platform.wait(dag, run, 240) == "failed"
    task = platform.tasks(dag, run)["transform"]
    lines = platform.airflow.log(dag, run, task)
    reason = next(line for line in reversed(lines) if line.startswith(("AirflowException: ", "AirflowFailException: ")))
    for words in WRONG[dag][1]:
        assert words in reason
    assert len(reason) < 600  # a reason, not a dump
    assert [line for line in lines if "kafka.forja.svc" in line or "forja-lake" in line] == []
    assert work.starts == (WRONG[dag][0] != "")
    assert left(platform, work) == []


def test_a_stage_waits_for_room_in_its_tenants_quota(platform: Platform, tenants: None) -> None:
    """A GPU of the device plugin that only pretends; the quota and its refusal are the API server's own."""
    platform.kube.create(holding(CROWDED, gpus=1))
    work = pod_work.new(platform)
    run = platform.trigger("pods_crowded", work.conf)
    platform.wait_task("pods_crowded", run, "transform", "deferred")
    assert "waits: exceeded quota: gpus" in platform.log("pods_crowded", run, "transform")
    assert work.starts == 0
    platform.kube.delete("Pod", "holder", CROWDED, grace_s=0)
    assert platform.wait("pods_crowded", run) == "success", platform.log("pods_crowded", run, "transform")
    assert (work.starts, left(platform, work)) == (1, [])
