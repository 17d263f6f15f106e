"""gate: judges the variants by the recipe's rules over their measured numbers, and chooses one or refuses all.

What it does: applies every rule of ``recipe.gates`` to every variant's numbers from the validation split. A missing number
fails. When fp32 fails, nothing goes live.

When it fails: it is meant to. Its table names the rule, the value and the limit; what is live stays live.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from forja import gates
from forja.errors import BadInput
from forja.lake import canonical
from forja.receipts import Receipt
from forja.recipes.base import Gate, Recipe
from forja.stages.base import Inputs, Outcome, Plan, Stage, Work

STAGE = Stage(environment="ml", repeat="memoised", inputs=("optimize",), many=("optimize",))


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What gate reads of the recipe."""

    gates: tuple[Gate, ...]
    variants: tuple[str, ...]
    untimed: str


def plan(recipe: Recipe, inputs: Inputs, variant: str = "") -> Plan[Parts]:
    """Plan of the gate over the receipts of all variants, whatever the order in which they are given."""
    parts = Parts(gates=recipe.gates, variants=recipe.optimize.variants, untimed=recipe.rollout.untimed)
    ordered = {"optimize": sorted(inputs["optimize"], key=lambda i: (i.digest, i.ref))}
    return Plan(stage="gate", recipe=recipe.name, team=recipe.team, parts=parts, inputs=ordered)


def run(plan: Plan[Parts], work: Work) -> Outcome:
    """Judge; the outcome is refused when nothing may go live."""
    found = by_variant([work.receipt(item) for item in plan.inputs["optimize"]])
    # From the file whose digest is in this stage's key, not from the receipt's metrics, which aren't.
    measured = {}
    for variant, receipt in found.items():
        body = json.loads(work.load(receipt, "measured.json"))
        measured[variant] = gates.Measured(metrics=body["metrics"], latency_ms=body["latency_ms"])
    decision = gates.decide(plan.parts.gates, plan.parts.variants, measured, plan.parts.untimed)
    lines = gates.table(decision)
    if not decision.chosen:  # the report of a refused receipt is not printed at the end
        for line in lines:
            work.say(line)
    facts: dict[str, Any] = {
        "chosen": decision.chosen or None,
        "verdicts": [dataclasses.asdict(v) for v in decision.verdicts],
        "reason": decision.reason,
    }
    models = {variant: receipt.output("model.onnx").sha256 for variant, receipt in found.items()}
    output = work.save("verdict.json", canonical({**facts, "models": models}))
    return Outcome(outputs={"verdict.json": output}, facts=facts, report=lines, refused="" if decision.chosen else decision.reason)


def by_variant(receipts: list[Receipt]) -> dict[str, Receipt]:
    """Optimize receipts by variant; BadInput for a variant given twice or receipts of different models."""
    found: dict[str, Receipt] = {}
    for receipt in receipts:
        if receipt.stage != "optimize" or receipt.variant in found:
            raise BadInput("input optimize of gate", value=receipt.path, allowed="one optimize receipt for each variant")
        found[receipt.variant] = receipt
    models = {r.inputs["model"][0].digest for r in receipts}
    if len(models) > 1:
        refs = [r.inputs["model"][0].ref for r in receipts]
        raise BadInput("inputs of gate: variants of different models", value=refs, allowed="one model")
    return found
