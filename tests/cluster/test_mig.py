"""Changes of MIG layouts on simulated nodes: kwok plays the node, cluster/mig_manager.py the manager; eviction and scheduling are real."""

from __future__ import annotations

import subprocess
import threading
from typing import Any

import pytest
from cluster.kit.places import ROOT
from cluster.mig import ADMIN, BALANCED, WHOLE, gpu, here, probes, quick, run_on, running, space, state, template, told
from cluster.mig_manager import managing, wait_until

from forja import kube as k8s
from forja.errors import BadInput, ForjaError, Refused, Unavailable
from forja.mig import change as steps
from forja.mig import drain, revert, whole
from forja.mig import node as nodes
from forja.mig.node import ANNOTATION

__all__ = ["gpu", "here", "space", "told"]


def test_there_and_back(kube: k8s.Kube, gpu: str, space: str, told: list[str]) -> None:
    """Whole GPUs to slices and back; the pods that use them go, the others stay."""
    before = state(kube, gpu)
    run_on(kube, space, gpu)
    run_on(kube, space, gpu, "log", resource="")
    with managing(ADMIN, gpu) as manager:
        assert whole.make(kube, quick(gpu, "balanced"), told.append) == "changed"
        after = state(kube, gpu)
        assert after == {**before, "label": "balanced", "offers": BALANCED}
        assert nodes.differs(nodes.look(kube, gpu), "balanced", quick(gpu, "balanced").known) == []
        assert (running(kube, space), len(running(kube, space, "log"))) == ([], 1)
        assert any(line.startswith("evicted") for line in told)
        assert "simulated node" in told[0]
        assert any("asked for one each of nvidia.com/mig-1g.10gb, nvidia.com/mig-2g.20gb" in line for line in told)

        assert whole.make(kube, quick(gpu, "balanced"), told.append) == "in force"
        assert manager.asked == ["balanced"], "what is in force is not asked for again"
        assert whole.make(kube, quick(gpu, "all-disabled"), told.append) == "changed"
    assert state(kube, gpu) == before
    wait_until(lambda: running(kube, space), "the evicted pod's Deployment runs again")
    assert probes(kube) == []


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        pytest.param("lies", "is not in force .* says success", id="lies: success at once, nothing changed"),
        pytest.param("short", "is not in force", id="short: one slice too few"),
        pytest.param("wedges", "no answer|'pending'", id="wedges: pending for ever, operator's pods paused"),
        pytest.param("wedges once", "no answer|'pending'", id="wedges once: helps again after the next change"),
        pytest.param("fails", "'failed'", id="fails: state failed, always"),
        pytest.param("fails once", "'failed'", id="fails once: goes back well"),
    ],
)
def test_bad_managers_leave_the_layout_before_and_a_schedulable_node(
    kube: k8s.Kube, gpu: str, space: str, told: list[str], mode: str, reason: str
) -> None:
    before = state(kube, gpu)
    run_on(kube, space, gpu)
    times = steps.Times(drain_s=6, apply_s=1.5 if mode.startswith("wedges") else 10, verify_s=2, revert_s=2)
    with managing(ADMIN, gpu, mode) as manager:
        with pytest.raises(Refused, match=reason) as refused:
            whole.make(kube, quick(gpu, "balanced", times=times), told.append)
        assert ("is left cordoned" in str(refused.value)) == (mode == "short")
        assert manager.asked[:2] == ["balanced", "all-disabled"]
    if mode == "short":  # it goes back one short, too: neither layout is in force, and a node cut by half takes no pods
        now = state(kube, gpu)
        assert (now["unschedulable"], now["record"].step) == (True, "revert")
        with managing(ADMIN, gpu):  # mended, and the way back is taken again
            assert revert.revert(kube, quick(gpu, "", "test"), told.append)
    assert state(kube, gpu) == before, "\n".join(told)
    assert any("is schedulable; the layout before is in force" in line for line in told)
    wait_until(lambda: running(kube, space), "the pod is back")
    assert probes(kube) == []


