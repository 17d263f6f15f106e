"""The ONNX file for a target: the one that the gate judged where the target reads it, else one made again from the checkpoint.

Runs in the ml environment. Whatever file comes out is checked by onnx and asked for the golden answers of the judged one.
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forja.edge.bundle import TOLERANCE, Golden
from forja.edge.targets import Target, carried
from forja.errors import BadInput, Refused
from forja.receipts import Receipt
from forja.recipes.base import Cnn, Images, Mlp, Optimize, Table
from forja.stages.base import Work

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Made:
    """A file for a target."""

    model: bytes
    again: bool
    """Whether it was made again from the checkpoint, and isn't the file that the gate judged."""
    parity: float
    """Largest difference of a probability from the judged variant's golden answers, on ONNX Runtime."""
    rounded: float | None
    """The same with inputs rounded to float16, for a builder that may do so; None for one that may not."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The model as the stages before left it."""

    optimize: dict[str, Receipt]
    """Optimize receipts of the gate, by variant."""
    training: Receipt
    dataset: Receipt


def make(
    work: Work, target: Target, variant: str, judged: Judged, parts: tuple[Images | Table, Cnn | Mlp, Optimize], golden: Golden
) -> Made:
    """The file that goes into the bundle for a variant.

    Args:
        parts: the recipe's dataset, model and optimize.
        golden: answers of the judged variant.

    Raises:
        Refused: onnx doesn't accept the file, its answers differ from the judged ones, or the variant can't be made at this opset.
    """
    source = carried(target, variant)
    model = work.load(judged.optimize[source], "model.onnx") if source in judged.optimize else b""
    again = not model or not readable(model, target)
    if again:
        work.say(f"{target.name}: {source} is made again from the checkpoint, at opset {target.opset} and IR {target.ir}")
        model = from_checkpoint(work, target, source, judged, parts)
    checked(model, target)
    differs = parity(model, golden.inputs, golden, TOLERANCE[variant], f"{target.name}, {variant}")
    rounded = None
    if target.weak and variant != "fp32":
        # A weakly typed builder may run any layer in float16, the first one too: the golden answers must bear rounded inputs.
        rounded = parity(model, halved(golden.inputs), golden, TOLERANCE[variant], f"{target.name}, {variant}, inputs in float16")
    return Made(model=model, again=again, parity=differs, rounded=rounded)


def readable(model: bytes, target: Target) -> bool:
    """Whether the target's parser takes the file's opset and IR version."""
    import onnx

    found = onnx.load_from_string(model)
    opset: int = max(o.version for o in found.opset_import if not o.domain)
    return opset <= target.opset and bool(found.ir_version <= target.ir)


def from_checkpoint(work: Work, target: Target, variant: str, judged: Judged, parts: tuple[Images | Table, Cnn | Mlp, Optimize]) -> bytes:
    """A variant at the target's opset and IR version; Refused for one that needs a newer opset."""
    from forja.stages import register

    dataset, network, settings = parts
    module = register.network(dataset, network, work.load(judged.training, "model.pt"))
    exact = register.export(module, dataset.shape, opset=target.opset, ir=target.ir)
    if variant == "fp32":
        return exact
    if variant not in ("fp16", "int8"):
        raise Refused(f"{variant} for {target.name}: it can't be made at opset {target.opset}", allowed="fp32, fp16, int8")
    return _variant(work, exact, variant, _samples(work, judged.dataset, dataset, settings), settings)


def _variant(work: Work, exact: bytes, variant: str, samples: NDArray[np.float32], settings: Optimize) -> bytes:
    """The one place that knows how variants are made."""
    from forja.precision import calibration, floats, int8

    if variant == "fp16":
        return floats.fp16(exact, calibration.peaks(int8.prepared(exact), samples, work.scratch)).model
    return int8.int8(exact, samples, work.scratch, method=settings.calibration, percentile=settings.percentile)


