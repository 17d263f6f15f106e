"""Keys change with inputs, recipe parts and code, and with nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from forja import keys, recipes, stages
from forja.receipts import Input
from forja.recipes.base import STAGES

RECIPE = recipes.load("digits")
INPUT = {"dataset": [Input(ref="vision/digits/transform/a/receipt.json", digest="d" * 64)]}


def key(recipe: recipes.Recipe = RECIPE, inputs: dict[str, list[Input]] = INPUT, code: str = "c") -> str:
    plan = stages.load("train").plan(recipe, inputs, "")
    return keys.stage_key(stage="train", recipe=recipe.name, variant="", parts=plan.parts, inputs=inputs, code=code)


SAME = {
    "another place of the same data": lambda: key(inputs={"dataset": [Input(ref="elsewhere", digest="d" * 64)]}),
    "a part that training doesn't read": lambda: key(dataclasses.replace(RECIPE, description="other words", gates=RECIPE.gates[:1])),
}
OTHER = {
    "other data": lambda: key(inputs={"dataset": [Input(ref=INPUT["dataset"][0].ref, digest="e" * 64)]}),
    "another seed": lambda: key(dataclasses.replace(RECIPE, training=dataclasses.replace(RECIPE.training, seed=1))),
    "other code": lambda: key(code="d"),
}


@pytest.mark.parametrize("case", SAME, ids=str)
def test_key_stays(case: str) -> None:
    assert SAME[case]() == key()


@pytest.mark.parametrize("case", OTHER, ids=str)
def test_key_changes(case: str) -> None:
    assert OTHER[case]() != key()


def test_kinds_with_equal_fields_differ() -> None:
    @dataclasses.dataclass(frozen=True)
    class A:
        x: int = 1

    @dataclasses.dataclass(frozen=True)
    class B:
        x: int = 1

    assert keys.plain(A()) != keys.plain(B())


def test_closure_of_train_holds_the_ranks_code_and_no_recipe() -> None:
    names = {str(p.relative_to(keys.PACKAGE)) for p in keys.closure("forja.stages.train")}
    assert {"stages/train.py", "training/rank.py", "models.py", "loading.py", "recipes/base.py", "lake.py"} <= names
    assert not {"recipes/digits.py", "stages/release.py", "cli/run.py"} & names


def test_code_digest_changes_with_a_module_of_the_closure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stages").mkdir()
    for name, text in {"__init__": "", "stages/__init__": "", "stages/x": "from forja import y", "y": "A = 1", "z": ""}.items():
        (tmp_path / f"{name}.py").write_text(text)
    lock = tmp_path / "lock"
    lock.write_text("torch==1")
    monkeypatch.setattr(keys, "PACKAGE", tmp_path)
    monkeypatch.setattr(keys, "LOCKS", {"ml": lock})

    def digest() -> str:
        keys.code_digest.cache_clear()
        return keys.code_digest("forja.stages.x", "ml")

    try:
        seen = [digest()]
        (tmp_path / "z.py").write_text("B = 2")
        assert digest() == seen[0]
        for path, text in ((tmp_path / "y.py", "A = 2"), (lock, "torch==2")):
            path.write_text(text)
            seen.append(digest())
        assert len(set(seen)) == 3
    finally:
        keys.code_digest.cache_clear()


@pytest.mark.parametrize("verb", STAGES)
def test_every_stage_has_a_code_digest(verb: str) -> None:
    assert len(keys.code_digest(f"forja.stages.{verb}", stages.load(verb).STAGE.environment)) == 64
