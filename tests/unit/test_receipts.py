"""Receipts, the harness around stages, and what adopts them."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from forja import receipts, recipes, stages
from forja.errors import BadInput, Damaged, Refused
from forja.lake import Lake
from forja.receipts import Input, Output, Receipt
from forja.settings import ROOT, Settings
from forja.stages import harness
from forja.stages.base import Outcome, Plan, Stage, Work

DIGITS = recipes.load("digits")
SCHEMA = json.loads((ROOT / "include/forja/receipt.schema.json").read_text())


def receipt(**changes: Any) -> Receipt:
    body: dict[str, Any] = {
        "stage": "train", "recipe": "digits", "team": "vision", "key": "0" * 32, "code": "0" * 64,
        "command": "./forja stage train --recipe digits",
        "inputs": {"dataset": [Input(ref="vision/digits/transform/k/receipt.json", digest="1" * 64)]},
        "outputs": {"model.pt": Output(path="vision/digits/train/k/x-model.pt", sha256="2" * 64, bytes=3)},
        "metrics": {"accuracy": 0.5}, "facts": {"latency_ms": None}, "report": ["a line"], "versions": {"torch": "2"},
        "started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:00:01+00:00", "seconds": 1.0,
    }  # fmt: skip
    return Receipt(**{**body, **changes})


def test_receipt_is_valid_and_reads_back() -> None:
    made = receipt()
    jsonschema.validate(json.loads(made.to_json()), SCHEMA)
    assert receipts.parse(made.to_json(), "p") == made


BROKEN = {
    "no JSON": (b"{", "no receipt"),
    "a later schema": (json.dumps({**json.loads(receipt().to_json()), "schema": 2}).encode(), "schema of receipt"),
    "an unknown field": (json.dumps({**json.loads(receipt().to_json()), "x": 1}).encode(), "no receipt of schema 1"),
    "a list": (b"[]", "no receipt"),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_broken_receipts_are_refused(case: str) -> None:
    data, message = BROKEN[case]
    with pytest.raises(BadInput, match=message):
        receipts.parse(data, "p")


def test_schema_refuses_what_a_receipt_must_not_be() -> None:
    for change in ({"stage": "dance"}, {"key": "short"}, {"extra": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**json.loads(receipt().to_json()), **change}, SCHEMA)


class Fake:
    """A stage whose work can be told apart."""

    def __init__(self, repeat: str = "memoised", refused: str = "", content: str = "x") -> None:
        self.STAGE = Stage(environment="control", repeat=repeat)  # type: ignore[arg-type]
        self.refused, self.content, self.runs, self.fact = refused, content, 0, 1

    def plan(self, recipe: recipes.Recipe, inputs: Any, variant: str) -> Plan[str]:
        return Plan(stage="train", recipe=recipe.name, team=recipe.team, parts="part", inputs=inputs)

    def run(self, plan: Plan[str], work: Work) -> Outcome:
        self.runs += 1
        return Outcome(outputs={"out": work.save("out", self.content.encode())}, facts={"fact": self.fact}, refused=self.refused)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"FORJA_LAKE": str(tmp_path / "lake"), "FORJA_STATE": str(tmp_path / "state")})


def use(monkeypatch: pytest.MonkeyPatch, fake: Fake) -> None:
    monkeypatch.setattr(stages, "load", lambda verb: types.SimpleNamespace(STAGE=fake.STAGE, plan=fake.plan, run=fake.run))


def test_memoised_work_is_done_once(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    fake = Fake()
    use(monkeypatch, fake)
    first, wrote = harness.execute(settings, "train", DIGITS, {})
    again, wrote_again = harness.execute(settings, "train", DIGITS, {})
    assert (wrote, wrote_again, fake.runs) == (True, False, 1)
    assert again == first
    jsonschema.validate(json.loads(first.to_json()), SCHEMA)


@pytest.mark.parametrize(("content", "wrote"), [("x", False), ("other bytes", True)])
def test_work_whose_output_is_gone_is_done_again(monkeypatch: pytest.MonkeyPatch, settings: Settings, content: str, wrote: bool) -> None:
    """The same bytes make the old receipt true again; other bytes need a new one."""
    fake, lake = Fake(), Lake(settings.lake)
    use(monkeypatch, fake)
    first, _ = harness.execute(settings, "train", DIGITS, {})
    lake.delete(first.output("out").path)
    fake.content = content
    again, written = harness.execute(settings, "train", DIGITS, {})
    assert (written, fake.runs) == (wrote, 2)
    assert receipts.intact(lake, again)


@pytest.mark.parametrize("damage", [b"", b"y"], ids=["cut", "of the same size"])
def test_damaged_output_is_made_again(monkeypatch: pytest.MonkeyPatch, settings: Settings, damage: bytes) -> None:
    fake, lake = Fake(), Lake(settings.lake)
    use(monkeypatch, fake)
    first, _ = harness.execute(settings, "train", DIGITS, {})
    lake.replace(first.output("out").path, damage)
    again, _ = harness.execute(settings, "train", DIGITS, {})
    assert fake.runs == 2
    assert lake.read(again.output("out").path, again.output("out").sha256) == b"x"


def test_obsolete_objects_go_once_the_receipt_is_there(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    fake, lake = Fake(), Lake(settings.lake)
    use(monkeypatch, fake)
    lake.create("vision/digits/train/checkpoint", b"c")
    run = fake.run
    monkeypatch.setattr(fake, "run", lambda plan, work: dataclasses.replace(run(plan, work), obsolete=["vision/digits/train/checkpoint"]))
    use(monkeypatch, fake)
    harness.execute(settings, "train", DIGITS, {})
    assert lake.size("vision/digits/train/checkpoint") is None


def test_numbers_of_reconciled_receipts_are_never_used_again(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    fake, lake = Fake(repeat="reconciled"), Lake(settings.lake)
    use(monkeypatch, fake)
    paths = []
    for fact in (1, 2, 3):
        fake.fact = fact
        paths.append(harness.execute(settings, "train", DIGITS, {})[0].path)
    lake.delete(paths[0])
    fake.fact = 4
    assert harness.execute(settings, "train", DIGITS, {})[0].path.endswith("receipt-000004.json")


FOREIGN = {
    "another recipe's": ({"recipe": "ai4i", "team": "maintenance", "stage": "transform"}, "a transform receipt of digits"),
    "another stage's": ({"stage": "register"}, "a transform receipt of digits"),
}


@pytest.mark.parametrize("case", FOREIGN, ids=str)
def test_inputs_of_another_kind_are_refused(case: str, settings: Settings) -> None:
    changes, message = FOREIGN[case]
    lake = Lake(settings.lake)
    lake.create("x/receipt.json", receipt(**changes).to_json())
    with pytest.raises(BadInput, match=message):
        harness.prepare(lake, "train", DIGITS, {"dataset": ["x/receipt.json"]})


def test_raw_table_of_another_recipe_is_refused(settings: Settings) -> None:
    with pytest.raises(BadInput, match="vision/digits/raw@VERSION"):
        harness.prepare(Lake(settings.lake), "transform", DIGITS, {"raw": ["maintenance/ai4i/raw@1"]})


@pytest.mark.parametrize("path", ["../x", "a//b", "./a"])
def test_paths_that_leave_the_lake_are_refused(path: str, settings: Settings) -> None:
    with pytest.raises(BadInput, match="path in the lake"):
        Lake(settings.lake).get(path)


def test_loser_of_a_race_adopts_and_discards_its_bytes(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    fake, lake = Fake(), Lake(settings.lake)
    use(monkeypatch, fake)
    winner, _ = harness.execute(settings, "train", DIGITS, {})
    prepared = harness.prepare(lake, "train", recipes.load("digits"), {})
    work = Work(settings=settings, lake=lake, folder=prepared.folder, key=prepared.key, scratch=Path(), check=lambda: None)
    fake.content = "other bytes"
    late = harness._receipt(prepared, fake.run(prepared.plan, work), "2026-01-01T00:00:00+00:00", 1.0)
    adopted, wrote = harness._write(lake, prepared, late, work)
    assert (wrote, adopted) == (False, winner)
    assert lake.size(late.output("out").path) is None
    assert lake.size(winner.output("out").path) is not None


def test_reconciled_work_looks_each_time_and_writes_when_facts_change(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    fake = Fake(repeat="reconciled")
    use(monkeypatch, fake)
    wrote = []
    for fact in (1, 1, 2):
        fake.fact = fact
        wrote.append(harness.execute(settings, "train", DIGITS, {})[1])
    assert (wrote, fake.runs) == ([True, False, True], 3)


def test_refusal_is_recorded_and_stays_one(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    fake = Fake(refused="accuracy 0.1 is below 0.9")
    use(monkeypatch, fake)
    for _ in range(2):
        with pytest.raises(Refused, match=r"accuracy 0\.1"):
            harness.execute(settings, "train", DIGITS, {})
    assert fake.runs == 1
    found = receipts.newest(Lake(settings.lake), "vision", "digits", "train")
    assert found is not None
    assert found.facts["refused"] == "accuracy 0.1 is below 0.9"


def test_other_code_is_refused(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    fake = Fake()
    use(monkeypatch, fake)
    with pytest.raises(BadInput, match="code of stage train"):
        harness.execute(settings, "train", DIGITS, {}, code="f" * 64)
    assert fake.runs == 0


INPUTS = {
    "none": ({}, "inputs of transform"),
    "an unknown one": ({"raw": ["a@1"], "x": ["y"]}, "inputs of transform"),
    "two of one": ({"raw": ["a@1", "a@2"]}, "input raw"),
    "no version": ({"raw": ["vision/digits/raw"]}, "table reference"),
    "no such table": ({"raw": ["vision/digits/raw@1"]}, "table in the lake"),
}


@pytest.mark.parametrize("case", INPUTS, ids=str)
def test_bad_inputs_are_named(case: str, settings: Settings) -> None:
    refs, message = INPUTS[case]
    with pytest.raises(BadInput, match=message):
        harness.prepare(Lake(settings.lake), "transform", recipes.load("digits"), refs)


def test_damaged_bytes_are_never_read(settings: Settings) -> None:
    lake = Lake(settings.lake)
    lake.create("team/x", b"good")
    digest = "0" * 64
    with pytest.raises(Damaged, match="SHA-256"):
        lake.read("team/x", digest)
