"""The node's first process: makes its mounts, then reaps and waits. When it dies, the kernel ends every process of the node.

Started as ``unshare --mount --pid --fork python init.py STATE`` inside the node's network namespace; STATE/ready says that the mounts
are made. Only the standard library: it runs before anything else is there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

BOUND = {"kubelet": "/var/lib/kubelet", "cni": "/var/lib/cni", "log": "/var/log"}
"""Folders of the state that the node sees in the usual places."""

KERNEL = {"vm/overcommit_memory": 1, "vm/panic_on_oom": 0, "kernel/panic": 10, "kernel/panic_on_oops": 1,
          "kernel/keys/root_maxkeys": 1_000_000, "kernel/keys/root_maxbytes": 25_000_000}  # fmt: skip
"""Settings of the whole machine that a kubelet makes at its start: here it finds them made, in files, and the machine stays as it was."""


def mounts(state: Path) -> None:
    """Give the node its own /proc and /run and the folders of its state."""
    mount("--make-rshared", "/")
    mount("-t", "proc", "proc", "/proc")
    fake = state / "kernel"
    fake.mkdir(exist_ok=True)
    for name, value in KERNEL.items():
        real = Path("/proc/sys") / name
        if real.exists():
            stand_in = fake / name.replace("/", ".")
            stand_in.write_text(f"{value}\n")
            mount("--bind", str(stand_in), str(real))
    mount("-t", "tmpfs", "-o", "mode=755,size=1g", "tmpfs", "/run")
    for name, place in BOUND.items():
        (state / name).mkdir(exist_ok=True)
        Path(place).mkdir(parents=True, exist_ok=True)
        mount("--bind", str(state / name), place)


def mount(*arguments: str) -> None:
    """mount(8)."""
    subprocess.run(["mount", *arguments], check=True)


def main(state: Path) -> None:
    """Make the mounts, say so, and reap until SIGTERM."""
    signals = {signal.SIGCHLD, signal.SIGTERM}
    mounts(state)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    (state / "ready").touch()
    while signal.sigwait(signals) != signal.SIGTERM:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


if __name__ == "__main__":
    main(Path(sys.argv[1]))
