"""A node as the API gives it, which pods have to go, and how the probe looks. No cluster is asked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from forja.errors import BadInput, Refused
from forja.mig import drain, layouts, node, probe, whole
from forja.mig.node import ANNOTATION, CONFIG, STATE

RECORD = node.Record(
    holder="a",
    layout="balanced",
    step="apply",
    until=1.0,
    before="all-disabled",
    offered={"nvidia.com/gpu": 2},
    cordoned=True,
    deploy={},
    gpu="h100-80",
    count=2,
)


def found(
    labels: dict[str, str] | None = None, annotations: dict[str, str] | None = None, allocatable: dict[str, str] | None = None
) -> dict[str, Any]:
    """A node with two H100, whole."""
    usual = {
        "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3", "nvidia.com/gpu.count": "2", "nvidia.com/mig.strategy": "mixed",
        CONFIG: "all-disabled", STATE: "success", "nvidia.com/gpu.deploy.dcgm": "true",
    }  # fmt: skip
    meta = {"name": "n", "resourceVersion": "7", "labels": {**usual, **(labels or {})}, "annotations": annotations or {}}
    return {
        "metadata": meta,
        "spec": {},
        "status": {"allocatable": {"cpu": "8", "nvidia.com/gpu": "2"} if allocatable is None else allocatable},
    }


def test_what_is_read() -> None:
    one = node.read(found(allocatable={"nvidia.com/gpu": "0", "nvidia.com/mig-1g.10gb.me": "2", "memory": "1Gi"}))
    assert (one.gpu.name, one.count, one.label, one.state) == ("h100-80", 2, "all-disabled", "success")
    assert one.offers == {"nvidia.com/mig-1g.10gb.me": 2}, "a resource that is gone stays at 0"
    assert (one.unschedulable, one.simulated, one.record, one.version) == (False, False, None, "7")


def test_simulated_nodes_say_so_wherever_they_are_named() -> None:
    assert node.read(found(annotations={"kwok.x-k8s.io/node": "fake"})).title == "simulated node n (2 x h100-80)"
    assert node.read(found()).title == "node n (2 x h100-80)"


def test_a_record_is_read_as_it_was_written() -> None:
    text = json.dumps(dataclasses.asdict(RECORD))
    assert node.read(found(annotations={ANNOTATION: text})).record == RECORD


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": {"nvidia.com/mig.strategy": "single"}}, "allowed: mixed"),
        ({"labels": {"nvidia.com/gpu.product": "Tesla-T4"}}, "NVIDIA-A30"),
        ({"labels": {"nvidia.com/gpu.count": "0"}}, "1 or more"),
        ({"labels": {"nvidia.com/gpu.count": "two"}}, "1 or more"),
        ({"labels": {"nvidia.com/gpu.count": "²"}}, "1 or more"),
        ({"labels": {"nvidia.com/gpu.sharing-strategy": "mps"}}, "allowed: none"),
        ({"annotations": {ANNOTATION: "{"}}, "kubectl annotate node n"),
        ({"annotations": {ANNOTATION: '{"holder": "x"}'}}, "a record of this version"),
    ],
)
def test_nodes_that_no_change_may_touch(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        node.read(found(**change))


@pytest.mark.parametrize(
    ("change", "layout", "said"),
    [
        ({}, "all-disabled", ""),
        ({}, "balanced", "label nvidia.com/mig.config is all-disabled, not balanced"),
        ({"labels": {CONFIG: "balanced"}}, "balanced", "allocatable is 2 x gpu, not 4 x mig-1g.10gb, 2 x mig-2g.20gb, 2 x mig-3g.40gb"),
        ({"labels": {STATE: "pending"}}, "all-disabled", "is pending, not success"),
        ({"labels": {"nvidia.com/gpu.deploy.dcgm": "paused-for-mig-change"}}, "all-disabled", "paused: nvidia.com/gpu.deploy.dcgm"),
        ({"annotations": {ANNOTATION: json.dumps(dataclasses.asdict(RECORD))}}, "all-disabled", "open at step apply"),
        ({"allocatable": {"nvidia.com/gpu": "2", "nvidia.com/mig-1g.10gb": "1"}}, "all-disabled", "allocatable is"),
        ({"allocatable": {"nvidia.com/gpu": "1"}}, "all-disabled", "allocatable is 1 x gpu, not 2 x gpu"),
    ],
)
def test_a_layout_is_in_force_by_what_the_node_offers(change: dict[str, Any], layout: str, said: str) -> None:
    differences = node.differs(node.read(found(**change)), layout, layouts.load())
    assert bool(differences) == bool(said)
    assert said in "; ".join(differences)


def test_only_the_holder_goes_on() -> None:
    one = node.read(found(annotations={ANNOTATION: json.dumps(dataclasses.asdict(RECORD))}))
    assert node.own(one, "a") == RECORD
    with pytest.raises(Refused, match="no longer this one's"):
        node.own(one, "b")
    with pytest.raises(Refused, match="no change"):
        node.own(node.read(found()), "a")


def pod(
    *owners: str, gpu: str = "nvidia.com/gpu", where: str = "containers", part: str = "limits", amount: str = "1", **meta: Any
) -> dict[str, Any]:
    references = [{"kind": kind, "controller": True} for kind in owners]
    containers = [{"resources": {part: {gpu: amount} if gpu else {"cpu": "1"}}}]
    return {
        "metadata": {"namespace": "t", "name": "p", "ownerReferences": references, **meta},
        "spec": {"containers": [], where: containers},
    }


@pytest.mark.parametrize(
    ("one", "goes", "goes_with_everything", "is_lost"),
    [
        pytest.param(pod("ReplicaSet"), True, True, False, id="asks for a GPU"),
        pytest.param(pod("Job", gpu="nvidia.com/mig-1g.10gb.me"), True, True, False, id="asks for a slice"),
        pytest.param(pod("Job", part="requests"), True, True, False, id="by requests"),
        pytest.param(pod("Job", where="initContainers"), True, True, False, id="in an init container"),
        pytest.param(pod("ReplicaSet", amount="0"), False, True, False, id="asks for none"),
        pytest.param(pod("ReplicaSet", gpu=""), False, True, False, id="no GPU"),
        pytest.param(pod("ReplicaSet", gpu="nvidia.com/gpu.shared"), True, True, False, id="a share of a GPU"),
        pytest.param(pod("ReplicaSet", gpu="rdma/hca"), False, True, False, id="another device"),
        pytest.param(pod("ReplicaSet", gpu="", where="resourceClaims"), True, True, False, id="a claim"),
        pytest.param(pod("DaemonSet"), False, False, False, id="of a DaemonSet"),
        pytest.param(pod("Node", annotations={"kubernetes.io/config.mirror": "x"}), False, False, False, id="mirror pod"),
        pytest.param(pod(), True, True, True, id="nothing starts it again"),
        pytest.param(pod(labels={"app.kubernetes.io/managed-by": "forja"}), True, True, False, id="its Airflow task starts it again"),
    ],
)
def test_which_pods_go(one: dict[str, Any], goes: bool, goes_with_everything: bool, is_lost: bool) -> None:
    assert (bool(drain.victims([one])), bool(drain.victims([one], everything=True))) == (goes, goes_with_everything)
    assert bool(drain.lost([one])) == is_lost


def test_the_probe_asks_for_one_of_each_and_has_no_rights() -> None:
    offers = {"nvidia.com/mig-1g.10gb": 4, "nvidia.com/mig-3g.40gb": 2}
    spec = probe.manifest(probe.Probe(), "n.example.org", offers)["spec"]
    assert [c["resources"]["limits"] for c in spec["containers"]] == [{"cpu": "10m", "memory": "32Mi", r: "1"} for r in offers]
    assert spec["automountServiceAccountToken"] is False
    assert "nodeName" not in spec, "the scheduler has to agree"


def test_each_node_has_a_probe_of_its_own() -> None:
    """A change clears the probe that an earlier one left: it must never be that of another node."""
    long = "ip-10-0-0-1.eu-central-1.compute.internal.of.a.cluster.with.a.long.name"
    names = [probe.manifest(probe.Probe(), n, {"nvidia.com/gpu": 1})["metadata"]["name"] for n in (f"{long}-1", f"{long}-2", "a.b", "a-b")]
    assert len(set(names)) == 4


def test_one_process_of_a_machine_changes_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORJA_STATE", str(tmp_path))
    with whole.holder("n") as first, whole.holder("m") as other:
        assert first == other
        with pytest.raises(Refused, match="another process"), whole.holder("n"):
            pass
    with whole.holder("n"):
        pass


@pytest.mark.parametrize(
    ("offers", "name"),
    [
        ({"nvidia.com/gpu": 2}, "all-disabled"), ({}, "all-enabled"), ({"nvidia.com/mig-3g.40gb": 4}, "halves"),
        ({"nvidia.com/mig-3g.40gb": 3}, ""),
    ],
)  # fmt: skip
def test_the_layout_that_offers_something(offers: dict[str, int], name: str) -> None:
    assert node.offering(node.read(found()), offers, layouts.load()) == name
