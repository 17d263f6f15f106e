"""Small restricted pods for tests: made, waited for, read."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from forja.kube import Kube, Object, place

T = TypeVar("T")

PYTHON = "forja.test/python:3.11"
"""Python's standard library and busybox; the only image that these pods need."""

SERVER = """
import http.server, socket
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        said = socket.gethostname().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
http.server.ThreadingHTTPServer(("", 8080), Answer).serve_forever()
"""
"""A web server on port 8080 that answers with the name of its pod."""


def wait(what: str, look: Callable[[], T | None], seconds: float = 60) -> T:
    """The first true answer of ``look``; AssertionError with the last one when there is none in time."""
    end = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}; the last answer: {found!r}"
        time.sleep(0.1)


def pod(namespace: str, code: str, **given: Any) -> Object:
    """A pod that runs Python code and passes the PodSecurity standard `restricted`.

    Args:
        namespace: where.
        code: of Python, run with ``-u -c``.
        given: ``name``, ``labels``, ``resources`` (limits), ``ports`` (of the container), ``spec`` (more of the pod's spec).
    """
    container: dict[str, Any] = {
        "name": "main",
        "image": PYTHON,
        "imagePullPolicy": "Never",
        "command": ["python3", "-u", "-c", code],
        "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
        "resources": {"limits": dict(given.get("resources", {})), "requests": {"cpu": "10m", "memory": "32Mi"}},
        "ports": list(given.get("ports", ())),
    }
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        **given.get("spec", {}),
    }
    name = given.get("name") or f"pod-{secrets.token_hex(3)}"
    meta = {"name": name, "namespace": namespace, "labels": dict(given.get("labels", {}))}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


def run(kube: Kube, namespace: str, code: str, *, seconds: float = 60, **given: Any) -> Ended:
    """Run a pod to its end; how it ended and what it printed."""
    made = kube.create(pod(namespace, code, **given))
    name = made["metadata"]["name"]
    found = wait(f"the end of pod {name}", lambda: _ended(kube.get("Pod", name, namespace)), seconds)
    state = found["status"]["containerStatuses"][0]["state"]["terminated"]
    return Ended(name=name, code=state["exitCode"], reason=state["reason"], log=log(kube, namespace, name))


def start(kube: Kube, namespace: str, code: str, *, seconds: float = 60, **given: Any) -> Object:
    """Start a pod that stays; the pod once it runs and has an address."""
    name = kube.create(pod(namespace, code, **given))["metadata"]["name"]
    return wait(f"pod {name} to run", lambda: _running(kube.get("Pod", name, namespace)), seconds)


def log(kube: Kube, namespace: str, name: str) -> str:
    """What a pod's container printed so far."""
    said = kube.request("GET", f"{place('Pod', namespace)}/{name}/log")
    return said if isinstance(said, str) else json.dumps(said)


def _ended(found: Object | None) -> Object | None:
    return found if found and found["status"].get("phase") in ("Succeeded", "Failed") and found["status"].get("containerStatuses") else None


def _running(found: Object | None) -> Object | None:
    return found if found and found["status"].get("phase") == "Running" and found["status"].get("podIP") else None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A pod that ended.

    Args:
        name: of the pod.
        code: exit code.
        reason: Completed, Error or OOMKilled.
        log: what it printed.
    """

    name: str
    code: int
    reason: str
    log: str
