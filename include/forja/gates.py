"""The gate: rules over measured numbers decide which variant may go live. Missing data fails a rule.

A rule passes, fails, or was not measured. What no hardware has shown is never called passed; a recipe may say that it stops nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from forja.paired import Drop
from forja.recipes.base import SPEED, Gate

BASELINE = "fp32"
RIVALS = {"int8": "fp16", "mixed": "fp16"}
"""Variants that have to beat another to be chosen: int8 that isn't faster than float16 only costs accuracy."""
Outcome = Literal["pass", "fail", "not measured"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of one variant."""

    metrics: Mapping[str, float]
    """Numbers of its answers to the validation split, by the names of ``recipes.base.QUALITY``."""
    speed: Mapping[str, float | None] = field(default_factory=dict)
    """Numbers on the recipe's target, by the names of ``recipes.base.SPEED``; None or absent when its hardware measured nothing."""
    drops: Mapping[str, Drop] = field(default_factory=dict)
    """Losses against fp32 on the same samples, by metric; that of ``class_recall`` is the class's that loses most."""
    precision: Outcome = "not measured"
    """Whether its engine came out in the precision asked for."""
    precision_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One rule applied to one variant."""

    variant: str
    metric: str
    rule: str
    """``least``, ``most``, ``max_drop``, ``faster``, ``precision``; ``measured`` for a variant that has no receipt."""
    value: float | None
    """The metric, or its loss against fp32; None when it is missing or no number."""
    limit: float | None
    outcome: Outcome
    low: float | None = None
    """Lower end of the loss's 95 % interval."""
    high: float | None = None
    """Upper end of it."""
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the rule stops nothing."""
        return self.outcome != "fail"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Outcome of the gate."""

    chosen: str
    """The variant that may go live; empty when all are refused."""
    reason: str
    verdicts: tuple[Verdict, ...]

    @property
    def passing(self) -> tuple[str, ...]:
        """Variants that failed no rule, in the order in which they were given."""
        failed = {v.variant for v in self.verdicts if not v.passed}
        return tuple(dict.fromkeys(v.variant for v in self.verdicts if v.variant not in failed))


def decide(gates: Sequence[Gate], variants: Sequence[str], measured: Mapping[str, Measured], untimed: str) -> Decision:
    """Judge every variant and choose one.

    Beside the recipe's rules: no answer may be NaN or infinite, no engine of another precision than its name says, and int8 must be
    faster than float16 where both were timed.

    Args:
        gates: the recipe's rules.
        variants: the variants that the recipe makes; one that wasn't measured fails.
        measured: numbers of each variant.
        untimed: the variant to take when the target's hardware has timed none that passed.
    """
    rules = [Gate(metric="nonfinite", most=0), *gates]
    verdicts: list[Verdict] = []
    for variant in variants:
        if variant not in measured:
            verdicts.append(Verdict(variant=variant, metric="", rule="measured", value=None, limit=None, outcome="fail"))
            continue
        verdicts += [judge(gate, variant, measured[variant]) for gate in rules]
        verdicts.append(_precision(variant, measured[variant]))
        verdicts += _faster(variant, measured)
    decision = Decision(chosen="", reason="", verdicts=tuple(verdicts))
    chosen, reason = _choose(decision, measured, untimed)
    return Decision(chosen=chosen, reason=reason, verdicts=decision.verdicts)


def judge(gate: Gate, variant: str, measured: Measured) -> Verdict:
    """One rule of a recipe over one variant's numbers."""
    speed = gate.metric in SPEED
    value = _number((measured.speed if speed else measured.metrics).get(gate.metric))
    if gate.max_drop is not None:
        return _judge_drop(gate, variant, measured.drops.get(gate.metric))
    rule, limit = ("least", gate.least) if gate.least is not None else ("most", gate.most)
    outcome: Outcome = "fail"
    if value is None and speed:
        outcome = "not measured" if gate.unmeasured == "pass" else "fail"
    elif value is not None and limit is not None:
        outcome = "pass" if (value >= limit if rule == "least" else value <= limit) else "fail"
    note = "not measured on the recipe's target" if value is None and speed else ""
    return Verdict(variant=variant, metric=gate.metric, rule=rule, value=value, limit=limit, outcome=outcome, note=note)


def _judge_drop(gate: Gate, variant: str, drop: Drop | None) -> Verdict:
    numbers = [_number(x) for x in ((drop.value, drop.low, drop.high) if drop else (None, None, None))]
    counted = numbers[2] if gate.confident else numbers[0]
    # Rounded, so that a loss of exactly the limit passes: 0.97 - 0.96 is a little more than 0.01 in binary.
    fine = counted is not None and gate.max_drop is not None and round(counted, 9) <= gate.max_drop
    return Verdict(
        variant=variant, metric=gate.metric, rule="max_drop", value=numbers[0], limit=gate.max_drop, outcome="pass" if fine else "fail",
        low=numbers[1], high=numbers[2], note="the interval's upper end counts" if gate.confident else "",
    )  # fmt: skip


def _precision(variant: str, measured: Measured) -> Verdict:
    return Verdict(
        variant=variant, metric="engine", rule="precision", value=None, limit=None, outcome=measured.precision,
        note=measured.precision_reason,
    )  # fmt: skip


def _faster(variant: str, measured: Mapping[str, Measured]) -> list[Verdict]:
    rival = RIVALS.get(variant, "")
    if rival not in measured:
        return []
    own, other = (_number(measured[v].speed.get("p50_ms")) for v in (variant, rival))
    outcome: Outcome = "not measured" if own is None or other is None else "pass" if own < other else "fail"
    return [Verdict(variant=variant, metric="p50_ms", rule="faster", value=own, limit=other, outcome=outcome, note=f"than {rival}")]


def _choose(decision: Decision, measured: Mapping[str, Measured], untimed: str) -> tuple[str, str]:
    passing = decision.passing
    if BASELINE not in passing:
        failed = "; ".join(explain(v) for v in decision.verdicts if v.variant == BASELINE and not v.passed)
        return "", f"{BASELINE} failed, so no variant of this model goes live: {failed or 'it was not measured'}"
    timed = {v: t for v in passing if (t := _number(measured[v].speed.get("p50_ms"))) is not None and t > 0}
    if timed:
        fastest = min(timed, key=lambda v: timed[v])
        return fastest, f"{fastest} passed and is the fastest measured, {timed[fastest]:.3g} ms"
    if untimed in passing:
        return untimed, f"no hardware has measured a latency, so the recipe's rollout.untimed decides: {untimed}, which passed"
    return BASELINE, f"no hardware has measured a latency, and the recipe's rollout.untimed ({untimed}) failed: {BASELINE} stays"


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def explain(verdict: Verdict) -> str:
    """A verdict as half a sentence."""
    if verdict.rule == "measured":
        return f"{verdict.variant} was not measured"
    if verdict.rule == "precision":
        return f"engine of another precision: {verdict.note}"
    value = "missing" if verdict.value is None else f"{verdict.value:.4f}"
    relation = {"least": "at least", "most": "at most", "max_drop": "loses at most", "faster": "faster than"}[verdict.rule]
    interval = f" (95 %: {verdict.low:.4f} to {verdict.high:.4f})" if verdict.low is not None and verdict.high is not None else ""
    return f"{verdict.metric} {value}{interval}, allowed: {relation} {verdict.limit}"


def table(decision: Decision) -> list[str]:
    """Lines for people: one for each verdict, then the choice."""
    lines = [f"{'variant':8} {'metric':18} {'rule':9} {'value':>9} {'95 % interval':>19} {'limit':>8}  verdict"]
    for v in decision.verdicts:
        value = "" if v.rule in ("precision", "measured") else "missing" if v.value is None else f"{v.value:.4f}"
        interval = "" if v.low is None or v.high is None else f"{v.low:.4f} to {v.high:.4f}"
        limit = "" if v.limit is None else f"{v.limit:g}"
        verdict = {"pass": "pass", "fail": "FAIL", "not measured": "not measured"}[v.outcome]
        lines.append(f"{v.variant:8} {v.metric:18} {v.rule:9} {value:>9} {interval:>19} {limit:>8}  {verdict}")
    return [*lines, f"{'chosen: ' + decision.chosen if decision.chosen else 'refused'}: {decision.reason}"]
