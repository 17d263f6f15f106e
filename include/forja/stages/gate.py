"""gate: judges the variants by the recipe's rules over their measured numbers, and chooses one or refuses all.

What it does: applies every rule of ``recipe.gates`` to every variant's answers to the validation split, as served, and to what the
recipe's target measured. A missing number fails. When fp32 fails, nothing goes live. The chosen variant is then served once more for
the test split, whose number is reported and decides nothing. All of it goes into one page, report.html, here and in MLflow.

When it fails: it is meant to. Its table names the rule, the value and the limit; what is live stays live.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forja import gates
from forja.errors import BadInput, Unavailable
from forja.gates import Decision, Measured
from forja.lake import canonical
from forja.paired import Drop
from forja.receipts import Output, Receipt
from forja.recipes.base import VARIANTS, Gate, Images, Optimize, Recipe, Table
from forja.stages.base import Inputs, Outcome, Plan, Stage, Work

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STAGE = Stage(environment="ml", repeat="memoised", inputs=("optimize",), many=("optimize",))


NOTHING = Drop(value=0.0, low=0.0, high=0.0)
"""What fp32 loses against itself."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What gate reads of the recipe."""

    gates: tuple[Gate, ...]
    optimize: Optimize
    untimed: str
    dataset: Images | Table
    metric: str


@dataclass(frozen=True, kw_only=True)
class Known:
    """One variant: its receipt, its answers and what follows from them."""

    receipt: Receipt
    answers: NDArray[np.float32]
    labels: NDArray[np.int64]
    measured: Measured


def plan(recipe: Recipe, inputs: Inputs, variant: str = "") -> Plan[Parts]:
    """Plan of the gate over the receipts of all variants, whatever the order in which they are given."""
    parts = Parts(
        gates=recipe.gates, optimize=recipe.optimize, untimed=recipe.rollout.untimed, dataset=recipe.dataset, metric=recipe.metric
    )
    ordered = {"optimize": sorted(inputs["optimize"], key=lambda i: (i.digest, i.ref))}
    return Plan(stage="gate", recipe=recipe.name, team=recipe.team, parts=parts, inputs=ordered)


def run(plan: Plan[Parts], work: Work) -> Outcome:
    """Judge; the outcome is refused when nothing may go live."""
    found = by_variant([work.receipt(item) for item in plan.inputs["optimize"]])
    known = _known(plan, work, found)
    decision = gates.decide(plan.parts.gates, plan.parts.optimize.variants, {v: k.measured for v, k in known.items()}, plan.parts.untimed)
    lines = gates.table(decision)
    if not decision.chosen:  # the report of a refused receipt is not printed at the end
        for line in lines:
            work.say(line)
    test = _test(plan, work, found[decision.chosen]) if decision.chosen else {}
    facts: dict[str, Any] = {
        "chosen": decision.chosen or None,
        "verdicts": [{**dataclasses.asdict(v), "passed": v.passed} for v in decision.verdicts],
        "reason": decision.reason,
        "variants": {v: {**k.measured.metrics, **k.measured.speed} for v, k in known.items()},
        "target": plan.parts.optimize.target,
    }
    models = {variant: receipt.output("model.onnx").sha256 for variant, receipt in found.items()}
    outputs = {
        "verdict.json": work.save("verdict.json", canonical({**facts, "models": models})),
        "report.html": work.save("report.html", _report(plan, work, decision, known, facts["variants"], test)),
    }
    facts["mlflow_run"] = _tell(plan, work, known, outputs["report.html"], facts)
    if decision.chosen:
        lines.append("test split, reported once: " + "  ".join(f"{k.removeprefix('test_')} {v:.4f}" for k, v in test.items()))
    return Outcome(
        outputs=outputs, metrics=test, facts=facts, report=lines, refused="" if decision.chosen else decision.reason
    )  # fmt: skip


