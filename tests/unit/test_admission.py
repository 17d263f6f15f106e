"""What admission decides, and that two deciders agree."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
from pathlib import Path

import deltalake
import pyarrow as pa
import pytest

from forja import admission, keys, recipes
from forja.admission import Candidate, Cause, Decision, Run, decide
from forja.errors import BadInput
from forja.lake import Lake
from forja.recipes.base import Recipe, Triggers
from forja.stages import ingest

TRIGGERS = Triggers(min_new_rows=10, cooldown_s=300)
RECIPE: Recipe = dataclasses.replace(recipes.load("digits"), triggers=TRIGGERS)


def candidate(rows: int, digest: str = "") -> Candidate:
    return Candidate(raw=f"vision/digits/raw@{rows}", digest=digest or f"rows-{rows}", rows=rows)


def admitted(rows: int = 100, at: float = 1000) -> Decision:
    return Decision(
        number=1, run="first", cause="new data", candidate=candidate(rows), verdict="admitted", reason="the first run", at=at, last=1
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "digest", "cause", "now", "verdict", "reason"),
    [
        pytest.param(100, "", "hand", 1001, "admitted", "by hand", id="by hand, same rows, within the cool-down"),
        pytest.param(100, "", "new data", 2000, "skipped", "same rows", id="same rows"),
        pytest.param(200, "rows-100", "new data", 2000, "skipped", "same rows", id="same content under another version"),
        pytest.param(109, "", "new data", 2000, "skipped", "9 new rows", id="too few rows"),
        pytest.param(110, "", "new data", 2000, "admitted", "10 new rows", id="just enough rows"),
        pytest.param(200, "", "new data", 1299, "waiting", "cool-down", id="within the cool-down"),
        pytest.param(200, "", "new data", 1300, "admitted", "100 new rows", id="cool-down just over"),
        pytest.param(100, "", "schedule", 2000, "skipped", "same rows", id="clock, same rows"),
        pytest.param(101, "", "schedule", 1001, "admitted", "schedule", id="clock, any new row"),
    ],
)
def test_decide(rows: int, digest: str, cause: Cause, now: float, verdict: str, reason: str) -> None:
    first = admitted()
    decision = decide(
        candidate(rows, digest), Run(id="next", cause=cause), TRIGGERS, now=now, number=2, newest=first, admitted=first
    )  # fmt: skip
    assert decision.verdict == verdict
    assert reason in decision.reason
    assert decision.last == (2 if verdict == "admitted" else 1)


def test_first_run_is_admitted() -> None:
    assert decide(candidate(1), Run(id="a", cause="new data"), TRIGGERS, now=0).verdict == "admitted"


def test_one_run_waits_and_the_others_rely_on_it() -> None:
    first = admitted()
    kinds = []
    newest = first
    for number, name in enumerate(("b", "c", "d", "b"), start=2):
        newest = decide(candidate(200), Run(id=name, cause="new data"), TRIGGERS, now=1100, number=number, newest=newest, admitted=first)
        kinds.append(newest.verdict)
    assert kinds == ["waiting", "skipped", "skipped", "waiting"]
    over = decide(candidate(300), Run(id="b", cause="new data"), TRIGGERS, now=1300, number=6, newest=newest, admitted=first)
    assert (over.verdict, over.waiter) == ("admitted", "")


def append(lake: Lake, rows: int, offset: int = 0) -> None:
    found = [{"key": f"{n}", "label": f"{n}", "sha256": f"{n}", "offset": n, "time": n} for n in range(offset, offset + rows)]
    table = pa.Table.from_pylist(found, schema=pa.schema(ingest.schema()))
    deltalake.write_deltalake(lake.uri("vision/digits/raw"), table, mode="append")


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    lake = Lake(str(tmp_path / "lake"))
    append(lake, 20)
    return lake


def test_record_and_history(lake: Lake) -> None:
    first = admission.admit(lake, RECIPE, Run(id="a", cause="new data"), "", lambda: 1000)
    assert (first.verdict, first.candidate.raw, first.candidate.rows) == ("admitted", "vision/digits/raw@0", 20)
    assert admission.admit(lake, RECIPE, Run(id="b", cause="new data"), "", lambda: 1001).verdict == "skipped"
    append(lake, 10, 20)
    third = admission.admit(lake, RECIPE, Run(id="c", cause="new data"), "", lambda: 2000)
    assert (third.verdict, third.candidate.raw) == ("admitted", "vision/digits/raw@1")
    paths = list(lake.list("vision/digits/admissions"))
    assert paths[-1] == "vision/digits/admissions/00000003.json"
    assert [json.loads(lake.get(p))["run"] for p in paths] == ["a", "b", "c"]


@pytest.mark.parametrize("cause", ["new data", "schedule"])
def test_same_rows_with_another_recipe_or_other_code_are_other_work(lake: Lake, cause: Cause, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nothing but a person would train again after a mended bug: the run that failed was admitted with these rows."""
    moments = itertools.count(1000, 1000)

    def ask(name: str, recipe: Recipe = RECIPE) -> tuple[str, str]:
        decision = admission.admit(lake, recipe, Run(id=name, cause=cause), "", lambda: next(moments))
        return decision.verdict, decision.reason

    assert ask("first")[0] == "admitted"
    assert ask("same")[0] == "skipped"
    other = dataclasses.replace(RECIPE, training=dataclasses.replace(RECIPE.training, seed=1))
    verdict, reason = ask("recipe", other)
    assert verdict == "admitted"
    assert cause == "schedule" or reason.endswith("changed: recipe")
    assert ask("same recipe", other)[0] == "skipped"
    real = keys.code_digest
    monkeypatch.setattr(
        keys, "code_digest", lambda module, lock: real(module, lock)[::-1] if module.endswith("train") else real(module, lock)
    )
    verdict, reason = ask("code", other)
    assert verdict == "admitted"
    assert cause == "schedule" or reason.endswith("changed: code")


