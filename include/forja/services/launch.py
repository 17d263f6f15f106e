"""The first step of every supervised process: ``launch.py PROGRAM.json DIGEST``, then it becomes the program.

A program that was killed with SIGKILL can't clean up. So whatever its predecessor left behind is ended here first: its
children (Airflow's workers and the stages that they run, Triton's python stubs) and its shared memory. They are known
by their environment, FORJA_STATE and FORJA_PROGRAM. Only the standard library is imported, and nothing of Forja.

The digest is that of the file: a changed file changes the supervisor's own configuration, which restarts the program.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1


def program_of(pid: int, state: str) -> str:
    """Name of the program that a process descends from; empty when it is none of this state folder's, or gone."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    if f"FORJA_STATE={state}".encode() not in variables:
        return ""
    return next((v[14:].decode() for v in variables if v.startswith(b"FORJA_PROGRAM=")), "")


def family(state: str, program: str = "") -> dict[int, str]:
    """Processes of this user that descend from a program: process id to program's name, this process left out."""
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    found = {pid: program_of(pid, state) for pid in pids if pid != os.getpid()}
    return {pid: name for pid, name in found.items() if name and program in ("", name)}


def end(state: str, program: str = "", seconds: float = 5.0) -> list[int]:
    """SIGKILL a program's family (all programs' when none is named) until none is left; returns their process ids."""
    ended: set[int] = set()
    deadline = time.monotonic() + seconds
    # Again and again, since a process may fork between the look and the kill.
    while (pids := family(state, program)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        ended |= pids.keys()
        time.sleep(0.05)
    return sorted(ended)


def main() -> None:
    """Clean up after the predecessor, then become the program."""
    program = json.loads(Path(sys.argv[1]).read_text())
    state, name = program["env"]["FORJA_STATE"], program["env"]["FORJA_PROGRAM"]
    # When the supervisor itself is killed, its children end too; the next ``forja up`` starts from nothing.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    left = end(state, name)
    if left:
        print(f"forja: ended {len(left)} processes that the last {name} left behind: {left}", flush=True)
    if program["shm_prefix"]:
        for file in Path("/dev/shm").glob(f"{program['shm_prefix']}*"):  # noqa: S108 (where shm_open puts them)
            file.unlink(missing_ok=True)
    if program["stack_mib"]:
        _, hard = resource.getrlimit(resource.RLIMIT_STACK)
        wanted = program["stack_mib"] << 20
        resource.setrlimit(resource.RLIMIT_STACK, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    os.chdir(program["cwd"])
    os.execve(program["command"][0], program["command"], {**os.environ, **program["env"]})  # noqa: S606 (no shell is wanted)


if __name__ == "__main__":
    main()
