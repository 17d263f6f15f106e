"""What a process knows of its gang, how it starts its ranks, and whose claim it may take over."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from forja import claims, recipes
from forja.errors import BadInput, ForjaError
from forja.lake import Lake
from forja.stages import __main__ as stages
from forja.stages import train
from forja.training import launch

POD = {"FORJA_NODES": "2", "FORJA_RENDEZVOUS": "g-gang-0-0.g:29500", "FORJA_GANG_ATTEMPT": "3", "JOB_COMPLETION_INDEX": "1"}
TRAINING = recipes.load("digits").training


def test_without_a_gang_there_is_one_machine() -> None:
    assert launch.member({}) == launch.member({"JOB_COMPLETION_INDEX": "1"}) == launch.Member()


def test_a_pod_says_which_member_it_is() -> None:
    me = launch.member({**POD, "FORJA_JOIN_S": "60", "FORJA_STEP_S": "9"})
    assert me == launch.Member(nodes=2, index=1, endpoint="g-gang-0-0.g:29500", attempt="3", join_s=60, timeout_s=9)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"FORJA_NODES": "two"}, "FORJA_NODES: got 'two'; allowed: a whole number"),
        ({"FORJA_NODES": "0"}, "FORJA_NODES: got 0; allowed: 1 or more"),
        ({"JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETION_INDEX: got 2; allowed: 0 to 1"),
        ({"FORJA_RENDEZVOUS": "g"}, "FORJA_RENDEZVOUS: got 'g'; allowed: HOST:PORT"),
        ({"FORJA_STEP_S": "0"}, "FORJA_STEP_S: got 0"),
    ],
)
def test_wrong_words_are_refused(change: dict[str, str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        launch.member({**POD, **change})


def test_a_member_without_a_number_is_refused() -> None:
    with pytest.raises(BadInput, match="JOB_COMPLETION_INDEX"):
        launch.member({k: v for k, v in POD.items() if k != "JOB_COMPLETION_INDEX"})


@pytest.mark.parametrize(("all_ranks", "nodes", "each"), [(2, 1, 2), (2, 2, 1), (8, 2, 4)])
def test_a_gang_has_the_ranks_of_the_recipe(all_ranks: int, nodes: int, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)  # no GPU's driver here
    training = dataclasses.replace(TRAINING, ranks=all_ranks)
    assert launch.ranks(training, launch.Member(nodes=nodes, endpoint="g:1")) == each


def test_ranks_that_can_not_be_shared_out_are_refused() -> None:
    with pytest.raises(BadInput, match="a multiple of the profile's 3 nodes"):
        launch.ranks(TRAINING, launch.Member(nodes=3, endpoint="g:1"))


def test_members_meet_at_member_0_and_those_of_another_try_or_other_work_do_not() -> None:
    def meeting(index: int, attempt: str = "0", key: str = "k" * 32) -> list[str]:
        me = launch.Member(nodes=2, index=index, endpoint="g:29500", attempt=attempt, join_s=7)
        return launch.command(Path("/x/handout"), me, 1, key)

    first, second = meeting(0), meeting(1)
    assert "--rdzv-conf=is_host=1,join_timeout=7,read_timeout=7" in first
    assert "--rdzv-conf=is_host=0,join_timeout=7,read_timeout=7" in second
    shared = {"--nnodes=2", "--max-restarts=0", "--rdzv-backend=c10d", "--rdzv-endpoint=g:29500", f"--rdzv-id={'k' * 16}-0"}
    assert shared <= set(first)
    assert shared <= set(second)
    assert f"--rdzv-id={'k' * 16}-1" in meeting(1, "1")
    assert "--standalone" in launch.command(Path("/x/handout"), launch.Member(), 2, "k")


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str, me: launch.Member) -> None:
    """launch.run with other words than torchrun's."""
    monkeypatch.setattr(launch, "command", lambda *_: [sys.executable, "-c", code, str(folder)])
    launch.run(folder / "handout", me, 1, "key", lambda: False)


SAYS = "import json, pathlib, sys; f = pathlib.Path(sys.argv[1], 'ranks', '0'); f.mkdir(parents=True); "
SAYS += "(f / 'error.json').write_text(json.dumps({'message': {'message': 'ValueError:\\n it broke'}})); "


def test_a_failure_has_the_ranks_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ForjaError, match="status 7: ValueError: it broke"):
        run(tmp_path, monkeypatch, SAYS + "sys.exit(7)", launch.Member())


def test_a_rank_that_was_killed_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ForjaError, match="status 1: a rank ended without a word"):
        run(tmp_path, monkeypatch, "import sys; sys.exit(1)", launch.Member())


def test_a_torchrun_that_hangs_after_its_rank_failed_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does when the pod that keeps its store stands still."""
    monkeypatch.setattr(launch, "HUNG_S", 0.0)
    code = SAYS + "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    with pytest.raises(ForjaError, match="status -9: ValueError: it broke"):
        run(tmp_path, monkeypatch, code, launch.Member(nodes=2, endpoint="g:1"))


def test_a_member_that_helps_never_takes_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in POD.items():
        monkeypatch.setenv(name, value)
    nothing: Any = None
    with pytest.raises(BadInput, match="member of a gang that trains: got 1"):
        train.run(nothing, nothing)


def test_only_train_has_members_that_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {**POD, "FORJA_LAKE": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert stages.main(["transform", "--recipe", "digits"]) == BadInput.exit_code
    assert "stage of a gang: got 'transform'; allowed: train" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("gang", "attempt", "waits"),
    [("g", "1", False), ("g", "0", True), ("other", "1", True), ("", "", True)],
)
def test_a_restarted_gang_takes_over_its_own_claim_at_once(
    gang: str, attempt: str, waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = Lake(str(tmp_path))
    monkeypatch.setenv("FORJA_GANG", "g")
    monkeypatch.setenv("FORJA_GANG_ATTEMPT", "0")
    # A pod of its own: neither its process nor its host can be asked.
    body = {**claims._here(1), "holder": "h", "beat": 0, "namespace": "pid:[1]", "host": "g-gang-0-0"}
    lake.create("x/claim-000001.json", json.dumps(body).encode())
    monkeypatch.setenv("FORJA_GANG", gang)
    monkeypatch.setenv("FORJA_GANG_ATTEMPT", attempt)
    said: list[str] = []
    claim = claims.take(lake, "x", done=lambda: bool(said), say=said.append)
    assert bool(said) is waits
    if claim is not None:
        claim.release()
    assert (claim is None) is waits
