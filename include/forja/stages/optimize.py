"""optimize: one precision variant of the registered model, its engine, and how it answers and how fast, as served.

What it does: makes the variant's ONNX file (int8 is calibrated on training samples), starts Triton with it and sends the validation
split the way that clients do, and builds an engine from the very same file.

When it fails: a Refused names the node that TensorRT would not take, or what Triton says; a BadInput about the parser lists the
parser's own errors. Both are about the model or the recipe, so trying again doesn't help.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forja import gates
from forja.errors import Refused
from forja.lake import canonical
from forja.recipes.base import QUALITY, SPEED, Gate, Images, Optimize, Recipe, Table
from forja.stages.base import Inputs, Outcome, Plan, Stage, Work, one_variant

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from forja.engines import Engine
    from forja.loading import Arrays

STAGE = Stage(environment="ml", repeat="memoised", inputs=("dataset", "model"), variants=True, hardware=True)


ROUNDED = 128
"""Calibration samples whose answers are compared when every tensor is rounded to float16."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What optimize reads of the recipe."""

    dataset: Images | Table
    metric: str
    optimize: Optimize
    gates: tuple[Gate, ...]
    """Those that the search for mixed precision has to satisfy; none for other variants."""
    golden_samples: int


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What was made of the model."""

    model: bytes
    """What engines are built from."""
    served: bytes
    """What ONNX Runtime answers with on a CPU: the same, but for bfloat16, which it can only imitate."""
    facts: dict[str, Any]


def plan(recipe: Recipe, inputs: Inputs, variant: str = "") -> Plan[Parts]:
    """Plan of one variant; BadInput for one that the recipe doesn't make."""
    variant = one_variant(variant, recipe.optimize.variants)
    parts = Parts(
        dataset=recipe.dataset, metric=recipe.metric, optimize=recipe.optimize, gates=recipe.gates if variant == "mixed" else (),
        golden_samples=recipe.rollout.golden_samples,
    )  # fmt: skip
    return Plan(stage="optimize", recipe=recipe.name, team=recipe.team, parts=parts, inputs=inputs, variant=variant)


def run(plan: Plan[Parts], work: Work) -> Outcome:
    """Make the variant, serve it, measure it on the validation split, build its engine."""
    import numpy
    import onnx
    import onnxruntime

    from forja import evaluation
    from forja.serving import served

    parts = plan.parts
    dataset = work.receipt(plan.input("dataset"))
    source = work.load(work.receipt(plan.input("model")), "model.onnx")
    validation = served.samples(work, dataset, parts.dataset, "validation")
    variant = _variant(plan, work, source, validation)
    work.say(f"{plan.variant}: {len(variant.model):,} bytes of ONNX")
    answers, speed = served.ask(work, variant.served, release(plan), validation.inputs)
    numbers = evaluation.quality(answers, validation.labels, parts.metric)
    work.say(f"{plan.variant}: {len(validation.keys)} validation samples as served " + " ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
    engine = _engine(plan, work, variant.model)
    outputs = {
        "model.onnx": work.save("model.onnx", variant.model),
        "engine.plan": work.save("engine.plan", engine.plan),
        "engine.json": work.save("engine.json", json.dumps(engine.document, indent=1, sort_keys=True).encode()),
        "golden.npz": work.save("golden.npz", _golden(parts.golden_samples, validation, answers)),
        # What the gate reads, as outputs: the gate's key follows its inputs' outputs, so a number that changed must show.
        "answers.npz": work.save("answers.npz", npz(probabilities=answers, labels=validation.labels)),
        "measured.json": work.save("measured.json", canonical(_measured(plan, engine, speed, variant))),
    }
    if variant.served != variant.model:
        outputs["emulated.onnx"] = work.save("emulated.onnx", variant.served)
    sizes = {"onnx_bytes": float(len(variant.model)), "engine_bytes": float(len(engine.plan)), "build_s": round(engine.build_s, 3)}
    facts = {
        "variant": plan.variant, "validation_samples": len(validation.keys), "engine": engine.facts, **variant.facts,
        "served": {"protocol": served.PROTOCOL, **speed},
    }  # fmt: skip
    versions = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "numpy": numpy.__version__}
    versions[engine.facts["backend"]] = engine.facts["version"]
    report = _report(plan.variant, numbers, engine, variant)
    return Outcome(outputs=outputs, metrics={**numbers, **sizes}, facts=facts, report=report, versions=versions)


