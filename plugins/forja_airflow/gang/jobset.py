"""A gang of pods as a JobSet (https://jobset.sigs.k8s.io): its manifest, and what the cluster says of it.

A JobSet has what a gang needs and a Job lacks: names that pods find each other by, and a restart of all members when one fails.
Nothing here knows Airflow.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from forja import errors
from forja.errors import Conflict, ForjaError
from forja.kube import ApiError, Kube, Object, place
from forja.lake import canonical, sha256
from forja_airflow.pods.times import LOST_S, STARTUP_S

JOB = "gang"
"""Name of the JobSet's one replicated Job; pods are called ``<jobset>-gang-0-<member>``."""

PORT = 29500
"""Where member 0 listens: torchrun's own choice."""

GRACE_S = 5
"""Seconds that a member has to end: the others' restart waits for it."""

LATE_S = 60
"""Seconds from the end that Airflow sets a gang to the one that its Job sets: the latter is for a gang that Airflow has lost."""

KEEP_S = 86400
"""Seconds that a finished JobSet stays when nobody is left to remove it."""

HOPELESS = ("ErrImageNeverPull", "InvalidImageName", "CreateContainerConfigError")
"""Why a container waits, where more waiting doesn't help."""

NAME = "jobset.sigs.k8s.io/jobset-name"
UID = "jobset.sigs.k8s.io/jobset-uid"
ATTEMPT = "jobset.sigs.k8s.io/restart-attempt"
INDEX = "batch.kubernetes.io/job-completion-index"
SPEC = "forja/spec"
"""Annotation: digest of the specification that Forja asked for."""


@dataclass(frozen=True, kw_only=True)
class End:
    """How a gang ended: what to tell people, and the exit status that says whether another try can help."""

    code: int
    text: str


def name_of(recipe: str, key: str) -> str:
    """Name of the gang that does the work with this key: the same for every try, so it can't be there twice."""
    return f"{recipe.replace('_', '-')}-{key[:10]}"


def manifest(pod: Object, *, recipe: str, key: str, nodes: int, restarts: int, queue_s: int) -> Object:
    """The JobSet of a gang.

    Args:
        pod: the pod that would do this work alone, as JSON.
        nodes: members.
        restarts: how often the whole gang may begin again from its checkpoint.
        queue_s: seconds that a member waits for those that have no node yet.
    """
    name = name_of(recipe, key)
    labels = {k: v for k, v in pod["metadata"]["labels"].items() if k.startswith(("forja/", "app.kubernetes.io/"))}
    (container,) = pod["spec"]["containers"]
    container = {**container, "env": [*container.get("env", []), *_env(name, nodes, queue_s)]}
    # A member runs while it waits for those that have no node yet. Its own end comes last: by then nobody has ended the Job.
    most = pod["spec"]["activeDeadlineSeconds"] + queue_s + LATE_S
    spec = {**pod["spec"], "containers": [container], "terminationGracePeriodSeconds": GRACE_S, "activeDeadlineSeconds": most + LATE_S}
    final = sorted(kind.exit_code for kind in errors.BY_EXIT_CODE.values() if not kind.retry)
    job = {
        "completionMode": "Indexed", "completions": nodes, "parallelism": nodes, "backoffLimit": 0, "activeDeadlineSeconds": most,
        # What no retry mends ends the gang at once; anything else begins it again.
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onExitCodes": {"containerName": container["name"], "operator": "In", "values": final}}]
        },
        "template": {"metadata": {"labels": {**labels, "forja/gang": name}}, "spec": spec},
    }  # fmt: skip
    whole = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": restarts,
            "rules": [{"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"]}],
        },
        "ttlSecondsAfterFinished": KEEP_S,
        "replicatedJobs": [{"name": JOB, "replicas": 1, "template": {"spec": job}}],
    }
    meta = {"name": name, "namespace": pod["metadata"]["namespace"], "labels": labels, "annotations": {SPEC: sha256(canonical(whole))[:16]}}
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": meta, "spec": whole}


