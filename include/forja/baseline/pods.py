"""The probes' pods: started, read and deleted again, in two waves, since callers need the listeners' addresses."""

from __future__ import annotations

import datetime
import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forja.baseline import network
from forja.baseline.admission import restricted_pod
from forja.baseline.probes import Answer, Outcome
from forja.errors import ForjaError
from forja.kube import Kube, Object

LABEL = "forja.dev/probe"
"""Label of all pods of probes: which proof they belong to."""

WAVE_S = 45.0
"""Seconds that each wave of pods gets at most; on an idle machine one takes three."""
PATIENCE_S = 5.0
"""Seconds that a call gets to come out as it must."""
LIFE_S = 180
"""Seconds after which the kubelet ends a pod that nobody deleted."""
CALLS = 24
"""Calls of one pod: its termination message holds 4 KiB."""
THREADS = 6

STUCK = {
    "ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError",
    "RunContainerError", "CrashLoopBackOff",
}  # fmt: skip
"""Reasons of a waiting container that no waiting mends."""

AGENT = Path(__file__).with_name("agent.py")

Objects = dict[tuple[str, str], Object]
"""Pods by namespace and name."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One pod to start, and what is known when it couldn't be."""

    manifest: Object
    problem: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Namespace and name."""
        return self.manifest["metadata"]["namespace"], self.manifest["metadata"]["name"]


def run(kube: Kube, scene: network.Scene, image: str) -> dict[str, Answer]:
    """Answers to all calls of a scene, by name. No pod is left behind: those of a proof that was killed are deleted by the next."""
    proof = secrets.token_hex(3)
    places = sorted({s.namespace for s in scene.servers} | {c.client.namespace for c in scene.calls})
    with ThreadPoolExecutor(THREADS) as pool:
        made: list[Wanted] = []
        try:
            list(pool.map(lambda namespace: sweep(kube, namespace), places))
            servers = dict(zip(scene.servers, _start(kube, pool, [_server(s, proof, image) for s in scene.servers], made), strict=True))
            live = _wait(kube, pool, proof, servers.values(), _ready)
            answers = {s.ready: _listening(s, w, live.get(w.key)) for s, w in servers.items()}
            hosts = {s: str((live.get(w.key) or {}).get("status", {}).get("podIP") or "") for s, w in servers.items()}
            up = any(answers[s.ready].outcome is Outcome.SUCCEEDED for s in scene.servers)
            groups = list(_groups(scene.calls, answers)) if up else []  # what keeps all listeners from starting keeps callers too
            clients = _start(kube, pool, [_client(calls, n, hosts, proof, image) for n, calls in enumerate(groups)], made)
            live = _wait(kube, pool, proof, clients, _ended)
            for calls, wanted in zip(groups, clients, strict=True):
                answers.update(_answers(calls, wanted, live.get(wanted.key)))
        finally:
            list(pool.map(lambda w: _delete(kube, w), made))
    for call in scene.calls:
        if call.name not in answers:  # its listener isn't there, or none is
            listener = call.host if isinstance(call.host, network.Server) else scene.servers[0]
            answers[call.name] = Answer(outcome=Outcome.ERRED, said=f"not called: {answers[listener.ready].said}")
    return answers


def sweep(kube: Kube, namespace: str, older_s: float = 2 * LIFE_S) -> None:
    """Delete pods that proofs left which were killed. Those of a proof that runs beside this one are younger."""
    old = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=older_s)
    try:
        found = kube.list("Pod", namespace, labels=LABEL)
    except ForjaError:
        return  # what is wrong shows when pods are started
    for pod in found:
        if datetime.datetime.fromisoformat(pod["metadata"]["creationTimestamp"]) < old:
            _delete(kube, Wanted(manifest=pod))


def _groups(calls: Iterable[network.Call], answers: Mapping[str, Answer]) -> Iterable[list[network.Call]]:
    """Calls that can be made, by the pod that makes them."""
    by_client: dict[network.Client, list[network.Call]] = {}
    for call in calls:
        if isinstance(call.host, str) or answers[call.host.ready].outcome is Outcome.SUCCEEDED:
            by_client.setdefault(call.client, []).append(call)
    for mine in by_client.values():
        yield from (mine[at : at + CALLS] for at in range(0, len(mine), CALLS))


def _server(server: network.Server, proof: str, image: str) -> Object:
    pod = _pod(f"{server.role}-{proof}", server.namespace, server.labels, proof, image, {"listen": server.ports})
    pod["spec"]["containers"][0]["readinessProbe"] = {"tcpSocket": {"port": server.ports[0]}, "periodSeconds": 1, "timeoutSeconds": 1}
    return pod


def _client(calls: list[network.Call], number: int, hosts: Mapping[network.Server, str], proof: str, image: str) -> Object:
    client = calls[0].client
    spec = {
        "patience_s": PATIENCE_S,
        "calls": {
            str(n): [c.host if isinstance(c.host, str) else hosts[c.host], c.port, "refused" if c.refused else "succeeded"]
            for n, c in enumerate(calls)
        },
    }
    return _pod(f"{client.role}-{proof}-{number}", client.namespace, client.labels, proof, image, spec)


def _pod(name: str, namespace: str, labels: Mapping[str, str], proof: str, image: str, spec: Mapping[str, Any]) -> Object:
    pod = restricted_pod(f"forja-probe-{name}", namespace, image)
    pod["metadata"]["labels"] = {"app.kubernetes.io/managed-by": "forja-baseline", LABEL: proof, **labels}
    pod["spec"]["activeDeadlineSeconds"] = LIFE_S
    # A name that DNS doesn't answer for would hold a call up for half a minute.
    pod["spec"]["dnsConfig"] = {"options": [{"name": "timeout", "value": "1"}, {"name": "attempts", "value": "2"}]}
    pod["spec"]["containers"][0]["command"] = ["python3", "-c", AGENT.read_text(), json.dumps(spec)]
    return pod


def _start(kube: Kube, pool: ThreadPoolExecutor, manifests: list[Object], made: list[Wanted]) -> list[Wanted]:
    """Create pods; all are added to ``made`` first, since one whose answer was lost may be there."""

    def create(manifest: Object) -> Wanted:
        wanted, deadline = Wanted(manifest=manifest), time.monotonic() + PATIENCE_S
        made.append(wanted)
        while True:
            try:
                kube.create(manifest)
            except ForjaError as error:
                # A namespace gets its service account a moment after it was made.
                if "service account" not in str(error) or time.monotonic() > deadline:
                    return Wanted(manifest=manifest, problem=str(error))
                time.sleep(0.3)
            else:
                return wanted

    return list(pool.map(create, manifests))


def _wait(kube: Kube, pool: ThreadPoolExecutor, proof: str, pods: Iterable[Wanted], done: Callable[[Object], bool]) -> Objects:
    """Wait until each pod is done, can't be any more, or its time is over; the pods as they are then."""
    wanted = {w.key for w in pods if not w.problem}
    namespaces = sorted({namespace for namespace, _ in wanted})
    deadline, live = time.monotonic() + WAVE_S, Objects()

    def look(namespace: str) -> list[Object]:
        try:
            return kube.list("Pod", namespace, labels=f"{LABEL}={proof}")
        except ForjaError:
            return []  # asked again until the time is over

    while wanted:
        found = [pod for pods_there in pool.map(look, namespaces) for pod in pods_there]
        live |= {(p["metadata"]["namespace"], p["metadata"]["name"]): p for p in found}
        if all(key in live and (done(live[key]) or _problem(live[key])) for key in wanted) or time.monotonic() > deadline:
            break
        time.sleep(0.3)
    return live