def release(plan: Plan[Any], variant: str = "") -> Any:
    """The release that a variant is tried as: what the real one will be, under a version of its own."""
    from forja.serving import repository

    dataset = plan.parts.dataset
    return repository.Release(
        model=plan.recipe, version="1", variant=variant or plan.variant, classes=dataset.classes, shape=dataset.shape,
        max_batch=plan.parts.optimize.max_batch, preprocess=repository.preprocess(dataset), receipts={},
    )  # fmt: skip


def _variant(plan: Plan[Parts], work: Work, source: bytes, validation: Arrays) -> Variant:
    """The ONNX file of this variant; fp32 is the registered model itself."""
    import numpy

    from forja import evaluation
    from forja.precision import calibration, floats, int8, mixed

    if plan.variant == "fp32":
        return Variant(model=source, served=source, facts={})
    if plan.variant == "bf16":
        note = "ONNX Runtime has no bfloat16 arithmetic on a CPU: answered in float32 with every tensor rounded to bfloat16"
        return Variant(model=floats.bf16(source), served=floats.emulated(source, "bf16"), facts={"emulated": note})
    samples, settings = _calibration(plan, work), plan.parts.optimize
    if plan.variant == "fp16":
        half = floats.fp16(source, calibration.peaks(int8.prepared(source), samples, work.scratch))
        # On a CPU nothing overflows in float16, since sums and products are float32 there.
        some = samples[:ROUNDED]
        rounded = evaluation.answers(floats.emulated(source, "fp16", half.kept), some)
        if not numpy.isfinite(rounded).all():
            raise Refused("fp16: answers aren't finite when every tensor is rounded to float16", do="leave fp16 out of optimize.variants")
        agreement = round(evaluation.agreement(rounded, evaluation.answers(source, some)), 6)
        kept = {"float32_layers": list(half.kept), "rounded_agreement": agreement}
        return Variant(model=half.model, served=half.model, facts=kept)
    how: dict[str, Any] = {"method": settings.calibration, "percentile": settings.percentile}
    facts: dict[str, Any] = {"calibration": {**how, "samples": len(samples), "split": "train"}}
    if plan.variant == "int8":
        model = int8.int8(source, samples, work.scratch, **how)
        return Variant(model=model, served=model, facts=facts)
    judge = _Judge(plan.parts, source, validation)
    found = mixed.search(source, samples, work.scratch, **how, tries=settings.search_tries, judge=judge)
    for number, one in enumerate(found.tries):
        passed = "passes the recipe's rules" if one.accepted else "doesn't pass them"
        work.say(f"mixed: try {number + 1}, {len(one.kept)} layers in float16, {plan.parts.metric} {one.score:.4f}, {passed}")
    return Variant(model=found.best.model, served=found.best.model, facts=facts | {"mixed": mixed.facts(found)})


class _Judge:
    """Whether a graph passes those of the recipe's rules that are about answers, and its metric, on the validation split."""

    def __init__(self, parts: Parts, source: bytes, validation: Arrays) -> None:
        from forja import evaluation

        self.parts, self.validation = parts, validation
        self.reference = evaluation.answers(source, validation.inputs)

    def __call__(self, model: bytes) -> tuple[bool, float]:
        from forja import evaluation
        from forja.stages.gate import measured

        answers = evaluation.answers(model, self.validation.inputs)
        found = measured(self.reference, answers, self.validation.labels, self.parts.metric)
        rules = [gate for gate in self.parts.gates if gate.metric in QUALITY]
        passed = all(gates.judge(gate, "mixed", found).passed for gate in rules)
        return passed, found.metrics.get(self.parts.metric, float("nan"))


