"""Precision variants of an ONNX model: fp16 with float32 inputs and outputs, int8 with symmetric Q/DQ pairs.

TensorRT 11 takes precision from the file and from nowhere else, so these files are what every engine is built from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forja.errors import BadInput, Refused

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnx import GraphProto, ModelProto, NodeProto

WEIGHTED = ("Conv", "Gemm", "MatMul")
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

CALIBRATION_BATCH = 64
"""Samples in one calibration run; it bounds memory and doesn't change the ranges."""


def fp16(model: bytes) -> bytes:
    """The model with float16 weights and arithmetic; inputs and outputs, the normalising front and softmax stay float32.

    Raises:
        Refused: a weight is beyond float16's range (65504), or the result is no valid ONNX.
    """
    import onnx
    from onnxruntime.transformers import float16

    source = onnx.load_from_string(model)
    named(source)
    front = front_nodes(source.graph)
    body = {name for node in source.graph.node if node.name not in front for name in node.input}
    for tensor in source.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.name in body and array.dtype == "float32" and array.size and abs(array).max() > 65504:
            raise Refused("fp16: a weight is beyond float16", value=f"{tensor.name} {abs(array).max():g}", allowed="up to 65504")
    converted = float16.convert_float_to_float16(
        source,
        keep_io_types=True,
        op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, "Softmax"],
        node_block_list=sorted(front),
    )
    _drop_round_trips(converted.graph)
    sort_nodes(converted.graph)
    del converted.graph.value_info[:]
    return checked(converted, "fp16")


