"""A node as a change of its MIG layout sees it, and the record of a change that is kept on it.

What is true of a node is what it has to offer (``status.allocatable``), never what a label says of it: mig-manager's ``success``
stays from the change before until it reacts. https://github.com/NVIDIA/gpu-operator/issues/2833
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from forja.errors import BadInput, Conflict, Refused
from forja.kube import ApiError, Kube, Object
from forja.mig import layouts, picture, planner, tables
from forja.mig.tables import GPUS, Gpu, of_product

CONFIG = "nvidia.com/mig.config"
"""Label that asks mig-manager for a layout; it reacts only when the value changes."""

STATE = "nvidia.com/mig.config.state"
"""Label that mig-manager answers with: pending, rebooting, success or failed."""

DEPLOY = "nvidia.com/gpu.deploy."
"""Beginning of the labels that keep the operator's pods on a node; mig-manager pauses them during a change."""

PAUSED = "paused-for-mig-change"
PRODUCT, COUNT, STRATEGY = "nvidia.com/gpu.product", "nvidia.com/gpu.count", "nvidia.com/mig.strategy"
"""Labels of gpu-feature-discovery. It takes them away when it ends, which mig-manager makes it do for the time of a change."""

SHARING = "nvidia.com/gpu.sharing-strategy"
ANNOTATION = "forja.dev/mig-change"
"""Annotation that holds the record of a change under way: one node, one change."""

LEASE_S = 300.0
"""Seconds that a record holds without a sign of life. Clocks of machines that change nodes must agree to well within that."""

TRIES = 20
"""Writes that may lose their race before it counts as an error."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A change under way: who makes it, how far it is, and all that must be put back if it fails."""

    holder: str
    layout: str
    step: str
    until: float
    """When somebody else may take over, seconds since 1970."""
    before: str
    """Value of the label before; empty when there was none."""
    offered: Mapping[str, int]
    """Allocatable GPU resources before."""
    cordoned: bool
    """Whether the node was schedulable before, so that lifting the cordon is ours."""
    gpu: str
    """Name of the node's GPUs in the table. It and their number hold while the labels that say so are away."""
    count: int
    deploy: Mapping[str, str] = field(default_factory=dict)
    """Labels ``nvidia.com/gpu.deploy.*`` before."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a change needs to know of a node."""

    name: str
    gpu: Gpu
    count: int
    """GPUs."""
    labelled: bool
    """Whether gpu-feature-discovery says what the node is; without its labels, the record of a change under way does."""
    label: str
    state: str
    offers: Mapping[str, int]
    """Allocatable GPU resources, none of them 0."""
    unschedulable: bool
    deploy: Mapping[str, str]
    record: Record | None
    version: str
    """resourceVersion, for compare-and-swap."""
    simulated: bool
    """Whether kwok plays the node: nothing runs there."""

    @property
    def paused(self) -> list[str]:
        """Labels of operator pods that are still paused."""
        return sorted(k for k, v in self.deploy.items() if v == PAUSED)

    @property
    def title(self) -> str:
        """How outputs name it."""
        return f"{'simulated ' if self.simulated else ''}node {self.name} ({self.count} x {self.gpu.name})"


def look(kube: Kube, name: str) -> Node:
    """Read a node.

    Raises:
        BadInput: no such node, no GPU of the table on it, or a device plugin that shares GPUs or whose strategy isn't mixed.
    """
    return read(fetch(kube, name))


def fetch(kube: Kube, name: str) -> Object:
    """The API's object of a node; BadInput when there is none."""
    found = kube.get("Node", name)
    if found is None:
        raise BadInput("node", value=name, allowed="a node of the cluster")
    return found


def read(found: Object) -> Node:
    """The same from the API's object."""
    meta, labels = found["metadata"], found["metadata"].get("labels") or {}
    annotations, name = meta.get("annotations") or {}, meta["name"]
    record = _record(name, annotations.get(ANNOTATION))
    gpu, count = (tables.gpu(record.gpu), record.count) if record else _described(name, labels)
    offered = found.get("status", {}).get("allocatable") or {}
    return Node(
        name=name, gpu=gpu, count=count, labelled={PRODUCT, COUNT, STRATEGY} <= labels.keys(), label=labels.get(CONFIG, ""),
        state=labels.get(STATE, ""), offers={k: int(v) for k, v in sorted(offered.items()) if gpu_resource(k) and int(v)},
        unschedulable=bool(found.get("spec", {}).get("unschedulable")),
        deploy={k: v for k, v in sorted(labels.items()) if k.startswith(DEPLOY)},
        record=record, version=meta["resourceVersion"], simulated=annotations.get("kwok.x-k8s.io/node") == "fake",
    )  # fmt: skip


def _described(name: str, labels: Mapping[str, str]) -> tuple[Gpu, int]:
    """Kind and number of a node's GPUs by its labels."""
    product, count, strategy = labels.get(PRODUCT, ""), labels.get(COUNT, ""), labels.get(STRATEGY, "none")
    gpu, sharing = of_product(product), labels.get(SHARING, "none")
    if strategy != "mixed":
        # With single, all slices of a node look like whole GPUs: neither a profile nor its number can be read from resources.
        raise BadInput(
            f"mig.strategy of node {name}", value=strategy, allowed="mixed",
            do="helm upgrade the GPU operator with mig.strategy=mixed, and see that gpu-feature-discovery runs: it writes the label",
        )  # fmt: skip
    if sharing != "none":
        # Each of them is offered several times, as often as the device plugin's configuration says.
        raise BadInput(f"label {SHARING} of node {name}", value=sharing, allowed="none", do="end the sharing of its GPUs first")
    if gpu is None:
        raise BadInput(
            f"label {PRODUCT} of node {name}", value=product, allowed=", ".join(p for g in GPUS.values() for p in g.products),
            do="add the product to include/forja/mig/tables.py",
        )  # fmt: skip
    if not count.isdecimal() or int(count) == 0:
        raise BadInput(f"label {COUNT} of node {name}", value=count, allowed="1 or more", do="see gpu-feature-discovery")
    return gpu, int(count)


