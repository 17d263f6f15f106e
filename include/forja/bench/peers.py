"""What a benchmark of serving is measured against or through: wrk, and a private Envoy with the routes of the real one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from forja.errors import Unavailable
from forja.services import envoy, probes
from forja.services.folders import private, write
from forja.serving import envoy_router
from forja.serving.router import Route
from forja.settings import Settings
from forja.tune.subject import NICE
from forja.tune.transport import Target, body, path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

START_S = 20.0
"""Seconds until Envoy answers."""
SCRIPT = """
local file = io.open("{body}", "rb")
wrk.method, wrk.body = "POST", file:read("*a")
file:close()
wrk.headers["Content-Type"] = "application/octet-stream"
wrk.headers["Inference-Header-Content-Length"] = "{json_bytes}"
function done(summary, latency, requests)
  local e = summary.errors
  local failed = e.connect + e.read + e.write + e.status + e.timeout
  io.write(string.format('\\n{{"requests": %d, "microseconds": %d, "failed": %d}}\\n', summary.requests, summary.duration, failed))
end
"""
"""wrk's own language: what it sends, and its summary as JSON."""


def wrk() -> str:
    """Path of wrk; empty when it isn't installed."""
    return shutil.which("wrk") or ""


def wrk_throughput(binary: str, target: Target, sample: NDArray[np.float32], *, in_flight: int, seconds: float, scratch: Path) -> float:
    """Answers per second that wrk finds with ``in_flight`` connections, each with a request of one sample under way all the time.

    Raises:
        Unavailable: wrk ended with an error, or a request failed.
    """
    content, json_bytes = body(sample)
    data, script = scratch / "wrk.body", scratch / "wrk.lua"
    data.write_bytes(content)
    script.write_text(SCRIPT.format(body=data, json_bytes=json_bytes))
    url = f"http://{target.address}{path(target)}"
    command = [binary, "--threads", "1", "--connections", str(in_flight), "--duration", f"{seconds:.0f}s", "--script", str(script), url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 30)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if lines else {"failed": 1}
    if done.returncode or found["failed"]:
        raise Unavailable("wrk", value=(done.stdout + done.stderr)[-500:], allowed="no failed requests")
    return float(found["requests"]) / (found["microseconds"] / 1e6)


@contextlib.contextmanager
def gateway(settings: Settings, model: str, upstream: str, scratch: Path) -> Iterator[str]:
    """An Envoy in front of the server at ``upstream`` (host:port), configured as the router configures the real one; its host:port.

    Raises:
        Unavailable: it ended, or doesn't answer.
    """
    public, admin = _free_ports(2)
    ports = {**settings.ports, "envoy": public, "envoy_admin": admin}
    own = dataclasses.replace(settings, state=private(scratch / "envoy-state"), ports=ports)
    route = Route(model=model, version=1, weights={"blue": 100})
    clusters = envoy_router.clusters(own, [route])
    for cluster in clusters:
        address = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
        address["port_value"] = int(upstream.rpartition(":")[2])
    envoy.prepare(own)
    write(envoy.cds(own), json.dumps({"version_info": "1", "resources": clusters}))
    write(envoy.rds(own), json.dumps({"version_info": "1", "resources": [envoy_router.table([route])]}))
    (program,) = envoy.programs(own)
    with (scratch / "envoy.log").open("wb") as log:
        process = subprocess.Popen(
            program.command, cwd=program.cwd, stdout=log, stderr=log, stdin=subprocess.DEVNULL, preexec_fn=lambda: _give_way(NICE)
        )
    try:
        _wait(process, f"http://127.0.0.1:{admin}/ready", f"http://127.0.0.1:{public}/v2/models/{model}/ready", scratch / "envoy.log")
        yield f"127.0.0.1:{public}"
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()


def _give_way(nice: int) -> None:
    os.nice(nice)


def _wait(process: subprocess.Popen[bytes], admin: str, model: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while not (probes.http_ok(admin) and probes.http_ok(model)):
        if process.poll() is not None or time.monotonic() > deadline:
            raise Unavailable("Envoy doesn't answer", value="\n".join(log.read_text(errors="replace").splitlines()[-5:]))
        time.sleep(0.05)


def _free_ports(count: int) -> Sequence[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