def _ready(pod: Object) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions") or [])


def _ended(pod: Object) -> bool:
    return pod["status"].get("phase") in ("Succeeded", "Failed")


def _problem(pod: Object) -> str:
    """Why a pod will do nothing more; empty while it may."""
    if pod["status"].get("phase") == "Failed":
        return (
            f"the pod failed: {pod['status'].get('reason') or ''} {pod['status'].get('message') or _state(pod, 'terminated').get('reason')}"
        )
    waiting = _state(pod, "waiting")
    return f"{waiting['reason']}: {waiting.get('message', '')}" if waiting.get("reason") in STUCK else ""


def _state(pod: Object, name: str) -> Object:
    statuses = pod["status"].get("containerStatuses") or [{}]
    found: Object = statuses[0].get("state", {}).get(name) or {}
    return found


def _why(wanted: Wanted, pod: Object | None) -> str:
    """Why a pod isn't what it should be by now."""
    if wanted.problem or pod is None:
        return f"pod {'/'.join(wanted.key)}: {wanted.problem or 'it is gone'}"
    waiting = next(
        (c.get("message", "") for c in pod["status"].get("conditions") or [] if c["type"] == "PodScheduled" and c["status"] != "True"), ""
    )
    state = _problem(pod) or waiting or f"{pod['status'].get('phase')} {_state(pod, 'waiting').get('reason', '')}"
    return f"pod {'/'.join(wanted.key)}: {state.strip()} after {WAVE_S:.0f} s at most"


def _listening(server: network.Server, wanted: Wanted, pod: Object | None) -> Answer:
    if pod is not None and _ready(pod) and pod["status"].get("podIP"):
        said = f"pod {'/'.join(wanted.key)} on {pod['spec'].get('nodeName')}: ready at {pod['status']['podIP']}:{server.ports[0]}"
        return Answer(outcome=Outcome.SUCCEEDED, said=said)
    return Answer(outcome=Outcome.ERRED, said=_why(wanted, pod))


def _answers(calls: list[network.Call], wanted: Wanted, pod: Object | None) -> dict[str, Answer]:
    """What a caller's pod reported; the same failure for all its calls when it reported nothing."""
    message = _state(pod, "terminated").get("message") if pod is not None else None
    try:
        said: dict[str, list[str]] = json.loads(message or "")
        return {c.name: Answer(outcome=Outcome(said[str(n)][0]), said=said[str(n)][1]) for n, c in enumerate(calls)}
    except (ValueError, KeyError, TypeError, IndexError):
        why = _why(wanted, pod) if not message else f"pod {'/'.join(wanted.key)}: {message[:300]}"
        return {c.name: Answer(outcome=Outcome.ERRED, said=why) for c in calls}


def _delete(kube: Kube, wanted: Wanted) -> None:
    namespace, name = wanted.key
    try:
        kube.delete("Pod", name, namespace)
    except ForjaError:
        return  # it ends by itself, and the next proof deletes it
