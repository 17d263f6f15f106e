"""A whole change from one process, as the command line makes it. Airflow's tasks do the same steps one by one."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import signal
import socket
from collections.abc import Iterator
from types import FrameType

from forja.errors import Refused
from forja.kube import Kube
from forja.mig import change as steps
from forja.mig import node, revert
from forja.mig.change import Change
from forja.mig.drain import Say
from forja.settings import Settings


def make(kube: Kube, change: Change, say: Say) -> str:
    """Change the node, or put it back when a step fails or the process is told to end.

    Returns:
        ``in force`` when there was nothing to do, else ``changed``.

    Raises:
        ForjaError: of the step that failed; its message says what became of the node.
    """
    found = node.look(kube, change.node)
    if not node.differs(found, change.layout, change.known):
        say(f"layout {change.layout} is in force on {found.title}")
        return "in force"
    try:
        with _heeding_sigterm():
            steps.cordon(kube, change, say)
            steps.drain(kube, change, say)
            steps.apply(kube, change, say)
            steps.verify(kube, change, say)
            steps.uncordon(kube, change, say)
    except BaseException as error:
        first = str(error) or type(error).__name__
        say(f"failed: {first}")
        try:
            revert.revert(kube, change, say)
        except Refused as second:
            raise Refused(f"{first}; and then: {second}") from error
        except BaseException as second:
            raise Refused(
                f"{first}; and then: {second or type(second).__name__}; node {change.node} may be left cordoned",
                do=f"./forja mig revert --node {change.node}",
            ) from error
        raise
    return "changed"


@contextlib.contextmanager
def holder(name: str) -> Iterator[str]:
    """Who changes a node from this machine's command line: the user, with this checkout.

    A lock that the kernel drops when its process ends tells a change that died, which may be taken up at once, from one that runs.

    Raises:
        Refused: another process of this checkout changes the node.
    """
    folder = Settings.from_env().state / "mig"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name.replace('/', '_')}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refused(
                f"node {name}", value="being changed by another process of this checkout", allowed="one change at a time"
            ) from None
        # With the folder: the lock of another checkout is another one, and its change is somebody else's.
        yield f"{getpass.getuser()}@{socket.gethostname()}:{folder.parent}"


@contextlib.contextmanager
def _heeding_sigterm() -> Iterator[None]:
    """Have SIGTERM end the change as Ctrl-C does, so that it is taken back."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt("SIGTERM")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
