"""The linter of quantised graphs: what TensorRT would refuse, or run slowly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forja.precision.graph import WEIGHTED, attribute, makers

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


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
    made_by = makers(graph)
    for node in graph.node:
        if node.op_type in WEIGHTED and (maker := made_by.get(node.input[1])) is not None and maker.op_type == "DequantizeLinear":
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
