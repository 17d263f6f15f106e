"""Runs a stage so that nothing of it outlives the task that started it: ``python guard.py COMMAND ARGUMENT...``.

The task holds the other end of this process's standard input: when the task is gone, however it went, the pipe closes
and everything that the stage started is ended. Process groups don't suffice: torchrun puts its ranks into sessions of their
own. So processes are found by a mark in their environment, which children inherit. Only the standard library is imported.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

MARK = "FORJA_TASK"
"""Environment variable whose value is unique for each stage process that a task starts."""

GRACE_S = 10.0
"""Seconds from SIGTERM to SIGKILL."""


def marked(mark: str) -> list[int]:
    """Processes, apart from this one, that carry ``mark`` in their environment (zombies have none; see proc(5))."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if wanted in file.read().split(b"\0"):
                        found.append(int(name))
            except OSError:  # it ended meanwhile, or it is someone else's
                continue
    return found


def end(mark: str, grace_s: float) -> None:
    """SIGTERM to all that carry ``mark``; SIGKILL to what is left after ``grace_s`` seconds, until nothing is."""
    deadline = time.monotonic() + grace_s
    if grace_s > 0:
        _send(marked(mark), signal.SIGTERM)
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.05)
    while found := marked(mark):  # a process may fork while the others are being killed
        _send(found, signal.SIGKILL)
        time.sleep(0.02)


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def main(command: list[str]) -> int:
    """Run ``command``; its exit status, 128 + n when signal n ended it, 143 when this process was told to stop."""
    mark = os.environ[MARK]
    ending = threading.Event()

    def stop() -> None:
        ending.set()
        end(mark, GRACE_S)
        os._exit(128 + signal.SIGTERM)

    def watch() -> None:
        while os.read(0, 1):
            pass
        stop()

    signal.signal(signal.SIGTERM, lambda *_: stop())
    nothing = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    child = os.posix_spawn(command[0], command, os.environ, file_actions=[nothing])
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    _, status = os.waitpid(child, 0)
    if ending.is_set():
        watcher.join()
    end(mark, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
