"""Watching a gang from outside: its pods, all that they print, and the processes behind them.

``python -m cluster.kit exec -- python -m cluster.gangs`` measures how long a gang takes from the end of a member to its next step.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import access, platform
from cluster.dags.gang import FOLDER, NAMESPACE, RECIPE, RECIPES, SITE
from cluster.kit.places import ROOT

from forja import envs
from forja.baseline import manifests, plan
from forja.errors import ForjaError
from forja.kube import Kube, place
from forja_airflow.gang import jobset as gang_jobset

STEP = re.compile(r"rank \d+ of \d+: first step at ([\d.]+), epoch (\d+)")
DIGEST = re.compile(r"rank \d+ of \d+: parameters (\w{16})")


FEWER = itertools.count(int(uuid.uuid4().hex[:2], 16))
"""Rows that the next dataset lacks, so that it is another one each time."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """First training step of a member in one of the gang's attempts."""

    attempt: int
    member: int
    at: float
    """Seconds since 1970."""
    epoch: int


class Watch:
    """Reads the pods of a namespace's gangs and their logs twice a second, until the block ends."""

    def __init__(self, kube: Kube, namespace: str) -> None:
        self._kube, self._namespace, self._stop = kube, namespace, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.pods: dict[str, Any] = {}
        """Every pod that was seen, as it was last, by its uid."""
        self.logs: dict[str, str] = {}
        """What each printed."""

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            with contextlib.suppress(ForjaError):
                self._look()

    def _look(self) -> None:
        for pod in self._kube.list("Pod", self._namespace, labels="forja/gang"):
            meta = pod["metadata"]
            self.pods[meta["uid"]] = pod
            with contextlib.suppress(ForjaError):
                said = str(self._kube.request("GET", f"{place('Pod', self._namespace)}/{meta['name']}/log"))
                if len(said) >= len(self.logs.get(meta["uid"], "")):
                    self.logs[meta["uid"]] = said

    def steps(self, attempt: int) -> list[Step]:
        """First steps of the members in an attempt, as far as they came."""
        found = []
        for uid, said in list(self.logs.items()):
            labels = self.pods[uid]["metadata"]["labels"]
            match = STEP.search(said)
            if match and int(labels[gang_jobset.ATTEMPT]) == attempt:
                member = int(labels[gang_jobset.INDEX])
                found.append(Step(attempt=attempt, member=member, at=float(match[1]), epoch=int(match[2])))
        return sorted(found, key=lambda step: step.member)

    def digests(self) -> list[str]:
        """Digests of the parameters that ranks ended with."""
        return [digest for said in self.logs.values() for digest in DIGEST.findall(said)]

    def member(self, index: int) -> str:
        """Host name of a member's pod."""
        pods = [p for p in self.pods.values() if p["metadata"]["labels"].get(gang_jobset.INDEX) == str(index)]
        return str(pods[-1]["spec"]["hostname"])

    def key(self) -> str:
        """Key of the gang's work."""
        return str(next(iter(self.pods.values()))["metadata"]["labels"]["forja/key"])

    def text(self) -> str:
        """All that was printed, for a failure's message."""
        return "\n".join(f"=== {self.pods[uid]['metadata']['name']}\n{said}" for uid, said in self.logs.items())


def processes(host: str, words: bytes = b"") -> list[int]:
    """Processes of a pod, by its host name, as this machine numbers them; those with ``words`` in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HOSTNAME={host}".encode() in (folder / "environ").read_bytes().split(b"\0") and words in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def send(host: str, number: signal.Signals, words: bytes = b"") -> float:
    """Send a signal to processes of a pod; when, in seconds since 1970."""
    found = processes(host, words)
    assert found, f"no process of {host} with {words!r}"
    for pid in found:
        os.kill(pid, number)
    return time.time()


@contextlib.contextmanager
def tenant(on: platform.Platform) -> Iterator[None]:
    """The namespace of dags/gang.py, inside the baseline, with the recipe that the image lacks; until the end of the block."""
    with access.tenant(on.kube, NAMESPACE, on.lake_env):
        for manifest in manifests.render(SITE, SITE.tenants[RECIPE.team]):
            on.kube.apply(manifest, manager=plan.MANAGER)
        recipe = {"metadata": {"name": RECIPES, "namespace": NAMESPACE}, "data": {"slow.py": (FOLDER / "slow.py").read_text()}}
        on.kube.apply({"apiVersion": "v1", "kind": "ConfigMap", **recipe}, manager=access.MANAGER)
        yield


def dataset(on: platform.Platform) -> str:
    """A dataset that nobody trained on yet: its receipt."""

    def run(*words: str) -> str:
        command = [envs.python("ml", on.settings), ROOT / "tests" / "slow_stage.py", *words]
        env = {**on.env, "PYTHONPATH": str(ROOT / "include")}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.split()[-1]

    return run("transform", "--recipe", "slow", f"--in=raw={run('plant', str(next(FEWER)))}")


def left(on: platform.Platform) -> list[str]:
    """What there is of gangs in the cluster."""
    found = [*on.kube.list("JobSet", NAMESPACE), *on.kube.list("Job", NAMESPACE), *on.pods(NAMESPACE)]
    return [f"{thing['kind']} {thing['metadata']['name']}" for thing in found]


def steps(seen: Watch, attempt: int) -> Callable[[], object]:
    """Tells whether both members made a step in an attempt."""
    return lambda: len(seen.steps(attempt)) == 2


def restart_s(seen: Watch, attempt: int, killed: float) -> float:
    """Seconds from a member's end to the first step of the whole gang in its next attempt."""
    return max(step.at for step in seen.steps(attempt)) - killed


def measure(on: platform.Platform, member: int) -> float:
    """Seconds from kill -9 of all of a member to the gang's next step, in a run of its own that is ended then."""
    with Watch(on.kube, NAMESPACE) as seen:
        run = on.trigger("gang_train", {"dataset": dataset(on)})
        on.until("the first steps", steps(seen, 0), 240)
        on.until("a checkpoint", lambda: any("/checkpoint-" in p for p in on.lake.list(f"vision/slow/train/{seen.key()}")), 120)
        killed = send(seen.member(member), signal.SIGKILL)
        on.until("steps after the restart", steps(seen, 1), 240)
        on.end_task("gang_train", run, "train")
        on.until("everything of the gang to be gone", lambda: not left(on), 60)
    return restart_s(seen, 1, killed)
