"""Finding the pod that an earlier try of a task left, and making a new one beside none that is left; no spec goes into any log."""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from airflow.providers.cncf.kubernetes.kubernetes_helper_functions import generic_api_retry
from airflow.providers.cncf.kubernetes.operators.pod import POD_IDENTIFIER_STATE_KEY
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException
from urllib3.exceptions import HTTPError

from forja_airflow.pods import reason
from forja_airflow.pods.times import GRACE_S

if TYPE_CHECKING:
    from airflow.sdk import Context

Call = TypeVar("Call", bound=Callable[..., Any])

KEY = "forja/key"
"""Label of a pod: the key of its work."""

ROOM_S = 15
"""Seconds between two tries while the tenant's quota has no room."""

FINAL = (400, 403, 404, 422)
"""Statuses with which the API refuses to make something, where no retry helps. A token that it doesn't know, 401, may be a new one soon."""

patient = cast("Callable[[Call], Call]", generic_api_retry)
"""Again, a few times, when the API is busy or away."""

QUOTA = re.compile(r"exceeded quota: (.+)")


def left(operator: Any, context: Context) -> Any:
    """The pod that an earlier try left, running or ended; None when there is none.

    One that is being deleted is waited for, unless its node is lost and nobody could say when it ends: the stage's claim keeps the two
    apart. One that does other work, since the code or the inputs changed, is deleted, and so are all but the oldest that do this work.
    """
    for _ in range(2):
        pods = _pods(operator, context)
        leaving = [p for p in pods if p.metadata.deletion_timestamp and not reason.lost(p)]
        if not leaving:
            break
        for pod in leaving:
            _await_gone(operator, pod, context)
    there = [p for p in pods if not p.metadata.deletion_timestamp]
    mine = [p for p in there if p.metadata.labels.get(KEY) == operator.labels[KEY]]
    mine.sort(key=lambda p: p.metadata.creation_timestamp)
    for pod in there:
        if pod not in mine[:1]:
            why = "is a second one for this work" if pod in mine else "does other work than this task now asks for"
            operator.log.info("pod %s %s: it is deleted", pod.metadata.name, why)
            _delete(operator, pod)
            _await_gone(operator, pod, context)
    if not mine:
        return None
    operator.log.info("pod %s was left by an earlier try and is %s: it is adopted", mine[0].metadata.name, mine[0].status.phase)
    operator._persist_pod_identity_to_task_state_store(context, mine[0])
    return mine[0]


def remove(operator: Any, context: Context) -> None:
    """Delete what an earlier try left, when the work is known to be done; a cluster that is away doesn't undo it."""
    if context["ti"].try_number == 1:
        return
    try:
        for pod in _pods(operator, context):
            _delete(operator, pod)
    except (ApiException, HTTPError, ConfigException, AirflowException) as error:
        operator.log.warning("what an earlier try left can't be removed: %s", getattr(error, "reason", error))


def create(operator: Any, request: Any, context: Context) -> Any:
    """Make the pod.

    Raises:
        TaskDeferred: the tenant's quota has no room now: the task waits for it without a slot.
        AirflowFailException: the API refuses it in a way that no retry mends.
        AirflowException: the quota had no room for ``queue_timeout_s`` seconds, or the API doesn't answer.
    """
    # Known before it is made: a try that dies in between leaves no pod that isn't found.
    operator._persist_pod_identity_to_task_state_store(context, request)
    try:
        made = _post(operator, request)
    except ApiException as error:
        _refused(operator, error, context)
    operator.log.info("pod %s/%s is made, image %s", made.metadata.namespace, made.metadata.name, operator.image)
    return made


def events(operator: Any, name: str, namespace: str) -> Sequence[Any]:
    """Events of a pod; none when they can't be read."""
    try:
        return _events(operator, name, namespace)
    except (ApiException, HTTPError) as error:
        operator.log.warning("the pod's events can't be read: %s", getattr(error, "reason", error))
        return []


@patient
def _events(operator: Any, name: str, namespace: str) -> Sequence[Any]:
    found: Sequence[Any] = operator.client.list_namespaced_event(namespace, field_selector=f"involvedObject.name={name}").items
    return found


