"""The change of a node from one MIG layout to another, step by step: cordon, drain, apply, verify, uncordon. The way back is in
``forja.mig.revert``.

Every step may be killed and done again. What is needed to go back lies on the node itself (``node.Record``), written together with
the first thing that is changed, so a change that died is taken over by the next one and still goes back to the layout before it.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from forja.errors import BadInput, Conflict, ForjaError, Refused, Unavailable
from forja.kube import ApiError, Kube
from forja.mig import drain as drains
from forja.mig import layouts, node, probe
from forja.mig.drain import Say
from forja.mig.node import CONFIG, PAUSED, STATE, Node, Record

POLL_S = 1.0
"""Seconds between two looks at a node."""

ASKED = ("apply", "verified", "revert")
"""Steps at which mig-manager may have been asked for something already."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Deadlines of the steps, in seconds. Those of a real node are minutes: mig-manager waits up to five for each of the
    operator's pods, and may reboot the node."""

    drain_s: float = 1800.0
    apply_s: float = 1200.0
    verify_s: float = 300.0
    """For the device plugin to offer the new resources, and for the probe to run."""
    revert_s: float = 1200.0

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Times:
        """Those that ``FORJA_MIG_TIMES`` names differ, for example ``drain_s=3600,apply_s=600``.

        Raises:
            BadInput: it names something else, or no number above 0.
        """
        given = (os.environ if env is None else env).get("FORJA_MIG_TIMES", "")
        known, found = [f.name for f in dataclasses.fields(cls)], {}
        for word in filter(None, given.split(",")):
            name, _, number = word.strip().partition("=")
            try:
                found[name] = float(number)
            except ValueError:
                found[name] = -1.0
            if name not in known or not found[name] > 0:
                raise BadInput("environment variable FORJA_MIG_TIMES", value=word, allowed=f"NAME=SECONDS of {', '.join(known)}")
        return cls(**found)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change: which node, to what, by whom."""

    node: str
    layout: str
    holder: str
    """Who makes it. Steps of one change name the same holder; while its lease holds, others are refused."""
    known: layouts.Layouts
    """The layouts that the cluster's mig-manager knows."""
    times: Times = field(default_factory=Times)
    everything: bool = False
    """Drain all pods, not only those that use a GPU."""
    force: bool = False
    """Drain also pods that nothing starts again."""
    probe: probe.Probe = field(default_factory=probe.Probe)


def cordon(kube: Kube, change: Change, say: Say) -> None:
    """Take the node for this change and make it unschedulable, in one write.

    Raises:
        Refused: another change of it is under way.
        BadInput: no such node or layout, or one that the node's GPUs can't have.
    """
    for _ in range(node.TRIES):
        found = node.look(kube, change.node)
        node.wanted(found, change.layout, change.known)
        record = _claim(found, change, say)
        try:
            node.swap(kube, found, record, unschedulable=True)
        except Conflict:
            continue
        say(f"{found.title} is cordoned{'' if record.cordoned else ', as it was before'}")
        return
    raise node.busy(change.node)


def _claim(found: Node, change: Change, say: Say) -> Record:
    """The record to write: a new one, or the one that is there with what it remembers."""
    old, until = found.record, time.time() + node.LEASE_S
    if old is None:
        # A wedge before this change has paused them; what else they were isn't known.
        deploy = {k: "true" if v == PAUSED else v for k, v in found.deploy.items()}
        return Record(
            holder=change.holder, layout=change.layout, step="cordon", until=until, before=found.label, offered=found.offers,
            cordoned=not found.unschedulable, deploy=deploy, gpu=found.gpu.name, count=found.count,
        )  # fmt: skip
    if old.holder != change.holder and old.until > time.time():
        raise Refused(
            f"{found.title} is being changed to {old.layout}", value=old.holder, allowed="one change at a time",
            do=f"wait: it is at step {old.step}; without a sign of life it can be taken over in {old.until - time.time():.0f} s",
        )  # fmt: skip
    say(f"takes over the change to {old.layout} that {old.holder} left at step {old.step}")
    step = "apply" if old.step in ASKED else "cordon"
    return dataclasses.replace(old, holder=change.holder, layout=change.layout, step=step, until=until)


def drain(kube: Kube, change: Change, say: Say) -> list[str]:
    """Evict the pods that use the node's GPUs; see ``forja.mig.drain``. Gives the pods that left."""
    step = node.own(node.look(kube, change.node), change.holder).step
    node.persist(kube, change.node, change.holder, step if step in ASKED else "drain")
    return drains.drain(
        kube,
        change.node,
        say,
        lambda: alive(kube, change),
        deadline_s=change.times.drain_s,
        everything=change.everything,
        force=change.force,
    )


def apply(kube: Kube, change: Change, say: Say) -> None:
    """Ask mig-manager for the layout and wait for its answer.

    Raises:
        Refused: it failed, or gave no answer within the deadline.
    """
    found = node.look(kube, change.node)
    asked = node.own(found, change.holder).step in ASKED and found.label == change.layout
    if not asked or found.state == "failed":
        ask(kube, change, change.layout, "apply", say)
    found = wait(kube, change, lambda n: n.state in ("success", "failed"), change.times.apply_s, say)
    if found.state != "success":
        raise Refused(
            f"mig-manager on {found.title}, asked for {change.layout}", value=found.state or "no answer",
            allowed=f"success within {change.times.apply_s:.0f} s", do="read the log of the pod nvidia-mig-manager on the node",
        )  # fmt: skip