def _env(name: str, nodes: int, queue_s: int) -> list[Object]:
    """What ``forja.training.launch`` reads; an indexed Job adds the member's number itself."""

    def label(of: str) -> Object:
        return {"fieldRef": {"fieldPath": f"metadata.labels['{of}']"}}

    return [
        {"name": "FORJA_NODES", "value": str(nodes)},
        {"name": "FORJA_RENDEZVOUS", "value": f"{name}-{JOB}-0-0.{name}:{PORT}"},
        {"name": "FORJA_JOIN_S", "value": str(queue_s + STARTUP_S)},
        {"name": "FORJA_GANG", "valueFrom": label(UID)},
        {"name": "FORJA_GANG_ATTEMPT", "valueFrom": label(ATTEMPT)},
    ]


def submit(
    kube: Kube,
    wanted: Object,
    *,
    patience_s: float = 120,
    heed: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Object, str]:
    """Create the JobSet, or take over the one that does this very work; one that has ended makes room for it.

    To be called when there is no receipt, so that of one that completed nothing is left.

    Args:
        heed: called between tries; may raise.
        say: told what is done by force.

    Returns:
        The JobSet, and how it was taken over: empty for one that this call made.

    Raises:
        Conflict: its name is taken by other work, or an ended one doesn't go away.
    """
    meta = wanted["metadata"]
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            return kube.create(wanted), ""
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
        there = kube.get("JobSet", meta["name"], meta["namespace"])
        if there is None:
            continue
        if there["metadata"]["labels"].get("forja/key") != meta["labels"]["forja/key"]:
            raise Conflict(f"JobSet {meta['name']} in {meta['namespace']} does other work", do="remove it, if nobody waits for it")
        if not there["metadata"].get("deletionTimestamp"):
            if state(there) == "running":
                same = there["metadata"].get("annotations", {}).get(SPEC) == meta["annotations"][SPEC]
                return there, "as it is" if same else "though it was started with other settings"
            remove(kube, there)
        # It is gone only after all of its pods, and nobody else looks at them by now.
        for name in remove_lost(kube, pods(kube, there), time.time()):
            say(f"pod {name} is lost with its node and deleted by force")
        heed()
        time.sleep(0.5)
    raise Conflict(f"JobSet {meta['name']} in {meta['namespace']} ended and isn't gone", do="try again")


def remove(kube: Kube, jobset: Object) -> None:
    """Delete a JobSet, which is gone only after all of its pods; another one of the same name stays."""
    meta = jobset["metadata"]
    body = {"propagationPolicy": "Foreground", "preconditions": {"uid": meta["uid"]}}
    try:
        kube.request("DELETE", f"{place('JobSet', meta['namespace'])}/{meta['name']}", body)
    except ApiError as error:
        if error.status not in (404, 409):
            raise


def remove_done(kube: Kube, name: str, namespace: str, key: str) -> None:
    """Delete what is left of the gang that did this work."""
    there = kube.get("JobSet", name, namespace)
    if there is not None and there["metadata"]["labels"].get("forja/key") == key:
        remove(kube, there)


def remove_lost(kube: Kube, members: list[Object], now: float) -> list[str]:
    """Delete by force the members that were to end long ago and whose node doesn't say that they did; their names.

    The Job makes no new pod, and the JobSet no new Job, while the old ones are there.
    """
    names = []
    for pod in members:
        until = pod["metadata"].get("deletionTimestamp")
        if until and now - moment(until) > LOST_S and not ended(pod):
            names.append(pod["metadata"]["name"])
            kube.delete("Pod", pod["metadata"]["name"], pod["metadata"]["namespace"], grace_s=0)
    return names


def state(jobset: Object) -> str:
    """``completed``, ``failed`` or ``running``."""
    conditions = {c["type"]: c["status"] for c in jobset.get("status", {}).get("conditions", [])}
    return next((text for kind, text in (("Completed", "completed"), ("Failed", "failed")) if conditions.get(kind) == "True"), "running")


def pods(kube: Kube, jobset: Object) -> list[Object]:
    """The gang's pods, by member."""
    meta = jobset["metadata"]
    found = kube.list("Pod", meta["namespace"], labels=f"{UID}={meta['uid']}")
    return sorted(found, key=lambda pod: (int(pod["metadata"]["labels"].get(INDEX, 0)), pod["metadata"]["creationTimestamp"]))


