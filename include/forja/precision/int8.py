"""int8 by symmetric Q/DQ pairs, as TensorRT wants them: per channel at weights, per tensor at activations, biases left alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forja.errors import Refused
from forja.precision import calibration
from forja.precision.graph import WEIGHTED, checked, drop_unused, front_nodes, makers, named, sort_nodes
from forja.precision.lint import lint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnx import GraphProto, ModelProto, NodeProto

KINDS = [*WEIGHTED, "Add"]
"""Operators that become int8."""

OPTIONS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    "AddQDQPairToWeight": True,
    "DedicatedQDQPair": False,
    "ForceQuantizeNoInputCheck": True,
    "QDQDisableWeightAdjustForInt32Bias": True,
    "QDQOpTypePerChannelSupportToAxis": {"Conv": 0, "MatMul": 1},
    "OpTypesToExcludeOutputQuantization": KINDS,
}
"""Those of NVIDIA's ModelOpt for TensorRT, which refuses non-zero zero points and int32 biases behind a DequantizeLinear
(onnxruntime's defaults write both)."""


def int8(
    model: bytes, samples: NDArray[np.float32], scratch: Path, *, method: str = "minmax", percentile: float = 99.99
) -> bytes:  # fmt: skip
    """The model with symmetric int8 Q/DQ pairs.

    Args:
        model: float32 ONNX with one input.
        samples: float32 [N, *shape] of raw inputs of the training split; all of them set the scales.
        scratch: a folder for temporary files.
        method: how they do, see ``calibration.ranges``; with ``percentile`` for that method.

    Raises:
        BadInput: samples of another shape than the model's input.
        Refused: the result breaks a rule of ``lint``, or calibration met values that aren't finite.
    """
    source = prepared(model)
    return quantized(source, calibration.ranges(source, samples, scratch, method=method, percentile=percentile, operators=KINDS))


def prepared(model: bytes) -> ModelProto:
    """The model with inferred shapes and a name of its own for every node."""
    import onnx

    source = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))
    named(source)
    return source


def quantized(source: ModelProto, ranges: Any, keep: Sequence[str] = ()) -> bytes:
    """A prepared model with Q/DQ pairs; the nodes named in ``keep`` stay float32. Refused when the result breaks a rule of ``lint``."""
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    copy = onnx.ModelProto()
    copy.CopyFrom(source)
    chosen = [name for name in quantizable(copy.graph) if name not in keep]
    quantizer = QDQQuantizer(
        copy, True, False, QuantType.QInt8, QuantType.QInt8, ranges, chosen, [], KINDS, OPTIONS,
    )  # fmt: skip
    quantizer.quantize_model()
    model = quantizer.model.model
    _fuse_residuals(model.graph)
    sort_nodes(model.graph)
    if problems := lint(model):
        raise Refused("int8: the graph is not one that TensorRT takes", value=problems)
    return checked(model, "int8")


def quantizable(graph: GraphProto) -> list[str]:
    """Names of the layers with constant weights, and of the sums of residual blocks; adding a constant (a bias) is left alone."""
    constants = {t.name for t in graph.initializer}
    front = front_nodes(graph)
    layers = [n.name for n in graph.node if n.op_type in WEIGHTED and n.input[1] in constants]
    sums = [n.name for n in graph.node if n.op_type == "Add" and n.name not in front and not constants & set(n.input)]
    return layers + sums


def _fuse_residuals(graph: GraphProto) -> None:
    """At each sum of a residual block, let one branch that ends in a convolution in without its Q/DQ pair.

    TensorRT fuses Conv + Add + ReLU in int8 only when the shortcut alone is quantised (NVIDIA's Q/DQ placement advice).
    """
    made_by = makers(graph)
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for i, name in enumerate(node.input):
            source = _before_pair(made_by, name)
            if source and source in made_by and made_by[source].op_type == "Conv":
                node.input[i] = source
                break
    drop_unused(graph)


def _before_pair(made_by: dict[str, NodeProto], name: str) -> str:
    """Tensor in front of the Q/DQ pair that makes ``name``, empty when there is no pair."""
    dequantize = made_by.get(name)
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return ""
    quantize = made_by.get(dequantize.input[0])
    return quantize.input[0] if quantize is not None and quantize.op_type == "QuantizeLinear" else ""