def ask(kube: Kube, change: Change, layout: str, step: str, say: Say, labels: Mapping[str, str | None] | None = None) -> None:
    """Set the label, and remove mig-manager's last answer, so that an old ``success`` can't be taken for a new one.

    It reacts to a change of the value only: one that is there already is taken away first. Without a layout the label goes.
    """
    clean: dict[str, str | None] = {STATE: None, **(labels or {})}
    if node.look(kube, change.node).label == layout:
        node.persist(kube, change.node, change.holder, step, {CONFIG: None, **clean})
    node.persist(kube, change.node, change.holder, step, {CONFIG: layout or None, **clean})
    say(f"label {CONFIG} is now {layout or 'not there'}")


def verify(kube: Kube, change: Change, say: Say) -> None:
    """See for oneself that the layout is in force: allocatable resources are exactly its own, and a pod that asks for one of
    each is scheduled and runs.

    Raises:
        Refused: one of them isn't so within the deadline.
    """
    ends = time.monotonic() + change.times.verify_s
    offer = node.wanted(node.look(kube, change.node), change.layout, change.known)

    def good(n: Node) -> bool:
        return n.offers == offer and n.state == "success" and not n.paused and n.labelled

    found = wait(kube, change, good, change.times.verify_s, say)
    if not good(found):
        paused = f"; paused: {', '.join(found.paused)}" if found.paused else ""
        raise Refused(
            f"layout {change.layout} is not in force on {found.title}, whose mig-manager says {found.state or 'nothing'}",
            value=f"{node.said(found.offers)}{paused}{'' if found.labelled else '; no labels of gpu-feature-discovery'}",
            allowed=node.said(offer),
        )  # fmt: skip
    say(f"allocatable: {node.said(found.offers)}")
    probe.run(kube, change.probe, change.node, offer, say, lambda: alive(kube, change), ends=ends)
    node.persist(kube, change.node, change.holder, "verified")


def uncordon(kube: Kube, change: Change, say: Say) -> None:
    """Give the node back: the record goes, and the cordon if this change set it, in one write.

    Raises:
        Refused: the layout wasn't verified, or the change isn't this one's.
    """
    found = node.look(kube, change.node)
    if found.record is None and not node.differs(found, change.layout, change.known):
        say(f"{found.title} is back already")
        return
    step = node.own(found, change.holder).step
    if step != "verified":
        raise Refused(f"layout {change.layout} of {found.title}", value=step, allowed="verified", do="run verify first")
    give_back(kube, change, say, f"layout {change.layout} is in force")


def restored(found: Node, record: Record) -> dict[str, str | None]:
    """Labels that bring back the operator's pods, which a manager that wedged leaves paused for ever."""
    return {k: record.deploy.get(k, "true") for k in found.paused}


def give_back(kube: Kube, change: Change, say: Say, what: str) -> None:
    """Remove the record, the cordon if the change set it, and pauses that are left, in one write; ``what`` is told with it."""
    for _ in range(node.TRIES):
        found = node.look(kube, change.node)
        record = node.own(found, change.holder)
        spec = {"unschedulable": None} if record.cordoned else {}
        labels = restored(found, record) if found.paused else None
        try:
            node.swap(kube, found, None, labels=labels, **spec)
        except Conflict:
            continue
        kept = "schedulable" if record.cordoned else "still cordoned, as somebody left it before this change"
        say(f"{found.title} is {kept}; {what}")
        return
    raise node.busy(change.node)


def alive(kube: Kube, change: Change) -> Node:
    """The node, its lease renewed when half of it has passed; Refused once the change is somebody else's."""
    found = node.look(kube, change.node)
    record = node.own(found, change.holder)
    if record.until - time.time() < node.LEASE_S / 2:
        return node.persist(kube, change.node, change.holder, record.step)
    return found


def away(error: ForjaError) -> bool:
    """Whether the API server just didn't answer, or not as it should, and may do so later."""
    return isinstance(error, Unavailable) or (isinstance(error, ApiError) and error.passing)


def wait(kube: Kube, change: Change, done: Callable[[Node], bool], deadline_s: float, say: Say) -> Node:
    """The node as it is when ``done`` says so or the deadline has passed; what changes meanwhile is told.

    An API server that doesn't answer is waited for as well: a change that is under way can't be helped without it.
    """
    ends, told = time.monotonic() + deadline_s, ""
    while True:
        try:
            found = alive(kube, change)
        except ForjaError as error:
            if time.monotonic() > ends or not away(error):
                raise
            say(str(error))
            time.sleep(POLL_S)
            continue
        now = f"mig-manager says {found.state or 'nothing yet'}; allocatable: {node.said(found.offers)}"
        if now != told:
            say(now)
            told = now
        if done(found) or time.monotonic() > ends:
            return found
        time.sleep(POLL_S)