def test_a_decision_from_before_the_digests_is_read(lake: Lake) -> None:
    admission.admit(lake, RECIPE, Run(id="a", cause="new data"), "", lambda: 1000)
    (path,) = lake.list("vision/digits/admissions")
    body = json.loads(lake.get(path))
    body["candidate"] = {k: v for k, v in body["candidate"].items() if k not in ("recipe", "code")}
    lake.replace(path, json.dumps(body).encode())
    assert admission.admit(lake, RECIPE, Run(id="b", cause="new data"), "", lambda: 2000).verdict == "admitted"


def test_a_run_that_died_after_its_admission_keeps_it(lake: Lake) -> None:
    run = Run(id="a", cause="new data")
    first = admission.admit(lake, RECIPE, run, "", lambda: 1000)
    append(lake, 10, 20)
    admission.admit(lake, RECIPE, Run(id="b", cause="new data"), "", lambda: 2000)
    assert admission.admit(lake, RECIPE, dataclasses.replace(run, again=True), "", lambda: 3000) == first
    # Must-fail twin: without `again` the retry's rows would be taken for rows that another run has.
    assert admission.admit(lake, RECIPE, run, first.candidate.raw, lambda: 3000).verdict == "skipped"


def test_of_many_at_once_one_is_admitted(lake: Lake) -> None:
    found: list[Decision] = []
    threads = [
        threading.Thread(
            target=lambda n=n: found.append(admission.admit(lake, RECIPE, Run(id=f"run-{n}", cause="new data"), "", lambda: 1000))
        )
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(d.verdict for d in found) == ["admitted"] + ["skipped"] * 7
    assert sorted(d.number for d in found) == list(range(1, 9))


@pytest.mark.parametrize(
    "raw", ["vision/digits/raw", "vision/digits/raw@99", "maintenance/ai4i/raw@0", "vision/digits/../digits/raw@0", "latest"]
)
def test_bad_version(lake: Lake, raw: str) -> None:
    with pytest.raises(BadInput):
        admission.admit(lake, RECIPE, Run(id="a", cause="hand"), raw, lambda: 0)


def test_no_table_yet(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="ingest"):
        admission.admit(Lake(str(tmp_path / "empty")), RECIPE, Run(id="a", cause="hand"), "", lambda: 0)
