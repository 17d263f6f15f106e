"""Why a pod waits, and why it failed: the one line that a person needs, from the pod's status and its events."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any

from forja_airflow import said
from forja_airflow.pods.times import LOST_S

LONGEST = 400
"""Most characters of a reason."""

TAIL = re.compile(r",? (preemption: .*|no new claims to deallocate.*)$")
"""End of the scheduler's message that says nothing about what is missing."""

PULL = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
STARTING = ("ContainerCreating", "PodInitializing")
"""Reasons of a container that only takes its time."""

ENDS = ("Killing", "Preempted", "Evicted", "TaintManagerEviction", "NodeNotReady", "Preempting")
"""Events that tell who ended a pod."""


def waits(pod: Any) -> str:
    """What a pending pod waits for; empty when it has a node and nothing is wrong."""
    status = pod.status
    for condition in status.conditions or ():
        if condition.type == "PodScheduled" and condition.status != "True" and condition.message:
            return _short(TAIL.sub("", condition.message.replace("\n", " ")))
    for container in status.container_statuses or ():
        waiting = container.state.waiting if container.state else None
        if waiting and waiting.reason and waiting.reason not in STARTING:
            return _short(f"{waiting.reason}: {_waiting(container, waiting)}")
    return ""


def why(pod: Any, events: Sequence[Any] = ()) -> str:
    """Why a pod failed, or what it still waited for when it was given up.

    Args:
        pod: as the API gave it last.
        events: of the pod, in any order.
    """
    ended = next((c for c in pod.status.container_statuses or () if c.state and c.state.terminated), None)
    if pod.status.reason:  # Evicted, DeadlineExceeded, Preempting: the kubelet's own
        return _short(f"{pod.status.reason}: {pod.status.message or ''}")
    if ended is not None and ended.state.terminated.reason == "OOMKilled":
        limit = _limit(pod, ended.name)
        return f"OOMKilled: the stage needed more than its {limit}; to do: raise memory_gib of its profile in the site file"
    if ended is not None and ended.state.terminated.exit_code:
        return _short(said.of((ended.state.terminated.message or "").strip().splitlines()) or f"{ended.state.terminated.reason or 'Error'}")
    found = waits(pod)
    warning = _newest(e for e in events if e.type == "Warning" and e.reason not in ("FailedScheduling", "Failed", "BackOff"))
    return found or (_short(f"{warning.reason}: {warning.message}") if warning else f"the pod is {pod.status.phase}")


def vanished(events: Sequence[Any]) -> str:
    """Why a pod isn't there any more, from the events that it left."""
    told = _newest(e for e in events if e.reason in ENDS)
    return "it was deleted" + (_short(f": {told.reason}: {told.message}") if told else " by somebody, or with its node")


def lost(pod: Any) -> bool:
    """Whether a pod went with its node: its deletion, grace period included, is long over, and nobody saw its container end.

    It stays "Running" for ever, until the node comes back or somebody deletes it by force.
    """
    if pod.metadata.deletion_timestamp is None:
        return False
    ended = any(c.state and c.state.terminated for c in (pod.status.container_statuses if pod.status else None) or ())
    return not ended and (datetime.datetime.now(datetime.UTC) - pod.metadata.deletion_timestamp).total_seconds() > LOST_S


def _waiting(container: Any, waiting: Any) -> str:
    message = str(waiting.message or "")
    return f"image {container.image}: {message}" if waiting.reason in PULL and container.image not in message else message


def _limit(pod: Any, name: str) -> str:
    limits = next((c.resources.limits for c in pod.spec.containers if c.name == name and c.resources), None) or {}
    return f"{limits['memory']} of memory" if "memory" in limits else "memory"


def _newest(events: Any) -> Any:
    return max(events, key=lambda e: str(e.last_timestamp or e.event_time or e.metadata.creation_timestamp), default=None)


def _short(text: str) -> str:
    text = " ".join(text.split()).rstrip(": ")
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