def gpu_resource(name: str) -> bool:
    """Whether a resource is a GPU or a slice of one."""
    return name == layouts.WHOLE or name.startswith("nvidia.com/mig-")


def wanted(node: Node, name: str, known: layouts.Layouts) -> dict[str, int]:
    """What the node offers when the layout called ``name`` is in force."""
    return layouts.resources(name, layouts.pick(known, name), node.gpu, node.count)


def offering(node: Node, offers: Mapping[str, int], known: layouts.Layouts) -> str:
    """Name of a layout that makes the node offer this; empty when none does."""
    for name, entries in known.items():
        try:
            if layouts.resources(name, entries, node.gpu, node.count) == offers:
                return name
        except BadInput:  # it is for other GPUs
            continue
    return ""


def bars(node: Node, name: str, known: layouts.Layouts) -> list[picture.Bar]:
    """The GPUs of the node as the layout called ``name`` cuts them, to be drawn."""
    entries = layouts.of_gpus(name, layouts.pick(known, name), node.gpu, node.count)
    return picture.grouped([(planner.plan(node.gpu, e.instances), "" if e.enabled else "whole") for e in entries])


def differs(node: Node, name: str, known: layouts.Layouts) -> list[str]:
    """What keeps a layout from being in force on a node; empty when it is."""
    offer = wanted(node, name, known)
    found = []
    if node.label != name:
        found.append(f"label {CONFIG} is {node.label or 'not there'}, not {name}")
    if node.offers != offer:
        found.append(f"allocatable is {said(node.offers)}, not {said(offer)}")
    if node.state != "success":
        found.append(f"label {STATE} is {node.state or 'not there'}, not success")
    if node.paused:
        found.append(f"paused: {', '.join(node.paused)}")
    if node.record is not None:
        found.append(f"a change to {node.record.layout} by {node.record.holder} is open at step {node.record.step}")
    return found


def said(offers: Mapping[str, int]) -> str:
    """Resources in words."""
    return ", ".join(f"{n} x {r.removeprefix('nvidia.com/')}" for r, n in sorted(offers.items())) or "no GPU"


def swap(kube: Kube, node: Node, record: Record | None, *, labels: Mapping[str, str | None] | None = None, **spec: Any) -> Object:
    """Write the record with labels and fields of the spec, all at once, if nobody changed the node since it was looked at.

    Returns:
        The node as the API has it now.

    Raises:
        Conflict: somebody did.
    """
    change: Object = {
        "metadata": {"resourceVersion": node.version, "annotations": {ANNOTATION: None if record is None else _text(record)}},
        "spec": spec,
    }
    if labels:
        change["metadata"]["labels"] = dict(labels)
    try:
        return kube.patch("Node", node.name, change)
    except ApiError as error:
        if error.status == 409:
            raise Conflict(f"node {node.name} was changed meanwhile", do="look again") from error
        raise


def persist(kube: Kube, name: str, holder: str, step: str, labels: Mapping[str, str | None] | None = None) -> Node:
    """Note a step of one's own change, renew its lease, and write labels with it.

    The kubelet and others write to nodes all the time, so a lost race is tried again; a change that isn't one's own any more is not.
    """
    for _ in range(TRIES):
        node = look(kube, name)
        record = dataclasses.replace(own(node, holder), step=step, until=time.time() + LEASE_S)
        try:
            return read(swap(kube, node, record, labels=labels))
        except Conflict:
            continue
    raise busy(name)


def own(node: Node, holder: str) -> Record:
    """The record of the holder's change.

    Raises:
        Refused: no change is under way, or somebody else's.
    """
    if node.record is None:
        raise Refused(f"no change of {node.title} is under way", allowed="a change that cordon began", do="start again")
    if node.record.holder != holder:
        raise Refused(
            f"the change of {node.title} is no longer this one's", value=node.record.holder, allowed=holder,
            do="leave it to them, or start again when they have ended",
        )  # fmt: skip
    return node.record


def busy(name: str) -> Conflict:
    """What is raised when every write of a few lost its race."""
    return Conflict(f"node {name} changes too often to write to", do="try again")


def pods_on(kube: Kube, name: str) -> Sequence[Object]:
    """Pods of a node that have not ended."""
    found = kube.list("Pod", fields=f"spec.nodeName={name}")
    return [p for p in found if p.get("status", {}).get("phase") not in ("Succeeded", "Failed")]


def _record(name: str, text: str | None) -> Record | None:
    if not text:
        return None
    try:
        return Record(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise BadInput(
            f"annotation {ANNOTATION} of node {name}", value=text[:200], allowed="a record of this version",
            do=f"see what was changed, then remove it: kubectl annotate node {name} {ANNOTATION}-",
        ) from error  # fmt: skip


def _text(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record), sort_keys=True)
