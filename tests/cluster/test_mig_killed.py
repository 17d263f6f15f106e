"""Changes of MIG layouts whose process dies: killed after each of its writes, or told to end."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cluster.mig import ADMIN, BALANCED, gpu, here, probes, quick, run_on, running, space, state, told
from cluster.mig_manager import managing, wait_until

from forja import kube as k8s
from forja.mig import revert, whole

__all__ = ["gpu", "here", "space", "told"]


@pytest.mark.parametrize("then", ["rerun", "revert"])
def test_killed_after_each_write(kube: k8s.Kube, gpu: str, space: str, here: dict[str, str], told: list[str], then: str) -> None:
    """kill -9 after the 1st, 2nd, ... write of a change, until none is left to kill; each time the node is put right."""
    before = state(kube, gpu)
    run_on(kube, space, gpu)
    kills = 0
    with managing(ADMIN, gpu):
        while (first := _killed(here, gpu, kills + 1)).returncode:
            assert first.returncode == -9, first.stderr
            kills += 1
            with whole.holder(gpu) as holder:
                if then == "rerun":
                    whole.make(kube, quick(gpu, "balanced", holder), told.append)
                    assert state(kube, gpu) == {**before, "label": "balanced", "offers": BALANCED}, "\n".join(told)
                else:
                    revert.revert(kube, quick(gpu, "", holder), told.append)
                whole.make(kube, quick(gpu, "all-disabled", holder), told.append)
            assert state(kube, gpu) == before, "\n".join(told)
            wait_until(lambda: running(kube, space), "the pod is back")
    assert kills == int(first.stdout) >= 8
    assert probes(kube) == []


def _killed(env: dict[str, str], node: str, write: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.mig_killed", str(ADMIN), node, "balanced", str(write)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_sigterm_takes_the_change_back(kube: k8s.Kube, gpu: str, here: dict[str, str]) -> None:
    before = state(kube, gpu)
    command = [sys.executable, "-m", "cluster.mig_killed", str(ADMIN), gpu, "balanced", "1000"]
    with managing(ADMIN, gpu, "slow"), subprocess.Popen(command, env=here, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "is now balanced" in line:
                process.terminate()
        assert process.wait() != 0
    assert state(kube, gpu) == before
