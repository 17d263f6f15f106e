"""Starting ranks by torchrun: on one machine, or on each member of a gang of pods that train together.

A gang's member 0 is the one that works: it holds the claim, keeps checkpoints and history, and writes the receipt. The others
lend it their processors (see ``forja.training.member``). Whatever ranks must agree on, member 0's rank tells them when they have
met, so there is nothing that they could read at different moments and differ in.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from forja.errors import BadInput, ForjaError
from forja.recipes.base import Training

Look = Callable[[], bool]
"""Called while torchrun runs; True ends it as no longer wanted."""

STOP_S = 40.0
"""Seconds that torchrun has to end itself: it gives its ranks 30 before it kills them."""

HUNG_S = 5.0
"""Seconds that torchrun has to end after its rank's error: it asks member 0's store once more, and waits long when that hangs."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """What a process knows of its gang, from the environment that ``forja_airflow.gang.jobset`` gives its pod."""

    nodes: int = 1
    """Members; 1 for a training on one machine."""
    index: int = 0
    """This one's number, from 0."""
    endpoint: str = ""
    """host:port of member 0, where all meet."""
    attempt: str = ""
    """Number of the gang's restart: members of two attempts never meet."""
    join_s: int = 900
    """Seconds that a member waits for the others: they may still be waiting for a node."""
    timeout_s: int = 60
    """Seconds that one rank waits for another in a step, before it counts it as hung and fails the gang."""

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, value: object, allowed: str) -> None:
            if not ok:
                raise BadInput(f"environment variable {name}", value=value, allowed=allowed)

        check(self.nodes >= 1, "FORJA_NODES", self.nodes, "1 or more")
        check(0 <= self.index < self.nodes, "JOB_COMPLETION_INDEX", self.index, f"0 to {self.nodes - 1}")
        check(self.join_s >= 1, "FORJA_JOIN_S", self.join_s, "1 or more seconds")
        check(self.timeout_s >= 1, "FORJA_STEP_S", self.timeout_s, "1 or more seconds")
        host, _, port = self.endpoint.rpartition(":")
        check(self.nodes == 1 or (bool(host) and port.isdecimal()), "FORJA_RENDEZVOUS", self.endpoint, "HOST:PORT of member 0")


def member(env: Mapping[str, str] = os.environ) -> Member:
    """The member that this process is; the only one of its kind where no environment says otherwise.

    Raises:
        BadInput: a variable that is no number or out of range.
    """

    def number(name: str, default: int) -> int:
        text = env.get(name) or str(default)
        try:
            return int(text)
        except ValueError:
            raise BadInput(f"environment variable {name}", value=text, allowed="a whole number") from None

    if number("FORJA_NODES", 1) == 1:
        return Member()
    if "JOB_COMPLETION_INDEX" not in env:
        raise BadInput("environment variable JOB_COMPLETION_INDEX", value="", allowed="number of this member, as an indexed Job sets it")
    return Member(
        nodes=number("FORJA_NODES", 1), index=number("JOB_COMPLETION_INDEX", 0), endpoint=env.get("FORJA_RENDEZVOUS", ""),
        attempt=env.get("FORJA_GANG_ATTEMPT", "0"), join_s=number("FORJA_JOIN_S", 900), timeout_s=number("FORJA_STEP_S", 60),
    )  # fmt: skip


def ranks(training: Training, me: Member) -> int:
    """Ranks on this machine: the member's share of the recipe's, but no more than there are GPUs where there are any.

    The recipe's number of ranks is that of the whole gang, so a gang does what one machine would do, batch for batch, and a
    result's key says nothing about nodes.

    Raises:
        BadInput: the ranks can't be shared out evenly.
    """
    if training.ranks % me.nodes:
        raise BadInput("recipe field Training.ranks", value=training.ranks, allowed=f"a multiple of the profile's {me.nodes} nodes")
    share = training.ranks // me.nodes
    if not Path("/proc/driver/nvidia/version").exists():
        return share
    import torch

    return min(share, max(torch.cuda.device_count(), 1)) if torch.cuda.is_available() else share


def threads(count: int) -> int:
    """Threads of each of ``count`` ranks: more than cores make OpenMP's waiting loops take turns (20 times slower on two cores)."""
    return max(1, int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))) // count)


def command(handout: Path, me: Member, count: int, key: str) -> list[str]:
    """The command line of torchrun.

    Args:
        handout: file that each rank reads first (``forja.training.Handout``).
        count: ranks on this machine.
        key: key of the work: members of other work never meet these.
    """
    if me.nodes == 1:
        meeting = ["--standalone"]
    else:
        # Waiting for a member to appear happens inside the first read of the store. Hence its long time-out; when they have met, a
        # rank that hangs is found by the time-out of its process group.
        conf = f"is_host={int(me.index == 0)},join_timeout={me.join_s},read_timeout={me.join_s}"
        meeting = [
            f"--nnodes={me.nodes}", "--max-restarts=0", "--rdzv-backend=c10d", f"--rdzv-endpoint={me.endpoint}",
            f"--rdzv-id={key[:16]}-{me.attempt}", f"--rdzv-conf={conf}",
        ]  # fmt: skip
    return [
        sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc-per-node={count}",
        # Gloo greets on standard output and has no switch for it; what a rank has to say goes to the history or to standard error.
        "--redirects=1", f"--log-dir={handout.parent / 'ranks'}", "-m", "forja.training.rank", str(handout),
    ]  # fmt: skip


def run(handout: Path, me: Member, count: int, key: str, look: Look) -> None:
    """Run torchrun to its end.

    Args:
        handout: as for ``command``.
        me: as for ``command``.
        count: as for ``command``.
        key: as for ``command``.
        look: called ten times a second, and once after the end.

    Raises:
        ForjaError: a rank failed; its own words are in the message, the rest of them above it.
    """
    process = subprocess.Popen(command(handout, me, count, key), env={**os.environ, "OMP_NUM_THREADS": str(threads(count))})
    try:
        while True:
            code = process.poll()
            if look():
                return
            if code is not None:
                break
            if me.nodes > 1 and (errors := _errors(handout)) and time.time() - errors[0].stat().st_mtime > HUNG_S:
                process.kill()
            time.sleep(0.1)
    finally:
        stop(process)
    if code:
        raise ForjaError(f"torchrun ended with status {code}: {_first_error(handout)}")


def _errors(handout: Path) -> list[Path]:
    """Files in which ranks of this machine left their errors, in the order in which they failed."""
    return sorted((handout.parent / "ranks").rglob("error.json"), key=lambda path: path.stat().st_mtime)


def _first_error(handout: Path) -> str:
    """What the rank said that failed first on this machine; torchrun prints it too, and much else."""
    try:
        return " ".join(json.loads(_errors(handout)[0].read_text())["message"]["message"].split())
    except (IndexError, KeyError, TypeError, ValueError):
        return "a rank ended without a word, killed perhaps"


def stop(process: subprocess.Popen[bytes]) -> None:
    """End torchrun with its ranks."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