@pytest.mark.parametrize("mode", ["slow", "late"])
def test_managers_that_take_their_time_are_waited_for(kube: k8s.Kube, gpu: str, told: list[str], mode: str) -> None:
    with managing(ADMIN, gpu, mode):
        assert whole.make(kube, quick(gpu, "halves"), told.append) == "changed"
    assert state(kube, gpu)["offers"] == {"nvidia.com/mig-3g.40gb": 4}


def test_a_slow_manager_that_misses_the_deadline_is_brought_back(kube: k8s.Kube, gpu: str, told: list[str]) -> None:
    before = state(kube, gpu)
    times = steps.Times(drain_s=6, apply_s=1, verify_s=5, revert_s=20)
    with managing(ADMIN, gpu, "slow"):
        with pytest.raises(Refused, match="pending"):
            whole.make(kube, quick(gpu, "balanced", times=times), told.append)
        assert state(kube, gpu) == before, "\n".join(told)


def test_a_node_without_a_label_goes_back_to_what_it_offered(kube: k8s.Kube, gpu: str, told: list[str]) -> None:
    """Taking the label away would leave the slices: the way back is asked for by name, and the label goes in the end."""
    kube.patch("Node", gpu, {"metadata": {"labels": {nodes.CONFIG: None, nodes.STATE: None}}})
    before = state(kube, gpu)
    with managing(ADMIN, gpu, "short once") as manager:
        with pytest.raises(Refused, match="is not in force"):
            whole.make(kube, quick(gpu, "balanced", times=steps.Times(verify_s=2)), told.append)
        assert manager.asked == ["balanced", "all-disabled"]
    assert state(kube, gpu) == before, "\n".join(told)


class Restarting(k8s.Kube):
    """A connection whose API server is away for three requests after each label that is set."""

    away = 0

    def request(self, method: str, path: str, *arguments: Any, **options: Any) -> Any:
        """No answer while it is away."""
        if self.away:
            self.away -= 1
            raise Unavailable("the Kubernetes API doesn't answer")
        answer = super().request(method, path, *arguments, **options)
        if method == "PATCH" and nodes.CONFIG in arguments[0]["metadata"].get("labels", {}):
            self.away = 3
        return answer


def test_an_api_server_that_restarts_meanwhile_is_waited_for(kube: k8s.Kube, gpu: str, told: list[str]) -> None:
    with managing(ADMIN, gpu):
        assert whole.make(Restarting(kube._client), quick(gpu, "balanced"), told.append) == "changed"
    assert any("doesn't answer" in line for line in told)


def test_no_manager_at_all(kube: k8s.Kube, gpu: str, told: list[str]) -> None:
    before = state(kube, gpu)
    times = steps.Times(drain_s=6, apply_s=1, verify_s=5, revert_s=1)
    with pytest.raises(Refused, match="no answer"):
        whole.make(kube, quick(gpu, "balanced", times=times), told.append)
    assert state(kube, gpu) == before
    assert "mig-manager has not confirmed it (it says nothing)" in told[-1]


