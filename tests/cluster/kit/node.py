"""The node: a process namespace with its own mounts and network, in which named processes are started and stopped one by one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

from cluster.kit import ClusterError, netns
from cluster.kit.build import binary
from cluster.kit.places import KIT, Places, places

SOCKET = "/run/containerd/containerd.sock"
"""Containerd's, as the node sees it."""


class Node:
    """The one node of real pods."""

    def __init__(self, where: Places | None = None) -> None:
        self.places = where or places()
        self._first = self.places.state / "init.pid"
        self._pids = self.places.state / "pids"

    def boot(self) -> None:
        """Start the node's first process, and wait for its mounts.

        Raises:
            ClusterError: it didn't come up.
        """
        state = self.places.state
        for folder in (self._pids, self.places.logs):
            folder.mkdir(parents=True, exist_ok=True)
        spaces = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork"]
        with (self.places.logs / "init.log").open("ab") as log:
            outside = subprocess.Popen(
                [*spaces, sys.executable, "-IS", KIT / "init.py", state],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/",
            )  # fmt: skip
        until(lambda: (state / "ready").exists() or outside.poll() is not None, 20, "the node's first process")
        inside = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text().split() if outside.poll() is None else []
        if not inside:
            raise ClusterError(f"the node's namespaces can't be made: {(self.places.logs / 'init.log').read_text()[-500:]}")
        self._first.write_text(f"{inside[0]} {_started(int(inside[0]))}")

    def first(self) -> int:
        """Process id, on the machine, of the node's first process; 0 when the node isn't up."""
        try:
            pid, started = self._first.read_text().split()
        except (OSError, ValueError):
            return 0
        return int(pid) if _started(int(pid)) == started else 0

    def kill(self) -> None:
        """End every process of the node at once; their mounts go with them."""
        pid = self.first()
        if pid:
            _signal(pid, signal.SIGKILL)
            until(lambda: not _started(pid), 20, "the end of the node's first process")
        self._first.unlink(missing_ok=True)

    def inside(self, command: Sequence[str | Path]) -> list[str]:
        """A command as the node runs it: its processes, mounts and network.

        Raises:
            ClusterError: the node isn't up.
        """
        pid = self.first()
        if not pid:
            raise ClusterError("the cluster isn't up", "make cluster-up")
        return ["nsenter", f"--target={pid}", "--mount", "--pid", f"--net={netns.PATH}", "--", *map(str, command)]

    def run(self, *command: str | Path, check: bool = True, stdin: IO[bytes] | None = None) -> str:
        """Run a command in the node to its end; what it printed.

        Raises:
            ClusterError: it failed.
        """
        answer = subprocess.run(self.inside(command), stdin=stdin or subprocess.DEVNULL, capture_output=True)
        if check and answer.returncode:
            raise ClusterError(f"{Path(command[0]).name} failed ({answer.returncode}): {answer.stderr.decode(errors='replace')[-800:]}")
        return answer.stdout.decode(errors="replace")

    def start(self, name: str, command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> None:
        """Start a process of the node under a name; what it prints goes to log/NAME.log. What is started is for :meth:`restart` too."""
        (self._pids / f"{name}.command").write_text("\0".join(map(str, command)))
        (self._pids / f"{name}.env").write_text("\0".join(f"{k}={v}" for k, v in (env or {}).items()))
        note = self._pids / name
        note.unlink(missing_ok=True)
        wrapped = ["setsid", "--fork", "sh", "-c", 'echo $$ >"$0.new" && mv "$0.new" "$0" && exec "$@"', note, *command]
        clean = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self.places.state), **(env or {})}
        with (self.places.logs / f"{name}.log").open("ab") as log:
            subprocess.run(self.inside(wrapped), stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, env=clean)
        until(note.exists, 10, f"the start of {name}")

    def again(self, name: str) -> None:
        """Start a process that was stopped, as it was started before."""
        command = (self._pids / f"{name}.command").read_text().split("\0")
        env = dict(pair.split("=", 1) for pair in (self._pids / f"{name}.env").read_text().split("\0") if pair)
        self.start(name, command, env)

    def stop(self, name: str, wanted: signal.Signals = signal.SIGTERM, patience_s: float = 20) -> None:
        """Stop a process; killed when it doesn't heed ``wanted`` within ``patience_s``. What it started itself goes on."""
        pid = self.pid(name)
        if not pid:
            return
        began = _started(pid)
        _signal(pid, wanted)
        try:
            until(lambda: _started(pid) != began, patience_s, f"the end of {name}")
        except ClusterError:
            _signal(pid, signal.SIGKILL)
            until(lambda: _started(pid) != began, 10, f"the end of {name}")

    def restart(self, name: str, wanted: signal.Signals = signal.SIGTERM) -> None:
        """Stop a process and start it again."""
        self.stop(name, wanted)
        self.again(name)

    def names(self) -> list[str]:
        """Names of the processes that were started, running or not."""
        return sorted(p.name.removesuffix(".command") for p in self._pids.glob("*.command"))

    def pid(self, name: str) -> int:
        """Process id, on the machine, of a named process; 0 when it isn't running."""
        try:
            wanted = int((self._pids / name).read_text())
        except (OSError, ValueError):
            return 0
        return next((outside for outside, within in self._processes() if within == wanted), 0)

    def import_archive(self, source: Path | IO[bytes], *options: str) -> str:
        """Import an OCI or Docker archive into containerd for the kubelet; what ctr said.

        Args:
            source: a file, or a pipe that an archive comes out of.
            options: further ones of ``ctr images import``.
        """
        what = source if isinstance(source, Path) else "-"
        return self.ctr("images", "import", "--local", *options, what, stdin=None if isinstance(source, Path) else source)

    def ctr(self, *command: str | Path, stdin: IO[bytes] | None = None, check: bool = True) -> str:
        """containerd's own client, in the kubelet's containerd namespace."""
        return self.run(binary(self.places, "ctr"), "-a", SOCKET, "-n", "k8s.io", *command, stdin=stdin, check=check)

    def _processes(self) -> Iterable[tuple[int, int]]:
        """Processes of the node: id on the machine, id within the node. Those of pods aren't among them."""
        pid = self.first()
        if not pid:
            return
        home = os.readlink(f"/proc/{pid}/ns/pid")
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(folder / "ns" / "pid") != home:
                    continue
                status = (folder / "status").read_text()
            except OSError:
                continue  # it ended meanwhile
            if "\nState:\tZ" not in status:
                ids = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
                yield int(folder.name), int(ids[-1])


def until(done: object, seconds: float, what: str, every_s: float = 0.05) -> None:
    """Wait for a condition.

    Raises:
        ClusterError: it wasn't true in time.
    """
    assert callable(done)
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise ClusterError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(every_s)


def _signal(pid: int, wanted: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.kill(pid, wanted)


def _started(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty when it's gone or a zombie. Tells a process from a later one of its id."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
