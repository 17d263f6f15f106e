"""Which checkpoints a training keeps in the lake."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forja.errors import Conflict
from forja.lake import Lake
from forja.stages import train
from forja.training import checkpoint_path, launch


@pytest.fixture
def work(tmp_path: Path) -> Any:
    """Work whose rank has just written the checkpoint of epoch 3."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "history.jsonl").write_text("")
    checkpoint_path(tmp_path / "scratch", 3).write_bytes(b"weights")
    return SimpleNamespace(
        lake=Lake(str(tmp_path / "lake")), folder="f", scratch=tmp_path / "scratch", key="k", say=print, check=lambda: None
    )


@pytest.mark.parametrize("there", [[], ["f/checkpoint-000002.pt"], ["f/checkpoint-000002.pt", "f/checkpoint-000003.pt"]])
def test_the_newest_checkpoint_stays(there: list[str], work: Any) -> None:
    """It may be there already: a try that died between keeping it and removing the older one."""
    for path in there:
        work.lake.create(path, b"old")
    kept = train._keep(work, work.scratch / "history.jsonl", None)
    assert kept == checkpoint_path(work.scratch, 3)
    assert list(work.lake.list("f")) == ["f/checkpoint-000003.pt"]


def test_who_lost_the_claim_writes_nothing(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise Conflict("claim is another's")

    work.check = lost
    plan: Any = SimpleNamespace(parts=SimpleNamespace(training=SimpleNamespace(epochs=5)))
    checkpoint_path(work.scratch, 3).rename(aside := work.scratch / "aside")
    # Torchrun writes it after the stage has begun to look.
    monkeypatch.setattr(train, "newest_checkpoint", lambda _: None if aside.exists() else checkpoint_path(work.scratch, 3))

    def run(handout: Any, me: Any, ranks: int, key: str, look: Any) -> None:
        aside.rename(checkpoint_path(work.scratch, 3))
        look()

    monkeypatch.setattr(launch, "run", run)
    with pytest.raises(Conflict):
        train._torchrun(Path("handout"), plan, 1, work, work.scratch / "history.jsonl", lambda: None, launch.Member())  # type: ignore[arg-type, return-value]
    assert list(work.lake.list("f")) == []