def test_verifying_by_the_label_alone_would_believe_a_liar(
    kube: k8s.Kube, gpu: str, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant shows that it is the look at allocatable that catches it: nothing else of the change does."""

    def by_label(kube: k8s.Kube, change: steps.Change, say: drain.Say) -> None:
        assert nodes.look(kube, change.node).state == "success"
        nodes.persist(kube, change.node, change.holder, "verified")

    with managing(ADMIN, gpu, "lies"):
        with monkeypatch.context() as mutated:
            mutated.setattr(steps, "verify", by_label)
            assert whole.make(kube, quick(gpu, "balanced"), told.append) == "changed"
        assert state(kube, gpu)["offers"] == WHOLE, "nothing was cut, and the mutant said changed"
        with pytest.raises(Refused, match=r"balanced is not in force .* says success"):
            whole.make(kube, quick(gpu, "balanced", times=steps.Times(verify_s=1, revert_s=2)), told.append)


def test_a_stale_success_does_not_count(kube: k8s.Kube, gpu: str, told: list[str]) -> None:
    """The node is labelled for a layout, with success, and offers another: assert says no, and the change asks again."""
    kube.patch("Node", gpu, {"metadata": {"labels": {nodes.CONFIG: "balanced", nodes.STATE: "success"}}})
    assert any("allocatable is 2 x gpu" in line for line in nodes.differs(nodes.look(kube, gpu), "balanced", quick(gpu, "balanced").known))
    with managing(ADMIN, gpu) as manager:
        assert whole.make(kube, quick(gpu, "balanced"), told.append) == "changed"
        assert manager.asked == ["balanced"], "the value was there, so it had to go and come back"
    assert state(kube, gpu)["offers"] == BALANCED


def test_a_budget_that_forbids_the_drain_stops_the_change(kube: k8s.Kube, gpu: str, space: str, told: list[str]) -> None:
    run_on(kube, space, gpu, replicas=2)
    budget = {"minAvailable": 2, "selector": {"matchLabels": {"app": "train"}}}
    kube.create({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "all", "namespace": space}, "spec": budget})
    wait_until(
        lambda: (kube.get("PodDisruptionBudget", "all", space) or {}).get("status", {}).get("currentHealthy") == 2, "the budget counts"
    )
    before, pods = state(kube, gpu), sorted(running(kube, space))
    with managing(ADMIN, gpu) as manager, pytest.raises(Refused, match="violate the pod's disruption budget"):
        whole.make(kube, quick(gpu, "balanced", times=steps.Times(drain_s=1.5)), told.append)
    assert manager.asked == []
    assert state(kube, gpu) == before
    assert ANNOTATION not in (kube.get("Node", gpu) or {})["metadata"]["annotations"]
    assert sorted(running(kube, space)) == pods
    assert any(line.startswith("may not go") for line in told)

    kube.delete("PodDisruptionBudget", "all", space)
    with managing(ADMIN, gpu):
        assert whole.make(kube, quick(gpu, "balanced"), told.append) == "changed"


def test_a_pod_that_nothing_would_start_again_stops_the_drain(kube: k8s.Kube, gpu: str, space: str, told: list[str]) -> None:
    naked = {"apiVersion": "v1", "kind": "Pod", **template(gpu, "naked")}
    naked["metadata"] |= {"name": "naked", "namespace": space}
    kube.create(naked)
    wait_until(lambda: running(kube, space, "naked"), "the pod runs")
    before = state(kube, gpu)
    with managing(ADMIN, gpu):
        with pytest.raises(Refused, match="naked"):
            whole.make(kube, quick(gpu, "balanced"), told.append)
        assert state(kube, gpu) == before
        assert running(kube, space, "naked") == ["naked"]
        assert whole.make(kube, quick(gpu, "balanced", force=True), told.append) == "changed"
    assert running(kube, space, "naked") == []


def test_pods_of_daemon_sets_stay(kube: k8s.Kube, gpu: str, space: str, told: list[str]) -> None:
    spec = {"selector": {"matchLabels": {"app": "agent"}}, "template": template(gpu, "agent", resource="")}
    body = {"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "agent", "namespace": space}, "spec": spec}
    kube.request("POST", f"/apis/apps/v1/namespaces/{space}/daemonsets", body)
    wait_until(lambda: running(kube, space, "agent"), "the agent runs")
    agents = running(kube, space, "agent")
    with managing(ADMIN, gpu):
        assert whole.make(kube, quick(gpu, "balanced", everything=True), told.append) == "changed"
    assert running(kube, space, "agent") == agents


def test_a_cordon_of_somebody_else_stays(kube: k8s.Kube, gpu: str, told: list[str]) -> None:
    kube.patch("Node", gpu, {"spec": {"unschedulable": True}})
    with managing(ADMIN, gpu):
        whole.make(kube, quick(gpu, "halves"), told.append)
        assert state(kube, gpu)["unschedulable"] is True
    with managing(ADMIN, gpu, "fails"), pytest.raises(Refused):
        whole.make(kube, quick(gpu, "balanced"), told.append)
    assert state(kube, gpu)["unschedulable"] is True


def test_two_changes_at_once(kube: k8s.Kube, gpu: str) -> None:
    """Of four that begin in the same moment one wins; the others are refused, and say by whom."""
    start, ended = threading.Barrier(4), {}

    def change(number: int) -> None:
        start.wait()
        try:
            steps.cordon(kube, quick(gpu, "balanced", f"person-{number}"), lambda _: None)
            ended[number] = "won"
        except ForjaError as error:
            ended[number] = str(error)

    threads = [threading.Thread(target=change, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    winner = next(n for n, said in ended.items() if said == "won")
    assert sum(said == "won" for said in ended.values()) == 1
    assert all(f"person-{winner}" in said and "one change at a time" in said for n, said in ended.items() if n != winner), ended
    mine = state(kube, gpu)
    for work in (steps.drain, steps.apply, steps.verify, steps.uncordon):
        with pytest.raises(Refused, match="no longer this one's"):
            work(kube, quick(gpu, "halves", "somebody"), lambda _: None)
    assert revert.revert(kube, quick(gpu, "halves", "somebody"), lambda _: None) is False
    assert state(kube, gpu) == mine


def test_a_change_without_a_sign_of_life_is_taken_over(kube: k8s.Kube, gpu: str, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(kube, gpu)
    with monkeypatch.context() as short:
        short.setattr(nodes, "LEASE_S", -1.0)
        steps.cordon(kube, quick(gpu, "balanced", "dead"), told.append)
    with managing(ADMIN, gpu):
        assert whole.make(kube, quick(gpu, "halves", "alive"), told.append) == "changed"
        assert any("takes over the change to balanced that dead left" in line for line in told)
        with pytest.raises(Refused, match=r"no longer this one's|no change"):
            steps.apply(kube, quick(gpu, "balanced", "dead"), told.append)
    assert state(kube, gpu) == {**before, "label": "halves", "offers": {"nvidia.com/mig-3g.40gb": 4}}


@pytest.mark.parametrize(
    ("labels", "layout", "reason"),
    [
        ({"nvidia.com/mig.strategy": "single"}, "balanced", "mig.strategy of node .*allowed: mixed"),
        ({"nvidia.com/mig.strategy": None}, "balanced", "'none'"),
        ({"nvidia.com/gpu.product": "NVIDIA-L40S"}, "balanced", "NVIDIA-L40S"),
        ({"nvidia.com/gpu.count": None}, "balanced", "gpu.count"),
        ({"nvidia.com/gpu.product": "NVIDIA-A30"}, "train-and-serve", "GPU 0 of 2 x a30"),
        ({}, "tiny", "allowed: all-disabled"),
    ],
)
def test_what_is_wrong_from_the_start_changes_nothing(kube: k8s.Kube, gpu: str, labels: dict[str, Any], layout: str, reason: str) -> None:
    kube.patch("Node", gpu, {"metadata": {"labels": labels}})
    with pytest.raises(BadInput, match=reason):
        whole.make(kube, quick(gpu, layout), lambda _: None)
    found = kube.get("Node", gpu) or {}
    assert ANNOTATION not in found["metadata"]["annotations"]
    assert "unschedulable" not in found["spec"]
    assert found["metadata"]["labels"][nodes.CONFIG] == "all-disabled"


def test_the_command_line(kube: k8s.Kube, gpu: str, here: dict[str, str]) -> None:
    def forja(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [ROOT / "forja", "mig", *arguments, "--kubeconfig", ADMIN, "--node", gpu]
        return subprocess.run(
            command, env={**here, "FORJA_MIG_TIMES": "apply_s=20,verify_s=10"}, capture_output=True, text=True, check=False
        )

    assert forja("assert", "balanced").returncode == 3
    diff = forja("diff", "balanced")
    assert "simulated node" in diff.stdout
    assert "nvidia.com/mig-3g.40gb" in diff.stdout
    assert "GPU 0 to 1" in forja("plan", "balanced").stdout
    with managing(ADMIN, gpu):
        done = forja("apply", "balanced", "--json")
    assert done.returncode == 0, done.stderr
    assert '"outcome": "changed"' in done.stdout
    assert '"simulated": true' in done.stdout
    assert forja("assert", "balanced").returncode == 0
    assert "nothing to take back" in forja("revert").stdout