@patient
def _post(operator: Any, request: Any) -> Any:
    body = operator.client.api_client.sanitize_for_serialization(request)
    try:
        return operator.client.create_namespaced_pod(request.metadata.namespace, body)
    except ApiException as error:
        # The name is new and random: what has it is what this very request made when its answer was lost.
        if error.status == 409 and "already exists" in str(error.body):
            return operator.client.read_namespaced_pod(request.metadata.name, request.metadata.namespace)
        raise


def _refused(operator: Any, error: ApiException, context: Context) -> None:
    message = _message(error)
    quota = QUOTA.search(message)
    if error.status == 403 and quota:
        _await_room(operator, quota[1], context)
    if error.status in FINAL:
        raise AirflowFailException(f"the cluster refuses the pod: {error.status} {error.reason}: {message}") from None
    raise AirflowException(f"the cluster didn't make the pod: {error.status} {error.reason}: {message}") from None


def _await_room(operator: Any, quota: str, context: Context) -> None:
    from airflow.providers.standard.triggers.temporal import DateTimeTrigger

    if hopeless(quota):
        raise AirflowFailException(f"exceeded quota: {quota}; to do: ask for less in the stage's profile, or for a larger quota") from None
    if waited_s(context) + ROOM_S > operator.schedule_timeout_seconds:
        raise AirflowException(f"no room within {operator.schedule_timeout_seconds} s: exceeded quota: {quota}") from None
    operator.log.info("waits: exceeded quota: %s", quota)
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ROOM_S)
    operator.defer(trigger=DateTimeTrigger(moment), method_name="execute")


def waited_s(context: Context) -> float:
    """Seconds since this try of the task began."""
    began: datetime.datetime = context["ti"].start_date
    return (datetime.datetime.now(datetime.UTC) - began).total_seconds()


def hopeless(quota: str) -> bool:
    """Whether a request is above the quota itself, whatever others use.

    Args:
        quota: the API's words: ``NAME, requested: RESOURCE=QUANTITY,..., used: ..., limited: ...``.
    """
    from kubernetes.utils.quantity import parse_quantity

    parts = re.search(r"requested: (.+), used: .+, limited: (.+)$", quota)
    if parts is None:
        return False
    asked, limited = (dict(p.split("=", 1) for p in text.split(",")) for text in parts.groups())
    return any(parse_quantity(value) > parse_quantity(limited[name]) for name, value in asked.items() if name in limited)


@patient
def _pods(operator: Any, context: Context) -> list[Any]:
    """All pods of this task that no try has dealt with: that of the task state store, and those with its labels."""
    labels = operator._get_ti_pod_labels(context, include_try_number=False)
    selector = ",".join([*(f"{k}={v}" for k, v in sorted(labels.items())), f"{operator.POD_CHECKED_KEY}!=True"])
    found = operator.client.list_namespaced_pod(operator.namespace, label_selector=selector).items
    stored = _stored(operator, context)
    if stored is not None and stored.metadata.uid not in {p.metadata.uid for p in found}:
        theirs = stored.metadata.labels or {}
        # A name alone doesn't say whose pod it is.
        if all(theirs.get(k) == v for k, v in labels.items()) and theirs.get(operator.POD_CHECKED_KEY) != "True":
            found.append(stored)
    return list(found)


def _stored(operator: Any, context: Context) -> Any:
    """The pod that the task state store names, when it is there."""
    store = context.get("task_state_store")
    told = store.get(POD_IDENTIFIER_STATE_KEY) if store is not None else None
    if not isinstance(told, dict):
        return None
    try:
        return operator.hook.get_pod(told["name"], told["namespace"])
    except ApiException as error:
        if error.status != 404:
            raise
        return None


def _delete(operator: Any, pod: Any) -> None:
    operator.pod_manager.delete_pod(pod)


def _await_gone(operator: Any, pod: Any, context: Context) -> None:
    """Wait until a pod that is being deleted is gone, at most for its grace period and some seconds."""
    deadline = time.monotonic() + GRACE_S + 15
    operator.log.info("waits: pod %s of an earlier try is being deleted", pod.metadata.name)
    while time.monotonic() < deadline:
        try:
            if operator.hook.get_pod(pod.metadata.name, pod.metadata.namespace).metadata.uid != pod.metadata.uid:
                return
        except ApiException as error:
            if error.status == 404:
                return
            raise
        operator.heed(context)
        time.sleep(0.5)


def _message(error: ApiException) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.body or "")[:300]
