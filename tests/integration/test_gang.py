"""A gang of two members as processes of one machine: real torchrun and gloo on the loopback, a real lake, members killed and stopped.

What restarts a gang in a cluster is its JobSet; here the test does. tests/cluster/test_gang.py has both for real.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slow_stage

from forja import receipts, recipes
from forja.lake import Lake
from forja.settings import ROOT

pytestmark = pytest.mark.ml

STAGE = ROOT / "tests" / "slow_stage.py"


def tree(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for parent in found:
        try:
            found += [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
        except FileNotFoundError:
            continue
    return found


def send(process: subprocess.Popen[str], number: signal.Signals) -> None:
    for pid in tree(process.pid):
        os.kill(pid, number)


class Gang:
    """Two members, each with a log and a temporary folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lake, self.attempt = folder, Lake(str(folder / "lake")), -1
        self.members: dict[int, subprocess.Popen[str]] = {}
        raw = slow_stage.plant(self.lake, 0)
        assert self.stage("transform", f"raw={raw}", {}, "transform").wait(120) == 0, (folder / "transform.log").read_text()
        self.dataset = (folder / "transform.log").read_text().split()[-1]

    def stage(self, verb: str, given: str, env: dict[str, str], log: str) -> subprocess.Popen[str]:
        scratch = self.folder / f"{log}.tmp"
        scratch.mkdir(exist_ok=True)
        closed = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "FORJA_STATE": str(self.folder / "state")}
        return subprocess.Popen(
            [sys.executable, STAGE, verb, "--recipe", "slow", f"--in={given}"],
            env={
                **os.environ, **closed, **env, "PYTHONPATH": str(ROOT / "include"), "PYTHONUNBUFFERED": "1", "FORJA_LAKE": self.lake.root,
                "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch),
            },
            text=True, stdout=(self.folder / f"{log}.log").open("w"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def start(self, *only: int) -> None:
        """The next try of the whole gang, or of some members."""
        self.attempt += 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {
            "FORJA_NODES": "2", "FORJA_RENDEZVOUS": f"127.0.0.1:{port}", "FORJA_GANG": "g", "FORJA_GANG_ATTEMPT": str(self.attempt),
            "FORJA_STEP_S": "10", "FORJA_JOIN_S": "120", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        self.members = {
            i: self.stage("train", f"dataset={self.dataset}", {**env, "JOB_COMPLETION_INDEX": str(i)}, f"{self.attempt}-{i}")
            for i in only or (0, 1)
        }

    def log(self, member: int) -> str:
        return (self.folder / f"{self.attempt}-{member}.log").read_text()

    def ends(self, member: int) -> int:
        """Exit status of a member."""
        try:
            return self.members[member].wait(120)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"member {member} doesn't end:\n{self.log(member)}") from None

    def until(self, what: Callable[[], Any]) -> Any:
        """Wait for something to be true while both members run."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if found := what():
                return found
            assert [m.poll() for m in self.members.values()] == [None, None], self.log(0) + self.log(1)
            time.sleep(0.1)
        raise AssertionError(self.log(0) + self.log(1))

    def checkpoints(self) -> list[int]:
        return [int(p[-9:-3]) for p in self.lake.list("vision/slow/train") if "/checkpoint-" in p]

    def receipts(self) -> list[str]:
        return [p for p in self.lake.list("vision/slow/train") if p.endswith("receipt.json")]


@pytest.fixture
def gang(tmp_path: Path) -> Iterator[Gang]:
    made = Gang(tmp_path)
    yield made
    for member in made.members.values():
        if member.poll() is None:
            send(member, signal.SIGKILL)
            member.wait()


def first_epoch(log: str) -> int:
    """Epoch of a rank's first step."""
    found = re.search(r"first step at [\d.]+, epoch (\d+)", log)
    return int(found[1]) if found else 0


def test_members_die_hang_and_go_on_together_from_one_checkpoint(gang: Gang) -> None:
    gang.start()
    gang.until(gang.checkpoints)
    send(gang.members[0], signal.SIGKILL)  # with its claim held, as a node that loses power does
    assert gang.ends(1) == 1
    assert "torchrun ended with status" in gang.log(1)

    gang.start()
    gang.until(lambda: first_epoch(gang.log(0)) and first_epoch(gang.log(1)))
    assert "waiting: process" not in gang.log(0), "the claim of an earlier try is nobody's"
    began = first_epoch(gang.log(0))
    assert began == first_epoch(gang.log(1)) > 1
    send(gang.members[1], signal.SIGSTOP)
    assert gang.ends(0) == 1, "a member that hangs fails the other within FORJA_STEP_S"
    send(gang.members[1], signal.SIGKILL)
    assert not [p for p in gang.lake.list("vision/slow/train") if "/claim-" in p], "member 0 ended by itself"

    assert gang.receipts() == []

    gang.start()
    assert [gang.ends(0), gang.ends(1)] == [0, 0], gang.log(0) + gang.log(1)
    (path,) = gang.receipts()
    receipt = receipts.load(gang.lake, path)
    assert receipt.facts["resumed_after_epoch"] == first_epoch(gang.log(0)) - 1 >= began - 1
    assert (receipt.facts["nodes"], receipt.facts["ranks"]) == (2, 2)
    steps = [json.loads(line)["step"] for line in gang.lake.get(receipt.output("history.jsonl").path).splitlines()]
    assert steps == list(range(1, recipes.load("slow").training.epochs + 1))
    assert receipt.metrics["validation_accuracy"] > 0.95
    digests = re.findall(r"parameters (\w{16})", gang.log(0) + gang.log(1))
    assert len(digests) == 2
    assert len(set(digests)) == 1
    assert gang.checkpoints() == []

    gang.start()
    assert [gang.ends(0), gang.ends(1)] == [0, 0], "work that is done is adopted by all"
    assert "adopted" in gang.log(0)
    assert "the receipt is there" in gang.log(1)


def test_a_member_whose_help_comes_too_late_ends_well(gang: Gang) -> None:
    """Member 1 waits for a member 0 that never trains: another run, on one machine, did the work meanwhile."""
    gang.start(1)
    alone = gang.stage("train", f"dataset={gang.dataset}", {}, "alone")
    assert alone.wait(180) == 0, (gang.folder / "alone.log").read_text()
    assert gang.ends(1) == 0, gang.log(1)
    (path,) = gang.receipts()
    assert receipts.load(gang.lake, path).facts["nodes"] == 1, "the key says nothing about nodes"