def int8(model: bytes, samples: NDArray[np.float32], scratch: Path) -> bytes:
    """The model with symmetric int8 Q/DQ pairs: per channel at weights, per tensor at activations, biases left alone.

    Args:
        model: float32 ONNX with one input.
        samples: float32 [N, *shape] of raw inputs; their ranges set the scales (min-max).
        scratch: a folder for temporary files.

    Raises:
        Refused: the result breaks a rule of ``lint``.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization import quant_utils

    source = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))
    named(source)
    # Shapes are inferred and batch norm is folded already: said here, or the quantizer advises it on every run.
    quant_utils.add_pre_process_metadata(source)
    target = scratch / "int8.onnx"
    quantization.quantize_static(
        source,
        str(target),
        _Reader(source.graph.input[0].name, samples),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=quantization.CalibrationMethod.MinMax,
        per_channel=True,
        op_types_to_quantize=KINDS,
        nodes_to_quantize=_quantizable(source.graph),
        extra_options=OPTIONS,
    )
    quantized = onnx.load(target)
    _fuse_residuals(quantized.graph)
    sort_nodes(quantized.graph)
    if problems := lint(quantized):
        raise Refused("int8: the graph is not one that TensorRT takes", value=problems)
    return checked(quantized, "int8")


class _Reader:
    """Calibration batches for onnxruntime."""

    def __init__(self, name: str, samples: NDArray[np.float32]) -> None:
        self._name = name
        self._batches: Iterator[Any] = (samples[i : i + CALIBRATION_BATCH] for i in range(0, len(samples), CALIBRATION_BATCH))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


def balanced(labels: Sequence[int], keys: Sequence[str], count: int) -> list[int]:
    """Indices of up to ``count`` samples, taken from the classes in turn, in key order within each class.

    The same samples whatever the order in which they are stored; a class that runs out leaves its turn to the others.
    """
    if not len(keys):
        raise BadInput("calibration samples", value=0, allowed="one or more", do="give the training split some samples")
    turns: Counter[int] = Counter()
    ranked = []
    for index in sorted(range(len(keys)), key=lambda i: keys[i]):
        label = int(labels[index])
        ranked.append((turns[label], label, index))
        turns[label] += 1
    return [index for _, _, index in sorted(ranked)[:count]]


def lint(model: ModelProto) -> list[str]:
    """What TensorRT would refuse or run slowly in a quantised graph; empty for a good one."""
    from onnx import numpy_helper

    graph = model.graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    pairs = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    problems = [f"{n.name}: operator {n.op_type} instead of Q/DQ pairs" for n in graph.node if _is_qoperator(n)]
    if not pairs:
        problems.append("no QuantizeLinear: nothing is quantised")
    for node in pairs:
        zero = constants.get(node.input[2]) if len(node.input) > 2 else None
        if zero is None or zero.dtype != "int8":
            problems.append(f"{node.name}: zero point of type {getattr(zero, 'dtype', 'none')}, allowed: int8")
        elif zero.any():
            problems.append(f"{node.name}: zero point {int(abs(zero).max())}, allowed: 0")
        stored = constants.get(node.input[0])
        if node.op_type == "DequantizeLinear" and stored is not None and stored.dtype == "int32":
            problems.append(f"{node.name}: DequantizeLinear of an int32 constant (a bias)")
    makers = _makers(graph)
    for node in graph.node:
        if node.op_type in WEIGHTED and (maker := makers.get(node.input[1])) is not None and maker.op_type == "DequantizeLinear":
            problems += _lint_weight(node, maker, constants)
    return problems


def _lint_weight(node: NodeProto, maker: NodeProto, constants: dict[str, Any]) -> list[str]:
    transposed = node.op_type == "Gemm" and attribute(node, "transB", 0)
    wanted = 0 if node.op_type == "Conv" or transposed else 1
    scale = constants.get(maker.input[1])
    if scale is None or scale.ndim != 1:
        return [f"{node.name}: weights have one scale, allowed: one for each output channel"]
    axis = attribute(maker, "axis", 1)
    return [] if axis == wanted else [f"{node.name}: weights quantised along axis {axis}, allowed: {wanted}"]


def _is_qoperator(node: NodeProto) -> bool:
    others = ("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QGemm", "QAttention")
    return node.op_type.startswith("QLinear") or node.op_type in others


def front_nodes(graph: GraphProto) -> set[str]:
    """Names of the nodes before any weights: the normalisation, whose raw inputs may be beyond float16."""
    behind: set[str] = set()
    front: set[str] = set()
    for node in graph.node:
        if node.op_type in WEIGHTED or behind & set(node.input):
            behind.update(node.output)
        else:
            front.add(node.name)
    return front


def _quantizable(graph: GraphProto) -> list[str]:
    """Layers with constant weights, and the sums of residual blocks; adding a constant (a bias) is left alone."""
    constants = {t.name for t in graph.initializer}
    front = front_nodes(graph)
    layers = [n.name for n in graph.node if n.op_type in WEIGHTED and n.input[1] in constants]
    sums = [n.name for n in graph.node if n.op_type == "Add" and n.name not in front and not constants & set(n.input)]
    return layers + sums


def _fuse_residuals(graph: GraphProto) -> None:
    """At each sum of a residual block, let one branch that ends in a convolution in without its Q/DQ pair.

    TensorRT fuses Conv + Add + ReLU in int8 only when the shortcut alone is quantised (NVIDIA's Q/DQ placement advice).
    """
    makers = _makers(graph)
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for i, name in enumerate(node.input):
            source = _before_pair(makers, name)
            if source and source in makers and makers[source].op_type == "Conv":
                node.input[i] = source
                break
    _drop_unused(graph)


def _before_pair(makers: dict[str, NodeProto], name: str) -> str:
    """Tensor in front of the Q/DQ pair that makes ``name``, empty when there is no pair."""
    dequantize = makers.get(name)
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return ""
    quantize = makers.get(dequantize.input[0])
    return quantize.input[0] if quantize is not None and quantize.op_type == "QuantizeLinear" else ""


def _drop_round_trips(graph: GraphProto) -> None:
    """Take out float32 -> float16 -> float32: the converter puts one between any two nodes that stay float32, the input
    and the front included, and it would clip and round exactly what was to stay exact."""
    from onnx import TensorProto

    makers = _makers(graph)
    exact: dict[str, str] = {}
    for node in graph.node:
        before = makers.get(node.input[0]) if node.op_type == "Cast" and attribute(node, "to", 0) == TensorProto.FLOAT else None
        # The converter's own casts, by their names: those read float32. A cast that the model had may read integers.
        if before is not None and (before.name.startswith("graph_input_cast") or before.name.endswith("_cast_to_fp16_node")):
            node.input[0] = before.input[0]
            exact[node.output[0]] = before.input[0]
    for node in graph.node:
        for i, name in enumerate(node.input):
            while name in exact:
                name = node.input[i] = exact[name]
    _drop_unused(graph)


def _drop_unused(graph: GraphProto) -> None:
    outputs = {o.name for o in graph.output}
    while True:
        used = {name for node in graph.node for name in node.input} | outputs
        dead = [node for node in graph.node if not used & set(node.output)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    for tensor in [t for t in graph.initializer if t.name not in used]:
        graph.initializer.remove(tensor)


def sort_nodes(graph: GraphProto) -> None:
    """Order the nodes so that each comes after what it reads, as ONNX demands; otherwise in the order they had."""
    waiting = list(graph.node)
    known = {"", *(i.name for i in graph.input), *(t.name for t in graph.initializer)}
    ordered: list[NodeProto] = []
    while waiting:
        late = []
        for node in waiting:
            if known.issuperset(node.input):
                known.update(node.output)
                ordered.append(node)
            else:
                late.append(node)
        if len(late) == len(waiting):
            raise Refused("ONNX graph: nodes read what nothing makes", value=[n.name for n in waiting])
        waiting = late
    del graph.node[:]
    graph.node.extend(ordered)


def named(model: ModelProto) -> None:
    """Give every node a name of its own, in place: lists of nodes go by name."""
    for i, node in enumerate(model.graph.node):
        node.name = f"{i:04d}_{node.name or node.op_type}"


def checked(model: ModelProto, what: str) -> bytes:
    """The model's bytes, when onnx accepts it in full (types and shapes included); Refused otherwise."""
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise Refused(f"{what}: not a valid ONNX model", value=str(error)) from error
    return bytes(model.SerializeToString(deterministic=True))


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((a.i for a in node.attribute if a.name == name), default)


def _makers(graph: GraphProto) -> dict[str, NodeProto]:
    return {name: node for node in graph.node for name in node.output}
