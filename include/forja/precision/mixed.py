"""Mixed precision: int8 whose worst layers go back to float16, as few as it takes to pass the gate.

Layers are ranked by the error that quantisation makes in each of them (onnxruntime's ``qdq_loss_debug``); the search puts the worst back,
twice as many at every try, until a judge accepts the graph or the tries end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forja import evaluation
from forja.errors import Refused
from forja.precision import calibration, floats
from forja.precision.graph import attribute, checked, named, upgraded
from forja.precision.int8 import KINDS, prepared, quantizable, quantized
from forja.precision.lint import lint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnx import GraphProto, ModelProto

OPSET, IR = 19, 9
"""The first opset whose QuantizeLinear takes float16."""
RANKED = 64
"""Calibration samples that rank the layers: all of their activations are held in memory, twice."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What int8 does to one layer."""

    name: str
    noise: float
    """Noise-to-signal power ratio of its quantised weights and inputs, summed; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class Try:
    """One graph of the search."""

    model: bytes
    kept: tuple[str, ...]
    """Layers in float16, worst first."""
    accepted: bool
    score: float
    """The judge's number, higher is better."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the search found."""

    ranking: tuple[Layer, ...]
    tries: tuple[Try, ...]

    @property
    def best(self) -> Try:
        """The accepted graph, which is the last; the one with the best score when none was."""
        last = self.tries[-1]
        return last if last.accepted else max(self.tries, key=lambda t: t.score)


def search(
    model: bytes, samples: NDArray[np.float32], scratch: Path, *, method: str, percentile: float, tries: int,
    judge: Callable[[bytes], tuple[bool, float]],
) -> Found:  # fmt: skip
    """Find the graph with the fewest float16 layers that the judge accepts.

    Args:
        model: float32 ONNX with one input.
        samples: float32 [N, *shape] of raw inputs of the training split.
        scratch: a folder for temporary files.
        method: see ``calibration.ranges``; with ``percentile`` for that method.
        tries: graphs at most: none, 1, 2, 4, ... layers put back.
        judge: whether a graph passes, and how good it is; NaN counts as the worst.

    Raises:
        BadInput, Refused: as ``int8.int8``.
    """
    source = prepared(upgraded_bytes(model))
    found = calibration.ranges(source, samples, scratch, method=method, percentile=percentile, operators=KINDS)
    ranking = rank(source, quantized(source, found), samples[:RANKED], scratch)
    names = [layer.name for layer in ranking]
    done: list[Try] = []
    for number in range(tries):
        count = 2 ** (number - 1) if number else 0
        if count >= len(names):
            break
        kept = tuple(names[:count])
        candidate = halved(quantized(source, found, kept))
        accepted, score = judge(candidate)
        done.append(Try(model=candidate, kept=kept, accepted=accepted, score=score if score == score else float("-inf")))
        if accepted:
            break
    return Found(ranking=tuple(ranking), tries=tuple(done))


def upgraded_bytes(model: bytes) -> bytes:
    """The model at the opset that float16 Q/DQ pairs need."""
    import onnx

    return bytes(upgraded(onnx.load_from_string(model), OPSET, IR).SerializeToString())


def halved(model: bytes) -> bytes:
    """A quantised model with float16 where it had float32, scales of Q/DQ pairs included; Refused when ``lint`` finds something."""
    import onnx

    source = onnx.load_from_string(model)
    named(source)
    result = floats.halved(source)
    if problems := lint(result):
        raise Refused("mixed: the graph is not one that TensorRT takes", value=problems)
    return checked(result, "mixed")


def rank(source: ModelProto, int8_model: bytes, samples: NDArray[np.float32], scratch: Path) -> list[Layer]:
    """Layers by the noise that int8 brings into them, worst first.

    The noise of a tensor is the power of its rounding error over its own power, 10 ** (-SQNR / 10); a layer's is the sum over its
    quantised inputs and weights.
    """
    import onnx
    from onnxruntime import GraphOptimizationLevel
    from onnxruntime.quantization import qdq_loss_debug as debug

    paths = {name: scratch / f"rank-{name}.onnx" for name in ("float", "int8", "float-out", "int8-out")}
    onnx.save(source, paths["float"])
    paths["int8"].write_bytes(int8_model)
    activations: dict[str, Any] = {}
    options = evaluation.options()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL  # what is fused has no output to look at
    for name in ("float", "int8"):
        debug.modify_model_output_intermediate_tensors(paths[name], paths[f"{name}-out"])
        reader = calibration.Reader(source.graph.input[0].name, samples)
        activations[name] = debug.collect_activations(str(paths[f"{name}-out"]), reader, options)
    errors = debug.compute_activation_error(debug.create_activation_matching(activations["int8"], activations["float"]))
    noise = {name: _noise(error["qdq_err"]) for name, error in errors.items()}
    noise |= _weight_noise(onnx.load_from_string(int8_model).graph)
    inputs = {node.name: list(node.input) for node in source.graph.node}
    layers = [Layer(name=name, noise=sum(noise.get(i, 0.0) for i in inputs[name])) for name in quantizable(source.graph)]
    return sorted(layers, key=lambda layer: (-layer.noise, layer.name))


def _noise(sqnr: float) -> float:
    return float(10 ** (-sqnr / 10))


def _weight_noise(graph: GraphProto) -> dict[str, float]:
    """That of each quantised weight; onnxruntime's tool sees only weights that are stored as int8."""
    import numpy
    from onnx import numpy_helper

    constants = {t.name: numpy_helper.to_array(t).astype("float64") for t in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in constants:
            weight, scale = constants[node.input[0]], constants[node.input[1]]
            shape = [-1 if axis == attribute(node, "axis", 1) else 1 for axis in range(weight.ndim)] if scale.size > 1 else []
            steps = scale.reshape(shape)
            error = numpy.clip(numpy.round(weight / steps), -128, 127) * steps - weight
            found[node.input[0]] = float((error**2).sum() / max(float((weight**2).sum()), 1e-300))
    return found


def facts(found: Found) -> dict[str, Any]:
    """For the receipt: the ranking and what each try kept."""
    return {
        "layers": [{"layer": layer.name, "noise": round(layer.noise, 8)} for layer in found.ranking],
        "tries": [{"float16": list(t.kept), "accepted": t.accepted, "score": _finite(t.score)} for t in found.tries],
        "float16": list(found.best.kept),
    }  # fmt: skip


def _finite(score: float) -> float | None:
    return score if score > float("-inf") else None