def _samples(work: Work, receipt: Receipt, dataset: Images | Table, settings: Optimize) -> NDArray[np.float32]:
    from forja import loading
    from forja.precision import calibration

    train = loading.arrays(work, receipt, dataset, "train")
    chosen: NDArray[np.float32] = train.inputs[calibration.balanced(train.labels.tolist(), train.keys, settings.calibration_samples)]
    return chosen


def checked(model: bytes, target: Target) -> None:
    """Refused unless onnx accepts the file in full, and the target reads it."""
    import onnx

    try:
        onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise Refused(f"ONNX file for {target.name}: not valid", value=str(error)[:300]) from error
    if not readable(model, target):
        found = onnx.load_from_string(model)
        versions = {"opset": max(o.version for o in found.opset_import if not o.domain), "ir": found.ir_version}
        raise Refused(f"ONNX file for {target.name}: too new", value=versions, allowed=f"opset {target.opset}, IR {target.ir} at most")


def parity(model: bytes, inputs: NDArray[np.float32], golden: Golden, tolerance: float, what: str) -> float:
    """Largest difference of a probability from the golden answers, on ONNX Runtime; Refused above the tolerance, and for NaN."""
    import numpy

    from forja import evaluation

    found = evaluation.answers(model, inputs)
    difference = float(numpy.abs(found - golden.outputs).max()) if found.shape == golden.outputs.shape else float("nan")
    if not difference <= tolerance:
        raise Refused(f"{what}: answers differ from those that the gate judged", value=difference, allowed=f"{tolerance} at most")
    return difference


def halved(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Inputs as float16 holds them; beyond its range they are infinite, and answers to them NaN."""
    import numpy

    with numpy.errstate(over="ignore"):
        return inputs.astype(numpy.float16).astype(numpy.float32)


def golden(work: Work, receipt: Receipt) -> Golden:
    """Golden samples of an optimize receipt."""
    import numpy

    with numpy.load(io.BytesIO(work.load(receipt, "golden.npz")), allow_pickle=False) as arrays:
        return Golden(inputs=arrays["inputs"], outputs=arrays["probabilities"])


def same_classes(work: Work, receipt: Receipt, dataset: Images | Table) -> None:
    """The recipe's classes are the dataset's, in its order: the validation split's labels are counted by number and by name.

    A recipe whose classes were put in another order after training would give every device wrong names. Classes with equal counts can't
    be told apart this way.

    Raises:
        BadInput: they aren't.
    """
    from forja import loading

    named = dict(receipt.facts["splits"]["validation"]["classes"])
    _, labels, _ = loading.payloads(work, receipt, "validation")
    numbered = Counter(int(n) for n in labels)
    counted = {name: numbered[i] for i, name in enumerate(dataset.classes)}
    if counted != named:
        raise BadInput(
            f"classes of the recipe, in order, with the validation samples of each number ({receipt.path})", value=counted,
            allowed=f"{named}, as when the dataset was made", do="put the recipe's classes back, or run transform and train again",
        )  # fmt: skip


def versions() -> dict[str, str]:
    """Libraries that did the work."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "onnx", "onnxruntime", "numpy", "cryptography")}


def ahead_of_time(
    model: bytes, target: Target, shape: tuple[int, ...], variant: str, max_batch: int
) -> tuple[bytes, str, dict[str, Any]]:  # fmt: skip
    """A TensorRT-RTX plan for the target's GPU, the library's version, and what is known of it; no GPU is needed or used.

    Raises:
        BadInput, Refused: as ``forja.engines.build.build``.
    """
    import tensorrt_rtx

    from forja.engines import build

    built = build.build(
        tensorrt_rtx, model, shape, batches=(1, 1, max_batch), capability=target.compute_capability, tf32=variant != "fp32"
    )  # fmt: skip
    facts = {"bytes": len(built.plan), "flags": list(built.flags), "deserialised": "not measured"}
    return built.plan, str(tensorrt_rtx.__version__), facts
