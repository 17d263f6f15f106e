"""Takes the cluster away, whole or what is left of it, and checks that nothing of it stays on the machine."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.kit import ClusterError, config, netns
from cluster.kit.init import BOUND
from cluster.kit.node import Node, until
from cluster.kit.places import DEFAULT, MARKER, Places
from cluster.kit.versions import NAME


def only_mine(places: Places) -> None:
    """Refuse when the cluster of this machine belongs to another state folder.

    Raises:
        ClusterError: with the folder of the other one.
    """
    if not MARKER.is_file():
        return
    other = json.loads(MARKER.read_text())
    if other["state"] != str(places.state):
        to_do = f"make cluster-down in {other['checkout']}, or use that one: FORJA_CACHE={Path(other['state']).parents[1]}"
        raise ClusterError(f"another test cluster holds this machine, with its state in {other['state']}", to_do)


@contextmanager
def alone(places: Places) -> Iterator[None]:
    """One at a time starts or stops the cluster of this cache; others wait."""
    places.cache.mkdir(parents=True, exist_ok=True)
    with (places.cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def down(places: Places) -> str:
    """Stop everything and delete the state; images stay. What was stopped, as a line.

    Raises:
        ClusterError: another cluster runs on this machine, or something of this one is left.
    """
    with alone(places):
        only_mine(places)
        return _down(places)


def _down(places: Places) -> str:
    was = "down" if Node(places).first() or MARKER.exists() or places.state.exists() else "down already"
    others = netns.users()
    clear(places)
    if NAME != DEFAULT:
        shutil.rmtree(places.containerd, ignore_errors=True)
    wrong = left(places)
    if wrong:
        raise ClusterError(f"of the cluster is left: {'; '.join(wrong)}", "look at it, then make cluster-down again")
    guests = {pid: line for pid, line in others.items() if Path(f"/proc/{pid}").exists()}
    note = f"; still running in its network, not the cluster's own: {guests}" if guests else ""
    return f"the cluster is {was}; no process, mount, cgroup, network or folder of it is left{note}"


def clear(places: Places) -> None:
    """End whatever there is of a cluster, after a clean life or a crash. Cheap when there is nothing."""
    node = Node(places)
    if node.first():
        # Its store of images outlives the node: let it finish its writes.
        node.stop("containerd", patience_s=5)
    node.kill()
    until(lambda: not _cgroups_busy(), 20, "the end of the pods' processes")
    config.remove_cgroups()
    netns.delete()
    shutil.rmtree(places.state, ignore_errors=True)
    MARKER.unlink(missing_ok=True)
    if any(MARKER.parent.glob(f"{DEFAULT}*.json")):
        return  # removing a folder that another node has mounted on would unmount it there
    for place in map(Path, BOUND.values()):
        # Made for a mount, if it was: it's empty on the machine itself.
        if place != Path("/var/log") and place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def left(places: Places) -> list[str]:
    """What of the cluster is still on the machine; empty when nothing."""
    found = [f"cgroup {path}" for path in config.cgroups() if path.exists()]
    found += [f"file {path}" for path in (netns.PATH, places.state, MARKER, Path("/run/containerd")) if path.exists()]
    mounts = [line.split()[1] for line in Path("/proc/1/mounts").read_text().splitlines()]
    ours = (str(places.state), str(places.containerd), "/var/lib/kubelet", "/run/netns/cni-", str(netns.PATH))
    found += [f"mount {path}" for path in mounts if path.startswith(ours)]
    mine = f"HOME={places.state}".encode()  # which the node's processes have, and the shims of its pods
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mine in (folder / "environ").read_bytes().split(b"\0"):
                found.append(f"process {folder.name} {(folder / 'exe').readlink().name}")
        except OSError:
            continue  # it ended, or is the kernel's
    return found


def _cgroups_busy() -> bool:
    return any(path.read_text().strip() for folder in config.cgroups() for path in folder.rglob("cgroup.procs"))
