"""score: what is answered and what isn't, the proof before, and that each row comes once whatever happens."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from unit.score_chain import CHUNK, IMAGES, ROWS, Chain, model, png, record, row

from forja import evaluation, predictions, receipts, scoring
from forja.errors import BadInput, Conflict, Damaged, ForjaError, Refused, Unavailable
from forja.recipes.base import Recipe, Table
from forja.stages import latest, score

pytestmark = pytest.mark.ml

HERE = Path(__file__).parent


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def by_key(chain: Chain) -> dict[str, dict[str, Any]]:
    found = chain.rows()
    assert len({r["key"] for r in found}) == len(found)
    return {r["key"]: r for r in found}


def test_images_labelled_or_not_and_those_that_cannot_be_answered(tmp_path: Path) -> None:
    chain = Chain(tmp_path, IMAGES)
    chain.add([
        record("unlabelled", png(100)),
        record("label no text", png(101), b"\xff"),
        record("label unknown", png(102), "eleven"),
        record("broken", png(103)[:60], "1"),
        record("broken, unlabelled", png(103)[:60]),
        record("no image", b"hello", "1"),
        record("empty, unlabelled", b""),
        record("old", png(104), at=5), record("old", png(105), at=9), record("old", png(106), at=7),
        record("broken since", png(107), "1"), record("broken since", b"hello", "1"),
        record("labelled before", png(108), "1"), record("labelled before", png(109)),
    ])  # fmt: skip
    receipt, written = chain.score(chain.gate())
    assert written
    found = by_key(chain)
    errors = {k: r["error"] for k, r in found.items() if r["error"]}
    assert errors == {
        "broken": "image doesn't decode", "broken, unlabelled": "image doesn't decode", "no image": "neither PNG nor JPEG",
        "empty, unlabelled": "no value", "broken since": "neither PNG nor JPEG",
    }  # fmt: skip
    payloads = dict(chain.good) | {
        "unlabelled": png(100), "label no text": png(101), "label unknown": png(102), "old": png(105), "labelled before": png(109),
    }  # fmt: skip
    expected = chain.answers(chain.onnx, list(payloads.values()))
    for key, own in zip(payloads, expected, strict=True):
        assert found[key]["probabilities"] == pytest.approx(own.tolist(), abs=1e-6)
        assert found[key]["answer"] == IMAGES.dataset.classes[own.argmax()]
        assert found[key]["probability"] == max(found[key]["probabilities"])
    assert set(found) == set(payloads) | set(errors)
    assert all(found[k][c] is None for k in errors for c in ("answer", "probability", "probabilities"))
    labels = {"k000": IMAGES.dataset.classes[chain.right[0]], "unlabelled": None, "label no text": None, "label unknown": "eleven"}
    labels |= {"broken": "1", "labelled before": None}
    assert {k: found[k]["label"] for k in labels} == labels
    assert receipt.metrics == {
        "events": 54, "superseded": 4, "rows": 50, "scored": 45, "failed": 5, "labelled": 40, "labelled_accuracy": 1.0,
        "golden_difference": pytest.approx(0, abs=1e-6),
    }  # fmt: skip
    assert receipt.facts["errors"] == {"image doesn't decode": 2, "neither PNG nor JPEG": 2, "no value": 1}
    assert receipt.facts["golden"] == {"samples": 16, "prepared": 16}
    assert any("no evaluation" in line for line in receipt.report)


def test_a_row_says_where_it_comes_from(chain: Chain) -> None:
    receipt, _ = chain.score(chain.gate(version="7"), chain.raw(1))
    one = by_key(chain)["k003"]
    optimize = receipts.load(chain.lake, receipts.load(chain.lake, receipt.inputs["gate"][0].ref).inputs["optimize"][0].ref)
    assert (one["topic_id"], one["partition"], one["offset"], one["sha256"]) == ("t", 0, 3, score.predictions.sha256(row(3)))
    assert (one["model_version"], one["variant"], one["raw_version"], one["run"]) == ("7", "fp32", 1, receipt.key)
    assert one["model_sha256"] == optimize.outputs["model.onnx"].sha256
    assert receipt.started <= one["scored_at"].isoformat(timespec="milliseconds") <= receipt.finished
    assert receipt.facts["predictions"] == "maintenance/ai4i/predictions@1"


def test_events_without_a_key_stay_apart(chain: Chain) -> None:
    chain.add([record("", row(1), "1"), record("", row(2), "0")])
    receipt, _ = chain.score(chain.gate())
    assert [(r["offset"], r["error"]) for r in chain.rows() if r["key"] == ""] == [(40, "no key"), (41, "no key")]
    assert receipt.metrics["failed"] == 2


def test_tables(chain: Chain) -> None:
    bad = {
        "out of range": (b'{"kind": "a", "x": 11, "y": 0}', "x: not from -10 to 10"),
        "another kind": (b'{"kind": "c", "x": 1, "y": 0}', "kind: not one of a, b"),
        "a column less": (b'{"kind": "a", "x": 1}', "y: missing or of another type"),
        "no JSON": (b"hello", "no JSON"),
        "a list": (b"[1]", "JSON, but no object"),
        "nothing": (b"", "no value"),
    }
    chain.add([record(name, payload, label) for name, (payload, _) in bad.items() for label in (None,)])
    chain.add([record(f"{name}, labelled", payload, "1") for name, (payload, _) in bad.items()])
    receipt, _ = chain.score(chain.gate())
    found = by_key(chain)
    assert {k: r["error"] for k, r in found.items() if r["error"]} == {
        f"{name}{more}": problem for name, (_, problem) in bad.items() for more in ("", ", labelled")
    }
    expected = chain.answers(chain.onnx, [p for _, p in chain.good])
    assert np.abs(np.array([found[k]["probabilities"] for k, _ in chain.good]) - expected).max() < 1e-6
    assert (receipt.metrics["labelled_accuracy"], receipt.metrics["labelled_average_precision"]) == (1, 1)


def test_equal_inputs_are_adopted_and_other_ones_add_rows(chain: Chain) -> None:
    gate = chain.gate()
    first, _ = chain.score(gate)
    assert chain.score(gate) == (first, False)
    assert len(chain.rows()) == 40
    chain.add([record("new", row(200))])
    second, written = chain.score(gate)
    assert written
    other = chain.gate(onnx=model(ROWS.dataset.shape, 2, seed=1), version="2")
    third, _ = chain.score(other)
    runs = [(r["run"], r["model_version"], r["raw_version"]) for r in chain.rows()]
    counted = {one: runs.count(one) for one in set(runs)}
    assert counted == {(first.key, "1", 1): 40, (second.key, "1", 2): 41, (third.key, "2", 2): 41}
    assert third.metrics["labelled_accuracy"] < 1
    assert chain.chunks() == []


def test_a_version_without_rows(chain: Chain) -> None:
    receipt, written = chain.score(chain.gate(), chain.raw(0))
    assert written
    assert chain.rows() == []
    assert (receipt.metrics["rows"], receipt.metrics["labelled"]) == (0, 0)
    assert "labelled_accuracy" not in receipt.metrics


def test_the_newest_inputs_are_found(chain: Chain) -> None:
    gate = chain.gate()
    assert latest.inputs(chain.lake, ROWS, "score", {}) == {"raw": [chain.raw(1)], "gate": [gate]}
    assert latest.inputs(chain.lake, ROWS, "score", {"raw": [chain.raw(0)]}) == {"gate": [gate]}


def shifted(chain: Chain, by: float) -> dict[str, Any]:
    answers = chain.answers(chain.onnx, [p for _, p in chain.good[:16]])
    answers[5, 1] += by
    return {"probabilities": answers}


def swapped(recipe: Recipe) -> Recipe:
    """The same recipe with two columns in another order."""
    dataset = recipe.dataset
    assert isinstance(dataset, Table)
    return dataclasses.replace(recipe, dataset=dataclasses.replace(dataset, columns=(dataset.columns[0], *dataset.columns[:0:-1])))


def reordered(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, dataset=dataclasses.replace(recipe.dataset, classes=recipe.dataset.classes[::-1]))


def smaller(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, dataset=dataclasses.replace(recipe.dataset, classes=recipe.dataset.classes[:-1]))


Case = tuple[Recipe, Callable[[Chain], Any], type[ForjaError], str]
REFUSED: dict[str, Case] = {
    "a golden answer differs": (ROWS, lambda c: c.score(c.gate(**shifted(c, 2e-3))), Refused, "k005 differs"),
    "a golden answer is NaN": (ROWS, lambda c: c.score(c.gate(**shifted(c, float("nan")))), Refused, "differs"),
    "a golden input differs": (
        ROWS, lambda c: c.score(c.gate(inputs=np.zeros((16, *ROWS.dataset.shape), np.float32))), Refused, "another input or label",
    ),
    "a golden image differs": (
        IMAGES, lambda c: c.score(c.gate(inputs=np.zeros((16, *IMAGES.dataset.shape), np.float32))), Refused, "another input or label",
    ),
    "a golden label differs": (ROWS, lambda c: c.score(c.gate(labels=1 - c.right[:16])), Refused, "another input or label"),
    "classes in another order": (ROWS, lambda c: c.score(c.gate(), recipe=reordered(ROWS)), Refused, "another input or label"),
    "a class less": (IMAGES, lambda c: c.score(c.gate(), recipe=smaller(IMAGES)), Refused, "isn't what the gate judged"),
    "columns in another order": (ROWS, lambda c: c.score(c.gate(), recipe=swapped(ROWS)), Refused, "another input or label"),
    "the gate chose nothing": (ROWS, lambda c: c.score(c.gate(chosen=None)), Refused, "gate chose no variant"),
    "the gate chose what it wasn't given": (ROWS, lambda c: c.score(c.gate(chosen="int8")), Damaged, "no variant"),
    "no such version": (ROWS, lambda c: c.score(c.gate(), c.raw(9)), BadInput, "version of table maintenance/ai4i/raw: got 9"),
    "another recipe's events": (ROWS, lambda c: c.score(c.gate(), "vision/digits/raw@1"), BadInput, "maintenance/ai4i/raw@VERSION"),
    "no version": (ROWS, lambda c: c.score(c.gate(), "maintenance/ai4i/raw"), BadInput, "PATH@VERSION"),
    "an optimize receipt as gate": (
        ROWS, lambda c: c.score(receipts.load(c.lake, c.gate()).inputs["optimize"][0].ref), BadInput, "allowed: a gate receipt of ai4i",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_is_written_when(name: str, tmp_path: Path) -> None:
    recipe, act, kind, message = REFUSED[name]
    chain = Chain(tmp_path, recipe)
    with pytest.raises(kind, match=message):
        act(chain)
    assert chain.rows() == []
    assert chain.chunks() == []


def test_a_gate_of_another_recipe(tmp_path: Path) -> None:
    chain, other = Chain(tmp_path, ROWS), Chain(tmp_path, IMAGES)
    with pytest.raises(BadInput, match=r"gate receipt of vision/digits.*allowed: a gate receipt of ai4i"):
        chain.score(other.gate())


def test_an_answer_that_is_not_finite_is_none() -> None:
    onnx = model((4,), 2, gain=1e38)
    session = onnxruntime.InferenceSession(onnx, evaluation.options(), providers=["CPUExecutionProvider"])
    one: Any = scoring.Model(session=session, version="1", variant="fp32", sha256="", optimize=None)  # type: ignore[arg-type]
    rows = [row(1), b'{"kind": "a", "x": 0, "y": 0}']
    found, problems = scoring.answers(one, ROWS.dataset, rows, lambda: None)
    assert not np.isfinite(found[0]).all()
    assert problems == ["the model's answer isn't finite", None]


def child(folder: Path, case: str, gate: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "score_chain.py"), str(folder), case, gate]
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1] / "include")}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many events each call of ``answers`` gets from here on."""
    calls: list[int] = []
    real = scoring.answers

    def answers(one: Any, dataset: Any, payloads: Any, check: Any) -> Any:
        calls.append(len(payloads))
        return real(one, dataset, payloads, check)

    monkeypatch.setattr(score, "ROWS", CHUNK)
    monkeypatch.setattr(scoring, "answers", answers)
    return calls


