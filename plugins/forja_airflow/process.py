"""A stage's process on the worker's machine: started under the guard, its lines passed on as they come, ended for sure."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from forja_airflow import guard


class Process:
    """A running command with all that it starts.

    Args:
        command: absolute path of the program, then its arguments.
        env: its whole environment.
    """

    def __init__(self, command: list[str], env: Mapping[str, str]) -> None:
        self.mark = uuid.uuid4().hex
        # -I -S: the guard needs nothing but the standard library, and starts in 15 ms.
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(guard.__file__)), *command], env={**env, guard.MARK: self.mark},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """Number of the guard's process, and of its process group."""
        return self._guard.pid

    def lines(self) -> Iterator[str]:
        """Lines of standard output and standard error, as they come, until the command has ended."""
        assert self._guard.stdout is not None  # noqa: S101 - for mypy: it was opened as a pipe
        fd, rest, open_ = self._guard.stdout.fileno(), b"", True
        while open_:
            ended = self._guard.poll() is not None
            if ended:
                # A guard that was killed itself left the others behind, and they hold the pipe open.
                guard.end(self.mark, 0)
            if not select.select([fd], [], [], 0 if ended else 0.5)[0]:
                open_ = not ended
                continue
            chunk = os.read(fd, 65536)
            open_ = bool(chunk)
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (line.decode(errors="replace").rstrip("\r") for line in whole)
        if rest:
            yield rest.decode(errors="replace")

    def wait(self) -> int:
        """Exit status: the command's own, or 128 + n when signal n ended it."""
        code = self._guard.wait()
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        """End the command and all that it started: SIGTERM, then SIGKILL after ten seconds. Does nothing twice."""
        guard.end(self.mark, guard.GRACE_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guard.wait(5)
        for pipe in (self._guard.stdin, self._guard.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
