"""Ports on 127.0.0.1: who gets which, and who holds one that should be free."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Iterable

from forja import recipes
from forja.errors import BadInput
from forja.services import launch
from forja.services.folders import load_json, locked, write
from forja.services.program import Program
from forja.settings import Settings

PER_RECIPE = 6
"""Ports of a recipe from FORJA_PORT_TRITON on: HTTP, gRPC and metrics of blue, then of green."""


def triton_base(settings: Settings, recipe: str) -> int:
    """First of a recipe's six ports. The order in which recipes were first seen is kept: a new one moves no other's.

    Raises:
        BadInput: there is no such recipe, or the range ends above 65535.
    """
    with locked(settings, "ports"):
        path = settings.state / "run" / "ports.json"
        known = load_json(path)
        new = [name for name in recipes.names() if name not in known]
        if new:
            known.update({name: i for i, name in enumerate(new, start=max(known.values(), default=-1) + 1)})
            write(path, json.dumps(known, indent=1) + "\n")
    if recipe not in known:
        raise BadInput("recipe", value=recipe, allowed=", ".join(recipes.names()))
    base = settings.ports["triton"] + PER_RECIPE * int(known[recipe])
    if base + PER_RECIPE > 65536:
        raise BadInput("FORJA_PORT_TRITON", value=settings.ports["triton"], allowed=f"{PER_RECIPE} ports for each recipe below 65536")
    return base


def check(settings: Settings, programs: Iterable[Program]) -> None:
    """Refuse ports that two programs share, or that a process holds which isn't one of this state folder's own.

    Raises:
        BadInput: names the port, the program, the holder's process id and command line, and the variable to change.
    """
    owners: dict[int, str] = {}
    holders: dict[int, int] | None = None
    own: dict[int, str] = {}
    for program in programs:
        for port in program.ports:
            variable = f"FORJA_PORT_{port.setting.upper()}"
            if port.number in owners:
                allowed = f"one that {owners[port.number]} doesn't have"
                raise BadInput(f"port of {program.name}", value=port.number, allowed=allowed, do=f"change {variable}")
            owners[port.number] = program.name
            if free(port.number):
                continue
            if holders is None:
                holders, own = listeners(), launch.family(str(settings.state))
            pid = holders.get(port.number, 0)
            if pid not in own:
                raise BadInput(
                    f"port {port.number} of {program.name} is taken", value=_describe(pid), allowed="a free port",
                    do=f"stop that process, or set {variable} to another port",
                )  # fmt: skip


def free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:``port`` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a closed connection holds nothing
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def listeners() -> dict[int, int]:
    """TCP ports that are listened on, with the process id of the listener: 0 where this user may not see it."""
    import psutil

    found = psutil.net_connections(kind="tcp")
    return {c.laddr[1]: c.pid or 0 for c in found if c.status == psutil.CONN_LISTEN and c.laddr}


def _describe(pid: int) -> str:
    import psutil

    if not pid:
        return "a process of another user"
    try:
        return f"pid {pid}: {' '.join(psutil.Process(pid).cmdline())[:200]}"
    except psutil.Error:
        return f"pid {pid}"
