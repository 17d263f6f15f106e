"""What runs in a probe's pod, as ``python3 -c`` with one JSON argument: ports to listen on, or calls to make. Standard library only.

A server listens until it is stopped. A client makes its calls at once, each until it comes out as wanted or its time is over (rules
take hold a moment after a pod has its address; a refusal must hold twice), and writes what came of each to the pod's termination
message: ``{"<call>": [outcome, what was seen]}``.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
import time
from typing import Any

CONNECT_S = 1.5
"""A connection that gets no answer in this time is dropped: the kernel sends its first packet again after one second."""

REJECTED = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EACCES)
"""How enforcers that answer refuse. A closed port looks like the first, so this counts only where a witness shows that somebody listens."""


def listen(ports: list[int]) -> None:
    """Accept whatever comes, for ever; the first port opens last, so that whoever reaches it knows that all are open."""

    def serve(server: socket.socket) -> None:
        while True:
            server.accept()[0].close()

    servers = [socket.create_server(("", port), backlog=64) for port in reversed(ports)]
    threads = [threading.Thread(target=serve, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def connect(host: str, port: int) -> tuple[str, str]:
    """One connection, or with port 0 one question to DNS: whether it was answered, got no answer or was rejected, or failed otherwise."""
    began = time.monotonic()
    try:
        address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4]
    except socket.gaierror as error:
        silent = error.errno == socket.EAI_AGAIN and not port
        return ("refused", f"{host}: no answer from DNS") if silent else ("erred", f"{host} has no address: {error.strerror}")
    if not port:
        return "succeeded", f"{host} is {address[0]}"
    where = f"{host}:{port}" + ("" if host == address[0] else f" ({address[0]})")
    try:
        with socket.create_connection((str(address[0]), port), CONNECT_S):
            return "succeeded", f"{where}: connected in {1000 * (time.monotonic() - began):.0f} ms"
    except TimeoutError:
        return "refused", f"{where}: no answer in {CONNECT_S} s"
    except OSError as error:
        if error.errno in REJECTED:
            return "refused", f"{where}: rejected, {error.strerror}"
        return "erred", f"{where}: {error.strerror or error}"


def call(host: str, port: int, wanted: str, patience_s: float) -> tuple[str, str]:
    """Connect until it comes out as wanted, or its time is over."""
    deadline, other, held, needed = time.monotonic() + patience_s, 0, 0, 2 if wanted == "refused" else 1
    while True:
        outcome, seen = connect(host, port)
        held = held + 1 if outcome == wanted else 0
        if held == needed or (time.monotonic() > deadline and not held):
            return outcome, seen + (f", after {other} that came out otherwise" if other else "")
        other += outcome != wanted
        time.sleep(0.2)


def main(spec: dict[str, Any]) -> None:
    """Listen, or make the calls ``{name: [host, port, wanted outcome]}``."""
    if spec.get("listen"):
        listen(spec["listen"])
    found: dict[str, tuple[str, str]] = {}

    def one(name: str, host: str, port: int, wanted: str) -> None:
        found[name] = call(host, port, wanted, spec["patience_s"])

    threads = [threading.Thread(target=one, args=(name, *rest)) for name, rest in spec["calls"].items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with open(os.environ.get("FORJA_MESSAGE", "/dev/termination-log"), "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
