"""The gate's decisions, as a table of named cases."""

from __future__ import annotations

import math
from typing import Any

import pytest

from forja import gates
from forja.errors import BadInput
from forja.gates import Measured, decide
from forja.paired import Drop
from forja.recipes.base import Gate

RULES = (Gate(metric="accuracy", least=0.95), Gate(metric="accuracy", max_drop=0.01))
VARIANTS = ("fp32", "fp16", "int8")


def one(accuracy: float | None, fp32: float | None = 0.98, **more: Any) -> Measured:
    """A variant of this accuracy, None for one that is missing, beside fp32's."""
    known = accuracy is not None and fp32 is not None
    drops = {"accuracy": Drop(value=fp32 - accuracy, low=fp32 - accuracy - 0.005, high=fp32 - accuracy + 0.005)} if known else {}
    metrics = {"nonfinite": 0.0} | ({} if accuracy is None else {"accuracy": accuracy})
    return Measured(**{"metrics": metrics, "drops": drops, "precision": "pass", **more})


def numbers(fp32: float | None = 0.98, fp16: float | None = 0.98, int8: float | None = 0.98) -> dict[str, Measured]:
    """Accuracy of each variant."""
    return {v: one(a, fp32) for v, a in {"fp32": fp32, "fp16": fp16, "int8": int8}.items()}


def timed(measured: dict[str, Measured], **p50_ms: float) -> dict[str, Measured]:
    """The same with latencies."""
    return {
        v: Measured(metrics=m.metrics, drops=m.drops, precision=m.precision, speed={"p50_ms": p50_ms.get(v)}) for v, m in measured.items()
    }