def size(jobset: Object) -> int:
    """Members that the gang should have."""
    (job,) = jobset["spec"]["replicatedJobs"]
    return int(job["template"]["spec"]["completions"])


def held_up(kube: Kube, jobset: Object, members: list[Object], *, queue_s: int, lacking_s: float, now: float) -> str:
    """Why the gang has waited too long for a node or for its container, in the cluster's words; empty while it hasn't.

    Args:
        lacking_s: seconds that pods have been missing altogether, as they do when the tenant's quota has no room.
    """
    if len(members) < size(jobset) and lacking_s > queue_s:
        said = happened(kube, jobset, members) or "the cluster gives no reason"
        return f"{len(members)} of {size(jobset)} pods were made within {queue_s} s: {said}"
    for pod in members:
        name, age = pod["metadata"]["name"], now - moment(pod["metadata"]["creationTimestamp"])
        conditions = {c["type"]: c for c in pod.get("status", {}).get("conditions", [])}
        scheduled = conditions.get("PodScheduled", {})
        if scheduled.get("status") != "True":
            if pod["status"].get("phase") == "Pending" and age > queue_s:
                return f"pod {name} had no node within {queue_s} s: {scheduled.get('message') or 'the scheduler gives no reason'}"
            continue
        waits = next((s["state"]["waiting"] for s in pod["status"].get("containerStatuses", []) if s.get("state", {}).get("waiting")), None)
        if waits and (waits.get("reason") in HOPELESS or now - moment(scheduled["lastTransitionTime"]) > STARTUP_S):
            return f"container of pod {name} doesn't start: {waits.get('reason')} {waits.get('message', '')}".strip()
    return ""


def ended(pod: Object) -> Mapping[str, Any]:
    """The terminated state of the pod's container; empty while it runs."""
    states = (s.get("state", {}).get("terminated") for s in pod.get("status", {}).get("containerStatuses", []))
    return next((s for s in states if s), {})


def epitaph(kube: Kube, jobset: Object) -> End:
    """Why a gang failed: each member's exit status and last lines, and the warnings of its pods."""
    members = pods(kube, jobset)
    lines, codes = [], []
    for pod in members:
        end = ended(pod)
        if end.get("exitCode"):
            codes.append(end["exitCode"])
            said = (end.get("message") or "").strip().splitlines()[-5:]
            lines += [
                f"member {pod['metadata']['labels'].get(INDEX, '?')} ended with status {end['exitCode']} ({end.get('reason')}):",
                *said,
            ]
    conditions = [c for c in jobset.get("status", {}).get("conditions", []) if c["type"] == "Failed" and c["status"] == "True"]
    lines += [c["message"] for c in conditions]
    if warned := happened(kube, jobset, members):
        lines.append(warned)
    known = [c for c in codes if c in errors.BY_EXIT_CODE]
    final = [c for c in known if not errors.BY_EXIT_CODE[c].retry]
    # When one member fails, the others fail of its absence: what it said on purpose counts for more than how they ended.
    return End(code=(final or known or codes or [ForjaError.exit_code])[0], text="\n".join(lines) or "the cluster says nothing more")


def happened(kube: Kube, jobset: Object, members: list[Object]) -> str:
    """Warnings of the cluster about the gang, of each kind and thing the newest, newest last."""
    meta = jobset["metadata"]
    mine = {meta["name"], f"{meta['name']}-{JOB}-0", *(pod["metadata"]["name"] for pod in members)}
    found = [e for e in kube.list("Event", meta["namespace"], fields="type=Warning") if e["involvedObject"].get("name") in mine]
    found.sort(key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or "")
    return "; ".join({(e["reason"], e["involvedObject"]["name"]): f"{e['reason']}: {e['message']}" for e in found[-10:]}.values())


def moment(text: str) -> float:
    """Seconds since 1970 of a time as the API gives it."""
    return datetime.datetime.fromisoformat(text).timestamp()
