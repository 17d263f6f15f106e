"""Claims: a second run of the same work waits for the first instead of doing it again.

A claim is an object beside the receipt, ``claim-<n>.json``, created if absent; its holder beats by rewriting it. Taking
over from a dead holder creates ``claim-<n+1>.json``, so of many that try one succeeds, and a holder that wakes up finds
a higher number and stops. Clocks are never compared: a watcher counts on its own clock how long a beat stood still.
Claims save work; the receipt, created if absent, decides who was first.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from forja.errors import Conflict, Damaged
from forja.lake import Lake

BEAT_S = 3.0
"""Seconds between two beats."""
DEAD_S = 30.0
"""Seconds without a beat after which a holder on another machine counts as dead."""


@dataclass(kw_only=True)
class Claim:
    """A held claim; beats in a thread until released."""

    lake: Lake
    folder: str
    number: int
    body: dict[str, object]
    lost: bool = False
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(BEAT_S):
            beat += 1
            try:
                if _numbers(self.lake, self.folder)[-1:] > [self.number]:
                    self.lost = True
                    return
                self.lake.replace(_path(self.folder, self.number), _json({**self.body, "beat": beat}))
            except Exception:  # noqa: S112 - a lake that is down for a moment must not end the work
                continue

    def check(self) -> None:
        """Raise Conflict when somebody took this claim over."""
        if self.lost:
            raise Conflict(f"claim {self.folder}: another run took over while this one stood still")

    def release(self) -> None:
        """Stop beating and remove the claim."""
        self._stop.set()
        self._thread.join()
        # A successor's claim, which a holder that stood still may find only now, stays.
        for number in _numbers(self.lake, self.folder):
            if number <= self.number:
                self.lake.delete(_path(self.folder, number))


def take(lake: Lake, folder: str, *, done: Callable[[], bool], say: Callable[[str], None]) -> Claim | None:
    """Wait until this process holds the claim of ``folder``, or until ``done()`` says that there is nothing left to do.

    Returns:
        The claim, or None when the work was done meanwhile.
    """
    body: dict[str, object] = {"holder": uuid.uuid4().hex, "beat": 0, **_here(os.getpid())}
    seen: tuple[bytes, float] = (b"", time.monotonic())
    announced = False
    while not done():
        numbers = _numbers(lake, folder)
        number = numbers[-1] if numbers else 0
        held = _held(lake, folder, number)
        if held != seen[0]:
            seen = (held, time.monotonic())
        if not held or _dead_here(held) or time.monotonic() - seen[1] > DEAD_S:
            if lake.create(_path(folder, number + 1), _json(body)):
                return Claim(lake=lake, folder=folder, number=number + 1, body=body)
            continue
        if not announced:
            holder = json.loads(held)
            say(f"waiting: process {holder['pid']} on {holder['host']} is doing this very work")
            announced = True
        time.sleep(0.5)
    return None


def _held(lake: Lake, folder: str, number: int) -> bytes:
    if not number:
        return b""
    try:
        return lake.get(_path(folder, number))
    except Damaged:  # released between listing and reading
        return b""


def _numbers(lake: Lake, folder: str) -> list[int]:
    names = (p.rpartition("/")[2] for p in lake.list(folder))
    return sorted(int(n.removeprefix("claim-").removesuffix(".json")) for n in names if n.startswith("claim-"))


def _path(folder: str, number: int) -> str:
    return f"{folder}/claim-{number:06d}.json"


def _json(body: dict[str, object]) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def _here(pid: int) -> dict[str, object]:
    """Identity of a process: a number is used again, so its start time, boot and pid namespace count too."""
    return {
        "host": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "namespace": os.readlink("/proc/self/ns/pid"),
        "pid": pid,
        "start": _start(pid),
        "gang": os.environ.get("FORJA_GANG", ""),
        "attempt": int(os.environ.get("FORJA_GANG_ATTEMPT") or 0),
    }


def _start(pid: int) -> str:
    """Start time of a running process in clock ticks since boot, empty for none and for a zombie (proc(5))."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state in "ZX" else rest[18]


def _dead_here(held: bytes) -> bool:
    """Whether the holder ran in this very pid namespace, or in an earlier try of this gang, and is gone: no need to wait for its beat."""
    holder = json.loads(held)
    here = _here(os.getpid())
    if here["gang"] and here["gang"] == holder.get("gang") and int(str(here["attempt"])) > holder["attempt"]:
        return True  # a gang of pods is started again only when none of its pods is left
    same = all(holder.get(k) == here[k] for k in ("boot", "namespace", "host"))
    return same and _start(int(holder["pid"])) != holder["start"]