def _known(plan: Plan[Parts], work: Work, found: dict[str, Receipt]) -> dict[str, Known]:
    """What is known of each variant, from the files whose digests are in this stage's key."""
    import numpy

    arrays = {}
    for variant, receipt in sorted(found.items(), key=lambda item: VARIANTS.index(item[0])):
        with numpy.load(io.BytesIO(work.load(receipt, "answers.npz")), allow_pickle=False) as saved:
            arrays[variant] = (saved["probabilities"], saved["labels"])
    reference = arrays.get(gates.BASELINE)
    known = {}
    for variant, (answers, labels) in arrays.items():
        if reference is not None and not numpy.array_equal(reference[1], labels):
            raise BadInput("inputs of gate: answers to different samples", value=variant, allowed="one dataset for all variants")
        own = measured(reference[0] if reference is not None else None, answers, labels, plan.parts.metric)
        if variant == gates.BASELINE:
            own = dataclasses.replace(own, drops=dict.fromkeys(own.drops, NOTHING))
        body = json.loads(work.load(found[variant], "measured.json"))
        own = dataclasses.replace(own, speed=body["speed"], precision=body["precision"], precision_reason=body["precision_reason"])
        known[variant] = Known(receipt=found[variant], answers=answers, labels=labels, measured=own)
    return known


def measured(
    reference: NDArray[np.float32] | None, answers: NDArray[np.float32], labels: NDArray[np.int64], metric: str
) -> Measured:  # fmt: skip
    """Quality of a variant's answers, and its losses against fp32's to the same samples.

    Args:
        reference: what fp32 answers, float32 [N, classes]; None when it is missing, and so are the losses.
        answers: what the variant answers, float32 [N, classes].
        labels: int64 [N].
        metric: the recipe's.
    """
    import numpy

    from forja import evaluation, paired

    metrics = evaluation.quality(answers, labels, metric)
    if reference is None or metrics["nonfinite"] or not numpy.isfinite(reference).all() or not len(labels):
        return Measured(metrics=metrics)
    metrics["agreement"] = evaluation.agreement(answers, reference)
    drops = {"accuracy": paired.accuracy(reference, answers, labels)}
    drops["class_recall"] = paired.worst_class(reference, answers, labels)
    if metric == "average_precision" and metric in metrics:
        drops[metric] = paired.average_precision(reference, answers, labels)
    return Measured(metrics=metrics, drops=drops)


def _report(
    plan: Plan[Parts], work: Work, decision: Decision, known: dict[str, Known], variants: dict[str, Any], test: dict[str, float]
) -> bytes:
    from forja.report import facts, page

    one = next(iter(known.values()))
    found = facts.gather(
        work, plan.recipe, plan.parts.dataset.classes, decision, {v: k.receipt for v, k in known.items()},
        {v: k.answers for v, k in known.items()}, one.labels, variants, test,
    )  # fmt: skip
    return page.html(found)


def _tell(plan: Plan[Parts], work: Work, known: dict[str, Known], report: Output, facts: dict[str, Any]) -> str | None:
    """Put the report and the verdict into the training's run in MLflow; its id, None when there is none or MLflow doesn't answer."""
    from forja import tracking

    model = work.receipt(next(iter(known.values())).receipt.inputs["model"][0])
    run = model.facts.get("mlflow_run")
    if run is None:
        return None
    numbers = {f"{variant}_{name}": value for variant, found in facts["variants"].items() for name, value in found.items()}
    try:
        with tracking.reachable(work.settings.mlflow):
            client = tracking.client(work.settings.mlflow)
            client.log_text(run, work.lake.get(report.path).decode(), "report.html")
            client.set_tag(run, "forja.gate", f"{facts['chosen'] or 'refused'}: {facts['reason']}")
            tracking.send(
                client, run, [{"step": 0, "time": time.time(), "metrics": {k: v for k, v in numbers.items() if v is not None}}], ()
            )
    except Unavailable as error:
        work.say(f"the report isn't in MLflow: {error}")  # it is in the lake, and nothing depends on MLflow's copy
        return None
    return str(run)


def _test(plan: Plan[Parts], work: Work, receipt: Receipt) -> dict[str, float]:
    """The chosen variant on the test split, as served."""
    from forja import evaluation
    from forja.serving import served
    from forja.stages import optimize

    dataset = work.receipt(receipt.inputs["dataset"][0])
    test = served.samples(work, dataset, plan.parts.dataset, "test")
    model = work.load(receipt, "emulated.onnx" if "emulated.onnx" in receipt.outputs else "model.onnx")
    answers, _ = served.ask(work, model, optimize.release(plan, receipt.variant), test.inputs)
    numbers = evaluation.measure(answers, test.labels, plan.parts.metric)
    work.say(f"{receipt.variant}: {len(test.keys)} test samples as served " + " ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
    return {f"test_{name}": value for name, value in numbers.items()}


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
