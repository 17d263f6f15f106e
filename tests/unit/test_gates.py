"""The gate's decisions, as a table of named cases."""

from __future__ import annotations

import math

import pytest

from forja import gates
from forja.gates import Measured, decide
from forja.recipes.base import Gate

RULES = (Gate(metric="accuracy", least=0.95), Gate(metric="accuracy", max_drop=0.01))
VARIANTS = ("fp32", "fp16", "int8")


def numbers(fp32: float | None = 0.98, fp16: float | None = 0.98, int8: float | None = 0.98) -> dict[str, Measured]:
    """Accuracy of each variant; None for a metric that is missing."""
    found = {"fp32": fp32, "fp16": fp16, "int8": int8}
    return {v: Measured(metrics={} if a is None else {"accuracy": a}) for v, a in found.items()}


def timed(measured: dict[str, Measured], **latency_ms: float) -> dict[str, Measured]:
    """The same with latencies."""
    return {v: Measured(metrics=m.metrics, latency_ms=latency_ms.get(v)) for v, m in measured.items()}


CASES = {
    "all pass and nothing is timed: the recipe decides": (numbers(), "int8", "int8", "untimed decides"),
    "the recipe's untimed variant failed: fp32 stays": (numbers(int8=0.96), "int8", "fp32", "fp32 stays"),
    "the fastest measured wins": (timed(numbers(int8=0.975), fp16=0.4, int8=0.3), "fp32", "int8", "0.3 ms"),
    "the fastest fails its rule: the next one wins": (timed(numbers(int8=0.5), fp16=0.4, int8=0.3), "fp32", "fp16", "0.4 ms"),
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
    assert failed == [("int8", "least", 0.9, 0.95), ("int8", "max_drop", 0.08, 0.01)]
    assert len(decision.verdicts) == 6
    lines = gates.table(decision)
    assert sum("FAIL" in line for line in lines) == 2
    assert lines[-1].startswith("chosen: fp32: ")
