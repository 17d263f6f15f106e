"""The way back of a change that failed: the layout before, the operator's pods and the node's schedulability."""

from __future__ import annotations

import dataclasses
import time

from forja.errors import Conflict, ForjaError, Refused
from forja.kube import Kube
from forja.mig import change as steps
from forja.mig import node, probe
from forja.mig.change import Change
from forja.mig.drain import Say
from forja.mig.node import CONFIG, STATE, Node, Record


def revert(kube: Kube, change: Change, say: Say, *, adopt: bool = False) -> bool:
    """Put back what a failed change has changed: the layout and the operator's pods before it, and the node's schedulability.

    An API server that doesn't answer is waited for, as long as the deadline of the way back.

    Args:
        adopt: also a change of somebody else whose lease has ended.

    Returns:
        False when there is nothing of this change to take back.

    Raises:
        Refused: the resources before didn't come back within the deadline. The node stays cordoned and the record says so:
            run it again. With ``adopt`` also: the change is somebody else's, and its lease holds.
    """
    ends, begun = time.monotonic() + change.times.revert_s, False
    while True:
        try:
            if node.ANNOTATION not in (node.fetch(kube, change.node)["metadata"].get("annotations") or {}):
                # Said of whatever node: one that a change refused from the start was never touched.
                say(f"node {change.node} is back" if begun else f"nothing to take back on node {change.node}: no change is open")
                return begun
            if adopt:
                _adopt(kube, change, say)
            begun = True
            return _revert(kube, change, say)
        except ForjaError as error:
            if time.monotonic() > ends or not steps.away(error):
                raise
            say(str(error))
            time.sleep(steps.POLL_S)


def _adopt(kube: Kube, change: Change, say: Say) -> None:
    """Take over a change of somebody else that has shown no sign of life for as long as its lease."""
    for _ in range(node.TRIES):
        found = node.look(kube, change.node)
        record = found.record
        if record is None or record.holder == change.holder:
            return
        left = record.until - time.time()
        if left > 0:
            raise Refused(
                f"{found.title} is being changed to {record.layout}", value=record.holder, allowed="a change without a sign of life",
                do=f"wait: it is at step {record.step}; without a sign of life it can be taken back in {left:.0f} s",
            )  # fmt: skip
        try:
            node.swap(kube, found, dataclasses.replace(record, holder=change.holder, until=time.time() + node.LEASE_S))
        except Conflict:
            continue
        say(f"takes over the change to {record.layout} that {record.holder} left at step {record.step}")
        return
    raise node.busy(change.node)


def _revert(kube: Kube, change: Change, say: Say) -> bool:
    found = node.look(kube, change.node)
    record = found.record
    if record is None or record.holder != change.holder:
        say(f"nothing to take back on {found.title}: {'no change is open' if record is None else 'its change is of ' + record.holder}")
        return False
    if record.step in ("cordon", "drain"):
        steps.give_back(kube, change, say, f"layout {record.before or 'without a label'} was left alone")
        return True
    _go_back(kube, change, record, say)
    return True


def _go_back(kube: Kube, change: Change, record: Record, say: Say) -> None:
    """Have mig-manager bring the layout before back; without its help when it wedges, for then nothing was cut."""
    found = node.look(kube, change.node)
    # Without a label before, what the node offered says which layout it had: taking a label away brings nothing back.
    back = record.before or node.offering(found, record.offered, change.known)
    say(f"goes back to {back or 'no label'}")
    ends = time.monotonic() + change.times.verify_s
    probe.clear(kube, change.probe, change.node, lambda: steps.alive(kube, change), ends=ends)
    steps.ask(kube, change, back, "revert", say)
    good = [dict(record.offered)]
    if back in change.known:  # where the node didn't offer before what its label promised
        good.append(node.wanted(found, back, change.known))

    def settled(n: Node) -> bool:
        return n.offers in good and not n.paused and (n.state in ("success", "failed") or not back)

    found = steps.wait(kube, change, settled, change.times.revert_s, say)
    if found.paused:
        # Not earlier: a manager that is only slow must not meet the device plugin while it cuts.
        say(f"restores {', '.join(found.paused)}, which mig-manager left paused")
        node.persist(kube, change.node, change.holder, "revert", steps.restored(found, record))
    # The last labels to come back are those of gpu-feature-discovery. A node without them is put back all the same.
    found = steps.wait(kube, change, lambda n: n.offers in good and n.labelled, change.times.verify_s, say)
    if found.offers not in good:
        raise Refused(
            f"{found.title} is left cordoned: what it offered before didn't come back within {change.times.revert_s:.0f} s",
            value=node.said(found.offers), allowed=node.said(record.offered),
            do=f"look at mig-manager (it says {found.state or 'nothing'}), then ./forja mig revert --node {found.name}",
        )  # fmt: skip
    ends = time.monotonic() + change.times.verify_s
    probe.run(kube, change.probe, change.node, found.offers, say, lambda: steps.alive(kube, change), ends=ends)
    if not record.before:
        node.persist(kube, change.node, change.holder, "revert", {CONFIG: None, STATE: None})
    sure = found.state == "success" or not back
    doubt = "" if sure else f"; mig-manager has not confirmed it (it says {found.state or 'nothing'})"
    doubt += "" if found.labelled else "; the labels of gpu-feature-discovery have not come back"
    steps.give_back(kube, change, say, f"the layout before is in force: {node.said(found.offers)}{doubt}")
