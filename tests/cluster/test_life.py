"""A whole life of a cluster beside the one that runs: started, killed, started again, taken down; then nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.kit.init import KERNEL
from cluster.kit.places import ROOT, places

NAME = "forja-cluster-life"
STATE = places().cache / f"run-{NAME}"


def kit(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "FORJA_CLUSTER": NAME, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "cluster.kit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)


def ctr(*arguments: str) -> set[str]:
    """containerd's client in that cluster's node."""
    code = f"from cluster.kit.node import Node; print(Node().ctr(*{list(arguments)!r}))"
    env = {**os.environ, "FORJA_CLUSTER": NAME, "PYTHONPATH": str(ROOT / "tests")}
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.split())


def traces() -> set[str]:
    """What on the machine bears the cluster's name, by kind; asked of the kernel and not of the kit."""
    found = {
        kind
        for kind, path in {"state": STATE, "netns": Path("/run/netns") / NAME, "marker": Path(f"/run/{NAME}.json")}.items()
        if path.exists()
    }
    if any(Path("/sys/fs/cgroup").glob(f"{NAME}")) or any(Path("/sys/fs/cgroup").glob(f"*/{NAME}")):
        found.add("cgroup")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            seen = NAME.encode() in text and int(process.name) != os.getpid()
            mounts = NAME in (process / "mounts").read_text()
        except OSError:
            continue  # it ended
        found |= ({"process"} if seen else set()) | ({"mount"} if mounts else set())
    return found


def kernel() -> dict[str, str]:
    """Settings of the machine that a kubelet would change."""
    return {name: path.read_text() for name in KERNEL if (path := Path("/proc/sys") / name).exists()}


@pytest.fixture
def afterwards() -> Iterator[None]:
    yield
    kit("down")


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("afterwards")
def test_a_cluster_comes_back_after_a_crash_and_leaves_nothing() -> None:
    before = kernel()
    assert traces() == set()
    up = kit("up")
    assert up.returncode == 0, up.stderr
    assert traces() == {"state", "netns", "marker", "cgroup", "process", "mount"}
    assert kernel() == before

    ctr("images", "tag", "forja.test/busybox:1", "forja.test/kept:1")
    pods = ctr("containers", "list", "-q")
    assert pods
    os.kill(int((STATE / "init.pid").read_text().split()[0]), signal.SIGKILL)
    assert kit("status").returncode == 3
    assert "process" not in traces()

    again = kit("up")
    assert again.returncode == 0, again.stderr
    status = json.loads(kit("status", "--json").stdout)
    assert status["up"]
    assert all(status["nodes"].values())
    assert "forja.test/kept:1" in ctr("images", "list", "-q")
    assert not pods & ctr("containers", "list", "-q")
    assert "already" in kit("up").stdout

    down = kit("down")
    assert down.returncode == 0, down.stderr
    assert traces() == set()
    assert kernel() == before
    assert kit("status").returncode == 3
