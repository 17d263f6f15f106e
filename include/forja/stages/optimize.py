"""optimize: one precision variant of the registered model, its engine, and its accuracy on the validation split.

What it does: makes the variant's ONNX file (int8 is calibrated on training samples), measures it with onnxruntime on the
validation split against the labels and against fp32, and builds an engine from the very same file.

When it fails: a Refused names the node that TensorRT would not take; a BadInput about the parser lists the parser's own
errors. Both are about the model or the recipe, so trying again doesn't help.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from forja.lake import canonical
from forja.recipes.base import Images, Recipe, Table
from forja.stages.base import Inputs, Outcome, Plan, Stage, Work, one_variant

STAGE = Stage(environment="ml", repeat="memoised", inputs=("dataset", "model"), variants=True, hardware=True)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What optimize reads of the recipe."""

    dataset: Images | Table
    metric: str
    calibration_samples: int
    compute_capability: str
    max_batch: int
    golden_samples: int


def plan(recipe: Recipe, inputs: Inputs, variant: str = "") -> Plan[Parts]:
    """Plan of one variant; BadInput for one that the recipe doesn't make."""
    parts = Parts(
        dataset=recipe.dataset,
        metric=recipe.metric,
        calibration_samples=recipe.optimize.calibration_samples,
        compute_capability=recipe.optimize.compute_capability,
        max_batch=recipe.optimize.max_batch,
        golden_samples=recipe.rollout.golden_samples,
    )
    variant = one_variant(variant, recipe.optimize.variants)
    return Plan(stage="optimize", recipe=recipe.name, team=recipe.team, parts=parts, inputs=inputs, variant=variant)


def run(plan: Plan[Parts], work: Work) -> Outcome:
    """Make the variant, measure it on the validation split, build its engine."""
    import numpy
    import onnx
    import onnxruntime

    from forja import engines, evaluation, loading

    parts = plan.parts
    dataset = work.receipt(plan.input("dataset"))
    source = work.load(work.receipt(plan.input("model")), "model.onnx")
    model = _variant(plan, work, source)
    work.say(f"{plan.variant}: {len(model):,} bytes of ONNX")

    validation = loading.arrays(work, dataset, parts.dataset, "validation")
    reference = evaluation.answers(source, validation.inputs)
    answers = reference if plan.variant == "fp32" else evaluation.answers(model, validation.inputs)
    metrics = evaluation.measure(answers, validation.labels, parts.metric)
    if metrics:
        metrics["agreement"] = evaluation.agreement(answers, reference)
    work.say(f"{plan.variant}: {len(validation.keys)} validation samples " + " ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    engine = engines.make(model, parts.dataset.shape, max_batch=parts.max_batch, capability=parts.compute_capability)
    work.say(f"{plan.variant}: {engine.facts['backend']} engine, {len(engine.plan):,} bytes in {engine.build_s:.2f} s")

    first = sorted(range(len(validation.keys)), key=lambda i: validation.keys[i])[: parts.golden_samples]
    golden = {"inputs": validation.inputs[first], "probabilities": answers[first], "labels": validation.labels[first]}
    outputs = {
        "model.onnx": work.save("model.onnx", model),
        "engine.plan": work.save("engine.plan", engine.plan),
        "golden.npz": work.save("golden.npz", _npz(golden)),
        # What the gate reads, as an output: the gate's key follows its inputs' outputs, so a number that changed must show.
        "measured.json": work.save("measured.json", canonical({"metrics": metrics, "latency_ms": engine.facts["latency_ms"]})),
    }
    sizes = {"onnx_bytes": float(len(model)), "engine_bytes": float(len(engine.plan)), "build_s": round(engine.build_s, 3)}
    facts = {"variant": plan.variant, "validation_samples": len(validation.keys), "engine": engine.facts}
    versions = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "numpy": numpy.__version__}
    versions[engine.facts["backend"]] = engine.facts["version"]
    report = _report(plan.variant, metrics, engine)
    return Outcome(outputs=outputs, metrics={**metrics, **sizes}, facts=facts, report=report, versions=versions)


def _variant(plan: Plan[Parts], work: Work, source: bytes) -> bytes:
    """The ONNX file of this variant; fp32 is the registered model itself."""
    from forja import loading, quantize

    if plan.variant == "fp32":
        return source
    if plan.variant == "fp16":
        return quantize.fp16(source)
    train = loading.arrays(work, work.receipt(plan.input("dataset")), plan.parts.dataset, "train")
    chosen = quantize.balanced(train.labels.tolist(), train.keys, plan.parts.calibration_samples)
    work.say(f"int8: calibrating on {len(chosen)} of {len(train.keys)} training samples")
    return quantize.int8(source, train.inputs[chosen], work.scratch)


def _npz(arrays: dict[str, Any]) -> bytes:
    import numpy

    buffer = io.BytesIO()
    numpy.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _report(variant: str, metrics: dict[str, float], engine: Any) -> list[str]:
    numbers = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()) or "no finite answers: nothing measured"
    facts = engine.facts
    size = f"{len(engine.plan) / 1e6:.2f} MB in {engine.build_s:.2f} s"
    built = f"{facts['backend']} {facts['version']} for {facts['compute_capability']}, {size}, deserialised: {facts['deserialised']}"
    return [f"{variant:5} {numbers}", f"      engine: {built}"]
