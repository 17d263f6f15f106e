"""Parts die under a running pod: its work goes on, is done once and counts. And when a person or the cluster ends the pod, it is gone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from cluster import access, pod_work
from cluster.kit.node import Node
from cluster.platform import Platform
from cluster.pods_fixtures import NAMESPACE, ended, left, of, tenants

from forja.services import supervisor

__all__ = ["tenants"]

TASK = "transform"


def restart_kubelet(platform: Platform, node: Node) -> None:
    node.restart("kubelet", signal.SIGKILL)


def killer(part: str) -> Callable[[Platform, Node], None]:
    def kill(platform: Platform, node: Node) -> None:
        platform.kill(part)
        platform.wait_part(part)

    return kill


@pytest.mark.parametrize(
    "kill",
    [killer("airflow-triggerer"), killer("airflow-scheduler"), restart_kubelet],
    ids=["triggerer", "scheduler", "kubelet"],
)
def test_a_deferred_task_outlives(kill: Callable[[Platform, Node], None], platform: Platform, tenants: None, node: Node) -> None:
    work, run = started(platform, "pods_again")
    platform.wait_task("pods_again", run, TASK, "deferred")
    kill(platform, node)
    work.go()
    done_once(platform, "pods_again", run, work, tries=1)


def test_a_pod_that_ended_while_nobody_looked_counts(platform: Platform, tenants: None) -> None:
    work, run = started(platform, "pods_again")
    platform.wait_task("pods_again", run, TASK, "deferred")
    for part in ("airflow-triggerer", "airflow-scheduler"):
        supervisor.stop_program(platform.settings, part)
    work.go()
    ended(platform, work)
    for part in ("airflow-triggerer", "airflow-scheduler"):
        supervisor.start_program(platform.settings, part)
    done_once(platform, "pods_again", run, work, tries=1)


@pytest.mark.parametrize("whose", ["task", "worker"])
def test_a_task_that_dies_beside_its_pod_adopts_it(whose: str, platform: Platform, tenants: None) -> None:
    """While the task itself waits: its process, or that of LocalExecutor's worker and with it the task's."""
    work, run = started(platform, "pods_brief")
    worker, task = platform.task_processes("pods_brief", run, TASK)
    os.kill(worker if whose == "worker" else task, signal.SIGKILL)
    platform.until("the second try", lambda: platform.tasks("pods_brief", run)[TASK].tries == 2)
    told = "was left by an earlier try and is Running: it is adopted"
    platform.until("the second try to adopt the pod", lambda: told in platform.log("pods_brief", run, TASK))
    work.go()
    done_once(platform, "pods_brief", run, work, tries=2)


def test_a_pod_that_ended_beside_a_dead_task_counts(platform: Platform, tenants: None) -> None:
    work, run = started(platform, "pods_brief")
    _, task = platform.task_processes("pods_brief", run, TASK)
    os.kill(task, signal.SIGSTOP)
    work.go()
    ended(platform, work)
    os.kill(task, signal.SIGKILL)
    done_once(platform, "pods_brief", run, work, tries=2)


def test_a_worker_that_is_stopped_leaves_the_pod_alone(platform: Platform, tenants: None) -> None:
    """SIGTERM, as a worker gets when it is replaced: the task gives its slot back, and the pod goes on."""
    work, run = started(platform, "pods_brief")
    os.kill(platform.task_processes("pods_brief", run, TASK)[1], signal.SIGTERM)
    platform.wait_task("pods_brief", run, TASK, "deferred")
    assert "this process is told to end; the pod goes on" in platform.log("pods_brief", run, TASK)
    work.go()
    done_once(platform, "pods_brief", run, work, tries=1)


@pytest.mark.parametrize("how", ["deleted", "killed"])
def test_a_pod_that_is_ended_by_the_cluster_is_told_and_tried_again(how: str, platform: Platform, tenants: None, node: Node) -> None:
    work, run = started(platform, "pods_again")
    platform.wait_task("pods_again", run, TASK, "deferred")
    (pod,) = of(platform, work)
    if how == "deleted":
        platform.kube.delete("Pod", pod["metadata"]["name"], NAMESPACE)
    else:
        kill_stage(work)
    work.wait_started(2)
    work.go()
    done_once(platform, "pods_again", run, work, tries=2, starts=2)
    told = "it was deleted" if how == "deleted" else "stage ended with status 137 (signal 9)"
    assert told in platform.log("pods_again", run, TASK, tries=1)


@pytest.mark.parametrize("dag", ["pods_again", "pods_brief"])
def test_a_person_who_ends_the_task_ends_its_pod(dag: str, platform: Platform, tenants: None) -> None:
    """Deferred, and while the task itself waits."""
    work, run = started(platform, dag)
    if dag == "pods_again":
        watched(platform, dag, run)
    platform.end_task(dag, run, TASK)
    platform.until("the pod to be gone", lambda: of(platform, work) == [])
    assert platform.wait(dag, run) == "failed"
    assert (platform.tasks(dag, run)[TASK].state, work.starts) == ("failed", 1)


@pytest.mark.parametrize("dag", ["pods_again", "pods_brief"])
def test_a_person_who_clears_the_task_gets_a_new_pod_after_the_old_one(dag: str, platform: Platform, tenants: None) -> None:
    work, run = started(platform, dag)
    (old,) = of(platform, work)
    if dag == "pods_again":
        watched(platform, dag, run)
    platform.clear_task(dag, run, TASK)
    work.wait_started(2)
    (new,) = of(platform, work)
    assert new["metadata"]["uid"] != old["metadata"]["uid"]
    work.go()
    done_once(platform, dag, run, work, tries=2, starts=2)


def test_nothing_was_refused_to_the_launcher_in_any_task(platform: Platform) -> None:
    """Of all stages in pods that ran on this platform until now: its name with a refusal of RBAC would stand in a log."""
    account = f"system:serviceaccount:forja:{access.accounts()['kubernetes_default']}"
    logs = [p for name in ("pods_", "digits") for p in (platform.settings.state / "airflow" / "logs").glob(f"dag_id={name}*/**/*.log")]
    texts = {str(path): path.read_text(errors="replace") for path in logs}
    assert [path for path, text in texts.items() if account in text and " cannot " in text] == []


def started(platform: Platform, dag: str) -> tuple[pod_work.Work, str]:
    """A run whose stage works in its pod until it is told to go on."""
    work = pod_work.new(platform, "wait")
    run = platform.trigger(dag, work.conf)
    work.wait_started()
    return work, run


def watched(platform: Platform, dag: str, run: str) -> None:
    """Wait until the triggerer watches the pod: a task that is ended between its deferral and that moment has nobody to tell the pod."""
    platform.wait_task(dag, run, TASK, "deferred")
    platform.until("the trigger to watch", lambda: "Checking pod" in platform.log(dag, run, TASK))


def done_once(platform: Platform, dag: str, run: str, work: pod_work.Work, *, tries: int, starts: int = 1) -> None:
    """The run ends well, after as many tries; the work was begun as often as said, and nothing of it is left."""
    assert platform.wait(dag, run) == "success", platform.log(dag, run, TASK)
    found = platform.tasks(dag, run)[TASK].tries
    assert (found, work.starts) == (tries, starts), "\n\n".join(platform.log(dag, run, TASK, n + 1) for n in range(found))
    assert left(platform, work) == []


def kill_stage(work: pod_work.Work) -> None:
    """SIGKILL to the stage's process in its pod."""
    raw = f"raw={work.conf['raw']}".encode()
    found = [int(p.parent.name) for p in pod_work.command_lines() if raw in p.read_bytes().split(b"\0")]
    assert len(found) == 1
    os.kill(found[0], signal.SIGKILL)
