"""A gang of two pods that trains, through Airflow's scheduler: members killed and stopped, and ends that are no success."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from cluster import gangs
from cluster.dags.gang import NAMESPACE, RECIPE, STEP_S
from cluster.platform import Platform

from forja import receipts

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def tenant(platform: Platform) -> Iterator[None]:
    """The namespace of the gangs."""
    with gangs.tenant(platform):
        yield


@pytest.fixture(scope="module")
def untrained(platform: Platform) -> str:
    """A dataset for gangs that never train."""
    return gangs.dataset(platform)


def test_members_are_lost_and_training_goes_on(platform: Platform, tenant: None) -> None:
    with gangs.Watch(platform.kube, NAMESPACE) as seen:
        run = platform.trigger("gang_train", {"dataset": gangs.dataset(platform)})
        platform.until("the first steps", gangs.steps(seen, 0), 180)
        folder = f"vision/slow/train/{seen.key()}"
        platform.until("a checkpoint", lambda: any("/checkpoint-" in p for p in platform.lake.list(folder)), 120)
        killed = gangs.send(seen.member(1), signal.SIGKILL, b"forja.training.rank")
        platform.until("steps after the first restart", gangs.steps(seen, 1), 180)
        print(f"rank of member 1 killed: first step of all {gangs.restart_s(seen, 1, killed):.1f} s later")
        platform.kill("airflow-scheduler")
        killed = gangs.send(seen.member(0), signal.SIGSTOP)
        platform.until("steps after the second restart", gangs.steps(seen, 2), 180 + STEP_S)
        print(f"member 0 stood still: first step of all {gangs.restart_s(seen, 2, killed):.1f} s later, {STEP_S} s of them to notice")
        assert platform.wait("gang_train", run, 400) == "success", platform.log("gang_train", run, "train") + seen.text()
        platform.until("everything of the gang to be gone", lambda: not gangs.left(platform), 60)
    first, second, third = ([step.epoch for step in seen.steps(attempt)] for attempt in range(3))
    assert first == [1, 1]
    assert 1 < second[0] == second[1] <= third[0] == third[1], "all members go on from one checkpoint, and not from zero"
    assert len(seen.pods) == 6, "two members in each of three attempts"
    assert len(seen.digests()) == 2
    assert len(set(seen.digests())) == 1
    log = platform.log("gang_train", run, "train")
    assert "the gang begins again from its newest checkpoint, restart 2 of 3" in log
    task = platform.tasks("gang_train", run)["train"]
    receipt = receipts.load(platform.lake, platform.airflow.xcom("gang_train", run, task))
    assert (receipt.facts["nodes"], receipt.facts["ranks"]) == (2, 2)
    assert receipt.facts["resumed_after_epoch"] == third[0] - 1
    assert receipt.metrics["validation_accuracy"] > 0.95
    assert f"epoch {RECIPE.training.epochs}/{RECIPE.training.epochs}" in log, "member 0's log is the task's"


def test_a_task_ended_by_a_person_ends_its_gang(platform: Platform, tenant: None) -> None:
    with gangs.Watch(platform.kube, NAMESPACE) as seen:
        run = platform.trigger("gang_train", {"dataset": gangs.dataset(platform)})
        platform.until("the first steps", gangs.steps(seen, 0), 180)
        folder = f"vision/slow/train/{seen.key()}"
        platform.end_task("gang_train", run, "train")
        platform.until("everything of the gang to be gone", lambda: not gangs.left(platform), 60)
    assert platform.wait("gang_train", run) == "failed"
    platform.until("the claim to be released", lambda: not any("/claim-" in p for p in platform.lake.list(folder)), 30)


@pytest.mark.parametrize(
    ("dag", "kind", "said"),
    [
        ("gang_gpu", "AirflowException", ("the gang never ran", "had no node within 8 s", "Insufficient nvidia.com/gpu")),
        (
            "gang_quota",
            "AirflowException",
            ("the gang never ran: 1 of 2 pods were made within 8 s: FailedCreate", "exceeded quota: forja-gpu"),
        ),
        ("gang_refused", "AirflowFailException", ("no restart can mend it", "BadInput: what it was given is wrong")),
        ("gang_broken", "AirflowFailException", ("it has used up its restarts", "it broke")),
    ],
)
def test_a_gang_that_fails_says_why(platform: Platform, tenant: None, untrained: str, dag: str, kind: str, said: tuple[str, ...]) -> None:
    run = platform.trigger(dag, {"dataset": untrained})
    assert platform.wait(dag, run, 180) == "failed"
    log = platform.log(dag, run, "train")
    assert f"{kind}: the gang" in log, log
    for words in said:
        assert words in log
    assert ("restart 1 of 1" in log) is (dag == "gang_broken")
    platform.until("everything of the gang to be gone", lambda: not gangs.left(platform), 60)