KILLS = {
    "killed while it scores": ("slowly", signal.SIGKILL), "ended while it scores": ("slowly", signal.SIGTERM),
    "killed before the commit": ("before the commit", None), "killed after the commit": ("after the commit", None),
}  # fmt: skip


@pytest.mark.parametrize("name", KILLS)
def test_a_run_that_goes_on_does_nothing_twice(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, number = KILLS[name]
    chain = Chain(tmp_path, good=150)
    gate = chain.gate()
    process = child(tmp_path, case, gate)
    try:
        until = time.monotonic() + 60
        while number and len(chain.chunks()) < 2:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.01)
        if number:
            process.send_signal(number)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL), output
    before = len(chain.chunks())
    assert (2 <= before < 10) if number else before == 10
    calls = counted(monkeypatch)
    receipt, written = chain.score(gate)
    assert written
    assert len(calls) == 10 - before
    assert sorted(r["key"] for r in chain.rows()) == [k for k, _ in chain.good]
    assert (receipt.metrics["rows"], receipt.metrics["labelled_accuracy"]) == (150, 1.0)
    assert chain.chunks() == []


def test_two_runs_at_once(tmp_path: Path) -> None:
    chain = Chain(tmp_path, good=60)
    gate = chain.gate()
    both = [child(tmp_path, "slowly", gate) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert sorted(text.splitlines()[-1] for text in outputs) == ["adopted", "written"], outputs
    assert sum("doing this very work" in text for text in outputs) <= 1
    assert sorted(r["key"] for r in chain.rows()) == [k for k, _ in chain.good]


def test_a_damaged_chunk_is_scored_again(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, gate = counted(monkeypatch), chain.gate()
    with monkeypatch.context() as patch:
        patch.setattr(predictions, "append", lambda *_: (_ for _ in ()).throw(Conflict("for the test")))
        with pytest.raises(Conflict):
            chain.score(gate)
    damaged = chain.chunks()[1]
    chain.lake.replace(damaged, chain.lake.get(chain.chunks()[0]))
    assert len(calls) == 3
    chain.score(gate)
    assert len(calls) == 4
    assert sorted(r["key"] for r in chain.rows()) == [k for k, _ in chain.good]


def test_a_run_whose_receipt_was_lost_finds_its_rows(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = chain.gate()
    first, _ = chain.score(gate)
    chain.lake.delete(first.path)
    calls = counted(monkeypatch)
    again, written = chain.score(gate)
    assert written
    assert calls == []
    assert len(chain.rows()) == 40
    assert (again.metrics, again.facts) == (first.metrics, first.facts)


def test_an_error_ends_the_chunks_beside_it(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, both, ended = iter(range(9)), threading.Event(), []

    def answers(one: Any, dataset: Any, payloads: Any, check: Callable[[], None]) -> Any:
        if next(numbers) == 0:
            both.wait(10)
            raise Unavailable("for the test")
        both.set()
        until = time.monotonic() + 10
        try:
            while time.monotonic() < until:
                check()
                time.sleep(0.01)
        except CancelledError:
            ended.append(1)
            raise

    gate = chain.gate()
    counted(monkeypatch)
    monkeypatch.setattr(scoring, "answers", answers)
    with pytest.raises(Unavailable, match="for the test"):
        chain.score(gate)
    assert ended == [1]
    assert chain.chunks() == []


def test_chunks_depend_on_all_that_their_rows_take_from_the_raw_table(chain: Chain) -> None:
    _, events = score.newest(scoring.raw_files(chain.lake, chain.raw()))
    others = [events.with_columns(**{column: events[column].shift(1)}) for column in ("offset", "key", "sha256", "label")]
    cases = [(events, 1), (events, 1), (events, 2), (events[1:], 1), *((frame, 1) for frame in others)]
    names = [[chunk.name for chunk in score.chunks(frame, raw)] for frame, raw in cases]
    assert names[0] == names[1]
    assert len({tuple(n) for n in names}) == len(names) - 1
