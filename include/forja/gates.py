"""The accuracy gate: rules over measured numbers decide which variant may go live. Missing data fails a rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from forja.recipes.base import Gate

BASELINE = "fp32"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of one variant."""

    metrics: Mapping[str, float]
    """Numbers of the optimize receipt, measured on the validation split."""
    latency_ms: float | None = None
    """Latency on the target's hardware; None when no hardware has measured it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One rule applied to one variant."""

    variant: str
    metric: str
    rule: str
    """``least`` or ``max_drop``; ``measured`` for a variant that has no receipt."""
    value: float | None
    """The metric, or its loss against fp32; None when it is missing or no number."""
    limit: float | None
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Outcome of the gate."""

    chosen: str
    """The variant that may go live; empty when all are refused."""
    reason: str
    verdicts: tuple[Verdict, ...]

    @property
    def passing(self) -> tuple[str, ...]:
        """Variants that passed every rule, in the order in which they were given."""
        failed = {v.variant for v in self.verdicts if not v.passed}
        return tuple(dict.fromkeys(v.variant for v in self.verdicts if v.variant not in failed))


def decide(gates: Sequence[Gate], variants: Sequence[str], measured: Mapping[str, Measured], untimed: str) -> Decision:
    """Judge every variant and choose one.

    Args:
        gates: the recipe's rules.
        variants: the variants that the recipe makes; one that wasn't measured fails.
        measured: numbers of each variant.
        untimed: the variant to take when no hardware has measured any that passed.
    """
    baseline = measured.get(BASELINE, Measured(metrics={})).metrics
    verdicts: list[Verdict] = []
    for variant in variants:
        if variant in measured:
            verdicts += [_judge(gate, variant, measured[variant].metrics, baseline) for gate in gates]
        else:
            verdicts.append(Verdict(variant=variant, metric="", rule="measured", value=None, limit=None, passed=False))
    decision = Decision(chosen="", reason="", verdicts=tuple(verdicts))
    chosen, reason = _choose(decision, measured, untimed)
    return Decision(chosen=chosen, reason=reason, verdicts=decision.verdicts)


def _judge(gate: Gate, variant: str, metrics: Mapping[str, float], baseline: Mapping[str, float]) -> Verdict:
    value = _number(metrics.get(gate.metric))
    if gate.least is not None:
        passed = value is not None and value >= gate.least
        return Verdict(variant=variant, metric=gate.metric, rule="least", value=value, limit=gate.least, passed=passed)
    reference = _number(baseline.get(gate.metric))
    # Rounded, so that a loss of exactly the limit passes: 0.97 - 0.96 is a little more than 0.01 in binary.
    drop = None if value is None or reference is None else round(reference - value, 9)
    passed = drop is not None and gate.max_drop is not None and drop <= gate.max_drop
    return Verdict(variant=variant, metric=gate.metric, rule="max_drop", value=drop, limit=gate.max_drop, passed=passed)


def _choose(decision: Decision, measured: Mapping[str, Measured], untimed: str) -> tuple[str, str]:
    passing = decision.passing
    if BASELINE not in passing:
        failed = "; ".join(explain(v) for v in decision.verdicts if v.variant == BASELINE and not v.passed)
        return "", f"{BASELINE} failed, so no variant of this model goes live: {failed or 'it was not measured'}"
    timed = {v: t for v in passing if (t := _number(measured[v].latency_ms)) is not None and t > 0}
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
    value = "missing" if verdict.value is None else f"{verdict.value:.4f}"
    relation = "at least" if verdict.rule == "least" else "loses at most"
    return f"{verdict.metric} {value}, allowed: {relation} {verdict.limit}"


def table(decision: Decision) -> list[str]:
    """Lines for people: one for each verdict, then the choice."""
    lines = [f"{'variant':8} {'metric':18} {'rule':9} {'value':>9} {'limit':>8}  verdict"]
    for v in decision.verdicts:
        value = "missing" if v.value is None else f"{v.value:.4f}"
        limit = "" if v.limit is None else f"{v.limit:g}"
        lines.append(f"{v.variant:8} {v.metric:18} {v.rule:9} {value:>9} {limit:>8}  {'pass' if v.passed else 'FAIL'}")
    return [*lines, f"{'chosen: ' + decision.chosen if decision.chosen else 'refused'}: {decision.reason}"]