CASES = {
    "all pass and nothing is timed: the recipe decides": (numbers(), "int8", "int8", "untimed decides"),
    "the recipe's untimed variant failed: fp32 stays": (numbers(int8=0.96), "int8", "fp32", "fp32 stays"),
    "the fastest measured wins": (timed(numbers(int8=0.975), fp16=0.4, int8=0.3), "fp32", "int8", "0.3 ms"),
    "the fastest fails its rule: the next one wins": (timed(numbers(int8=0.5), fp16=0.4, int8=0.3), "fp32", "fp16", "0.4 ms"),
    "int8 that is no faster than fp16 is out": (timed(numbers(), fp32=0.6, fp16=0.5, int8=0.5), "fp32", "fp16", "0.5 ms"),
    "int8 that is slower is out, whoever asks for it": (timed(numbers(fp16=0.9), fp32=0.6, fp16=0.4, int8=0.5), "int8", "fp32", "0.6 ms"),
    "a latency that is no number doesn't count": (timed(numbers(), fp16=0.0, int8=math.nan), "fp32", "fp32", "untimed decides"),
    "fp32 below its least: all refused": (numbers(fp32=0.9, fp16=0.99, int8=0.99), "int8", "", "accuracy 0.9000"),
    "fp32 without the metric: all refused": (numbers(fp32=None), "int8", "", "accuracy missing"),
    "fp32 is NaN: all refused": (numbers(fp32=math.nan), "int8", "", "accuracy missing"),
    "int8 is NaN: it fails alone": (numbers(int8=math.nan), "int8", "fp32", "fp32 stays"),
    "int8 without the metric: it fails alone": (numbers(int8=None), "int8", "fp32", "fp32 stays"),
    "a drop of exactly the limit passes": (numbers(fp32=0.97, int8=0.96), "int8", "int8", "untimed decides"),
    "a drop just above the limit fails": (numbers(fp32=0.97, int8=0.9599), "int8", "fp32", "fp32 stays"),
    "a variant without a receipt fails": ({k: v for k, v in numbers().items() if k != "int8"}, "int8", "fp32", "fp32 stays"),
    "fp32 without a receipt: all refused": ({k: v for k, v in numbers().items() if k != "fp32"}, "int8", "", "not measured"),
    "nothing at all: refused": ({}, "fp32", "", "not measured"),
    "one answer that isn't finite": (numbers() | {"int8": one(None, metrics={"nonfinite": 1.0})}, "int8", "fp32", "fp32 stays"),
    "answers that nobody counted": (numbers() | {"int8": one(0.98, metrics={"accuracy": 0.98})}, "int8", "fp32", "fp32 stays"),
    "an engine of another precision": (numbers() | {"int8": one(0.98, precision="fail")}, "int8", "fp32", "fp32 stays"),
    "an engine that nothing could load": (numbers() | {"int8": one(0.98, precision="not measured")}, "int8", "int8", "untimed"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_decision(name: str) -> None:
    measured, untimed, chosen, reason = CASES[name]
    decision = decide(RULES, VARIANTS, measured, untimed)
    assert decision.chosen == chosen
    assert reason in decision.reason
    assert {v.variant for v in decision.verdicts} == set(VARIANTS)


def test_every_rule_is_shown_with_its_numbers() -> None:
    decision = decide(RULES, VARIANTS, numbers(int8=0.9), "int8")
    failed = [(v.variant, v.rule, v.value, v.limit) for v in decision.verdicts if not v.passed]
    assert failed == [("int8", "least", 0.9, 0.95), ("int8", "max_drop", pytest.approx(0.08), 0.01)]
    assert len(decision.verdicts) == 13  # for each: not finite, two of the recipe, precision; int8 against fp16
    lines = gates.table(decision)
    assert sum("FAIL" in line for line in lines) == 2
    assert "0.0750 to 0.0850" in "\n".join(lines)
    assert lines[-1].startswith("chosen: fp32: ")


DROP = {"class_recall": Drop(value=0.03, low=0.01, high=0.06)}
SPEED = {"p99_ms": 5.0, "memory_mb": None}
JUDGED: dict[str, tuple[Gate, str]] = {
    "a loss within its limit": (Gate(metric="class_recall", max_drop=0.03), "pass"),
    "a loss whose interval is not": (Gate(metric="class_recall", max_drop=0.05, confident=True), "fail"),
    "a loss whose interval is": (Gate(metric="class_recall", max_drop=0.06, confident=True), "pass"),
    "a loss that wasn't measured": (Gate(metric="average_precision", max_drop=0.5), "fail"),
    "a worst class that is too bad": (Gate(metric="class_recall", least=0.8), "fail"),
    "a calibration error within its limit": (Gate(metric="calibration_error", most=0.1), "pass"),
    "a calibration error beyond it": (Gate(metric="calibration_error", most=0.05), "fail"),
    "a latency within its limit": (Gate(metric="p99_ms", most=5), "pass"),
    "a latency beyond it": (Gate(metric="p99_ms", most=4.9), "fail"),
    "memory that wasn't measured": (Gate(metric="memory_mb", most=1e6), "fail"),
    "memory that needn't be": (Gate(metric="memory_mb", most=1e6, unmeasured="pass"), "not measured"),
    "throughput that nobody speaks of": (Gate(metric="throughput", least=1), "fail"),
}


@pytest.mark.parametrize("name", JUDGED)
def test_rules(name: str) -> None:
    gate, outcome = JUDGED[name]
    known = Measured(metrics={"class_recall": 0.7, "calibration_error": 0.08, "nonfinite": 0.0}, drops=DROP, speed=SPEED)
    verdict = gates.judge(gate, "int8", known)
    assert verdict.outcome == outcome
    assert verdict.passed == (outcome != "fail")
    if verdict.rule == "max_drop" and verdict.value is not None:
        assert (verdict.value, verdict.low, verdict.high) == (0.03, 0.01, 0.06)
    if outcome == "not measured" or (outcome == "fail" and verdict.value is None and gate.metric in SPEED):
        assert "not measured" in verdict.note


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "no limit": {"metric": "accuracy"},
    "two limits": {"metric": "accuracy", "least": 0.5, "most": 0.9},
    "a metric that nobody measures": {"metric": "f1", "least": 0.5},
    "a loss of agreement, which is one itself": {"metric": "agreement", "max_drop": 0.1},
    "sure of something that has no interval": {"metric": "accuracy", "least": 0.5, "confident": True},
    "answers that needn't be measured": {"metric": "accuracy", "least": 0.5, "unmeasured": "pass"},
    "a negative loss": {"metric": "accuracy", "max_drop": -0.1},
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_rules(name: str) -> None:
    with pytest.raises(BadInput, match=r"recipe field Gate\."):
        Gate(**IMPOSSIBLE[name])