def _calibration(plan: Plan[Parts], work: Work) -> NDArray[np.float32]:
    """Training samples, balanced over the classes."""
    from forja import loading
    from forja.precision import calibration

    train = loading.arrays(work, work.receipt(plan.input("dataset")), plan.parts.dataset, "train")
    chosen = calibration.balanced(train.labels.tolist(), train.keys, plan.parts.optimize.calibration_samples)
    work.say(f"{plan.variant}: {len(chosen)} of {len(train.keys)} training samples for calibration")
    return train.inputs[chosen]


def _engine(plan: Plan[Parts], work: Work, model: bytes) -> Engine:
    """Build it, with the timing cache that earlier builds on this GPU left in the lake."""
    from forja import engines

    settings, key = plan.parts.optimize, engines.timing_key(plan.team, engines.here())
    cache = work.lake.get(key) if key and work.lake.size(key) is not None else b""
    engine = engines.make(
        model, plan.parts.dataset.shape, batches=(1, settings.max_batch, settings.max_batch), capability=settings.compute_capability,
        precision=plan.variant, cache=cache,
    )  # fmt: skip
    if key and engine.cache is not None and engine.cache != cache:
        work.lake.replace(key, engine.cache)
    work.say(f"{plan.variant}: {engine.facts['backend']} engine, {len(engine.plan):,} bytes in {engine.build_s:.2f} s")
    return engine


def _measured(plan: Plan[Parts], engine: Engine, speed: dict[str, float], variant: Variant) -> dict[str, Any]:
    """Speed on the recipe's target, and the engine's precision."""
    found: dict[str, float | None] = dict.fromkeys(SPEED)
    if plan.parts.optimize.target == "gpu":
        found |= {name: value for name, value in engine.facts["speed"].items() if name in SPEED}
        found["memory_mb"] = None if found["memory_mb"] is None else 2 * found["memory_mb"]  # the live one and its successor
    elif "emulated" not in variant.facts:
        found |= {name: value for name, value in speed.items() if name in SPEED}
    found["engine_mb"] = round(len(engine.plan) / 1e6, 3)
    precision = engine.facts["precision"]
    # What the builder says of a plan that no GPU has loaded can refute, not prove.
    proven = precision["value"] == "proven" and engine.facts["deserialised"] == "yes"
    outcome: gates.Outcome = "fail" if precision["value"] == "wrong" else "pass" if proven else "not measured"
    return {"speed": found, "precision": outcome, "precision_reason": precision["reason"]}


def _golden(count: int, validation: Arrays, answers: NDArray[np.float32]) -> bytes:
    first = sorted(range(len(validation.keys)), key=lambda i: validation.keys[i])[:count]
    return npz(inputs=validation.inputs[first], probabilities=answers[first], labels=validation.labels[first])


def npz(**arrays: Any) -> bytes:
    """Content of an .npz file."""
    import numpy

    buffer = io.BytesIO()
    numpy.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _report(name: str, metrics: dict[str, float], engine: Engine, variant: Variant) -> list[str]:
    numbers = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()) if not metrics["nonfinite"] else "answers that aren't finite"
    facts = engine.facts
    size = f"{len(engine.plan) / 1e6:.2f} MB in {engine.build_s:.2f} s"
    built = f"{facts['backend']} {facts['version']} for {facts['compute_capability']}, {size}, deserialised: {facts['deserialised']}"
    lines = [f"{name:5} {numbers}", f"      engine: {built}"]
    if kept := variant.facts.get("float32_layers"):
        lines.append(f"      float32, since float16 could overflow: {', '.join(kept)}")
    if "mixed" in variant.facts:
        lines.append(f"      float16: {', '.join(variant.facts['mixed']['float16']) or 'no layer had to'}")
    return [*lines, f"      {variant.facts['emulated']}"] if "emulated" in variant.facts else lines
