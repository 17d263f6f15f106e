"""float16 and bfloat16: weights and arithmetic in 16 bits, but for what wouldn't survive it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from forja.precision.graph import attribute, checked, drop_unused, front_nodes, makers, named, sort_nodes, upgraded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnx import GraphProto, ModelProto, TensorProto

FP16_MAX = 65504.0
HEADROOM = 2.0
"""Factor between the largest value that calibration saw and the largest that float16 holds: other samples go further."""
BF16_OPSET, BF16_IR = 22, 10
"""The first opset whose convolutions take bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Half:
    """A 16-bit variant."""

    model: bytes
    kept: tuple[str, ...]
    """Nodes that stay float32 because their values could be beyond float16, each as ``name: value``."""


def fp16(model: bytes, peaks: Mapping[str, float] | None = None) -> Half:
    """The model with float16 weights and arithmetic; inputs and outputs, the normalising front and softmax stay float32.

    Args:
        model: float32 ONNX.
        peaks: largest absolute value of each activation, by tensor (``calibration.peaks``); layers that could overflow stay float32.
            Without it only weights tell.

    Raises:
        Refused: the result is no valid ONNX.
    """
    import onnx

    source = onnx.load_from_string(model)
    named(source)
    kept = overflowing(source.graph, peaks or {})
    return Half(model=checked(halved(source, kept), "fp16"), kept=tuple(f"{name}: {value:g}" for name, value in kept.items()))


def halved(source: ModelProto, keep: Collection[str] = ()) -> ModelProto:
    """The model, changed in place, in float16 but for the front, softmax and the nodes in ``keep``."""
    from onnxruntime.transformers import float16

    converted: ModelProto = float16.convert_float_to_float16(
        source,
        keep_io_types=True,
        op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, "Softmax"],
        node_block_list=sorted({*front_nodes(source.graph), *keep}),
    )
    _drop_round_trips(converted.graph)
    sort_nodes(converted.graph)
    del converted.graph.value_info[:]
    return converted


def overflowing(graph: GraphProto, peaks: Mapping[str, float]) -> dict[str, float]:
    """Nodes behind the front with an input, weight or output beyond float16, and the largest such value of each."""
    from onnx import numpy_helper

    values = {name: peak * HEADROOM for name, peak in peaks.items()}
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == "float32" and array.size:
            values[tensor.name] = float(abs(array).max())
    front = front_nodes(graph)
    found = {}
    for node in graph.node:
        # Written so that NaN is kept out of float16 too.
        large = [values[name] for name in (*node.input, *node.output) if name in values and not values[name] <= FP16_MAX]
        if large and node.name not in front:
            found[node.name] = max(large)
    return found


def bf16(model: bytes) -> bytes:
    """The model with bfloat16 weights and arithmetic, at opset 22; inputs and outputs, the front and softmax stay float32.

    bfloat16 has float32's range: nothing can overflow that didn't before. Refused when the result is no valid ONNX.
    """
    import onnx
    from onnx import TensorProto

    source = upgraded(onnx.load_from_string(model), BF16_OPSET, BF16_IR)
    exact = {t.name: t for t in source.graph.initializer}
    named(source)
    copy = onnx.ModelProto()
    copy.CopyFrom(source)
    result = halved(copy)
    for tensor in result.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            # From float32 itself, whose range it has, not from what float16 left of it.
            tensor.CopyFrom(_as_bf16(exact[tensor.name]))
    for node in result.graph.node:
        for item in node.attribute:
            if node.op_type == "Cast" and item.name == "to" and item.i == TensorProto.FLOAT16:
                item.i = TensorProto.BFLOAT16
    return checked(result, "bf16")


def _as_bf16(tensor: TensorProto) -> TensorProto:
    import ml_dtypes
    from onnx import numpy_helper

    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16), tensor.name)


def emulated(model: bytes, kind: Literal["fp16", "bf16"], kept: Collection[str] = ()) -> bytes:
    """A float32 model that rounds as its 16-bit variant does on a tensor core: ONNX Runtime computes float16 in float32 on a CPU, where
    nothing overflows, and bfloat16 not at all.

    Weights and the output of every node behind the front are rounded to 16 bits (by Cast there and back), sums stay float32. What it
    answers is an estimate: no hardware has run the variant itself.

    Args:
        model: float32 ONNX.
        kind: what to round to.
        kept: nodes that stay float32, as ``Half.kept`` names them.
    """
    import onnx
    from onnx import TensorProto, helper

    source = onnx.load_from_string(model)
    named(source)
    graph, exact = source.graph, {*front_nodes(source.graph), *(name.partition(":")[0] for name in kept)}
    body = [n for n in graph.node if n.name not in exact and n.op_type != "Softmax"]
    read = {name for node in body for name in node.input}
    for tensor in graph.initializer:
        if tensor.name in read and tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(onnx.numpy_helper.from_array(_rounded(onnx.numpy_helper.to_array(tensor), kind), tensor.name))
    outputs, short = {o.name for o in graph.output}, TensorProto.FLOAT16 if kind == "fp16" else TensorProto.BFLOAT16
    for node in body:
        for i, name in enumerate(node.output):
            if name in outputs:
                continue
            node.output[i] = f"{name}_exact"
            graph.node.append(helper.make_node("Cast", [f"{name}_exact"], [f"{name}_short"], to=short))
            graph.node.append(helper.make_node("Cast", [f"{name}_short"], [name], to=TensorProto.FLOAT))
    sort_nodes(graph)
    del graph.value_info[:]
    return checked(source, f"{kind}, emulated")


def _rounded(array: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    import ml_dtypes
    import numpy

    with numpy.errstate(over="ignore"):
        return array.astype("float16" if kind == "fp16" else ml_dtypes.bfloat16).astype("float32")


def _drop_round_trips(graph: GraphProto) -> None:
    """Take out float32 -> float16 -> float32: the converter puts one between any two nodes that stay float32, the input
    and the front included, and it would clip and round exactly what was to stay exact."""
    from onnx import TensorProto

    made_by = makers(graph)
    exact: dict[str, str] = {}
    for node in graph.node:
        before = made_by.get(node.input[0]) if node.op_type == "Cast" and attribute(node, "to", 0) == TensorProto.FLOAT else None
        # The converter's own casts, by their names: those read float32. A cast that the model had may read integers.
        if before is not None and (before.name.startswith("graph_input_cast") or before.name.endswith("_cast_to_fp16_node")):
            node.input[0] = before.input[0]
            exact[node.output[0]] = before.input[0]
    for node in graph.node:
        for i, name in enumerate(node.input):
            while name in exact:
                name = node.input[i] = exact[name]
    drop_unused(graph)
