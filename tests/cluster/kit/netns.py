"""The cluster's network: a network namespace with one bridge that has the node's address, and no way out."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

from cluster.kit import ClusterError
from cluster.kit.versions import NAME, NO_ROUTE, NODE_IP

PATH = Path("/run/netns") / NAME
_CLONE_NEWNET = 0x40000000


def make() -> None:
    """Make the namespace and what is in it."""
    if not PATH.exists():
        _run("ip", "netns", "add", NAME)
    commands = (
        "ip link set lo up",
        "ip link add node0 type bridge",
        f"ip addr add {NODE_IP}/24 dev node0",
        "ip link set node0 up",
        f"ip route replace default via {NO_ROUTE} dev node0 onlink",
        "sysctl -qw net.ipv4.ip_forward=1",
    )
    _run("nsenter", f"--net={PATH}", "sh", "-ec", "\n".join(commands))


def enter() -> None:
    """Move this process, and the threads that it starts from now on, into the cluster's network.

    Raises:
        ClusterError: there is none, or this isn't root.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        with PATH.open() as file:
            wrong = libc.setns(file.fileno(), _CLONE_NEWNET) and os.strerror(ctypes.get_errno())
    except OSError as error:
        wrong = error.strerror
    if wrong:
        raise ClusterError(f"can't enter the cluster's network {PATH} ({wrong})", "make cluster-up, as root")


def delete() -> None:
    """Take the name away; the kernel frees the namespace with its last process."""
    if PATH.exists():
        _run("ip", "netns", "delete", NAME)


def users() -> dict[int, str]:
    """Processes of the machine that are in the cluster's network: process id to command line."""
    if not PATH.exists():
        return {}
    inode = PATH.stat().st_ino
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "ns" / "net").stat().st_ino == inode:
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue  # it ended meanwhile
    return found


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
