"""The weights of an ONNX file, with the types that a strongly typed engine takes from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from forja.engines.inspect import WIDTH
from forja.precision.graph import WEIGHTED, attribute, makers

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

SHAPING = ("Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
"""Operators that leave values and their type alone."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """The constant weights of one node."""

    node: str
    """Name of the node; empty for one without."""
    precision: str
    """Type that the node computes in: one of ``inspect.WIDTH``."""
    stored: str
    """Type that the weights have in an engine; narrower than ``precision`` where they alone are quantised."""
    elements: int
    """How many they are."""
    tensor: str
    """Name of the constant, which nodes may share."""


@dataclass(frozen=True, kw_only=True)
class _Constant:
    """A constant and what the graph makes of it."""

    name: str
    read: str
    """Type in which it is read."""
    quantised: str
    """Type that it has in front of a DequantizeLinear; empty without one."""
    elements: int


def weights(model: bytes) -> list[Weight]:
    """Convolutions and matrix products of an ONNX file that have constant weights, in the file's order.

    A product of two activations has none, and types that nothing multiplies in (float64) are left out.
    """
    import onnx

    graph = onnx.load_from_string(model).graph
    made_by = makers(graph)
    stated = ((n.output[0], a.t) for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value")
    constants = {**{t.name: t for t in graph.initializer}, **dict(stated)}
    found = []
    for node in graph.node:
        if node.op_type not in (*WEIGHTED, "ConvTranspose"):
            continue
        for own, other in ((1, 0), (0, 1)):  # MatMul may have its weights on either side
            constant = _constant(node.input[own], constants, made_by)
            if constant is not None:
                both = constant.quantised and _quantised(node.input[other], made_by)
                stored = constant.quantised or constant.read
                precision = constant.quantised if both else constant.read
                found.append(Weight(node=node.name, precision=precision, stored=stored, elements=constant.elements, tensor=constant.name))
                break
    return [w for w in found if w.stored in WIDTH and w.precision in WIDTH]


def _constant(name: str, constants: Mapping[str, TensorProto], made_by: Mapping[str, NodeProto]) -> _Constant | None:
    """The constant behind a tensor, None when there is an activation behind it."""
    read = quantised = ""
    while name not in constants:
        node = made_by.get(name)
        if node is None or node.op_type not in (*SHAPING, "Cast", "QuantizeLinear", "DequantizeLinear"):
            return None
        if node.op_type == "Cast":
            read = read or _type(attribute(node, "to", 0))
        elif node.op_type == "DequantizeLinear":
            scale, zero = (constants.get(node.input[i]) if len(node.input) > i else None for i in (1, 2))
            read = read or _type(scale.data_type if scale is not None else 0)
            quantised = quantised or (_type(zero.data_type) if zero is not None else "int8")
        name = node.input[0]
    tensor = constants[name]
    return _Constant(name=name, read=read or _type(tensor.data_type), quantised=quantised, elements=prod(tensor.dims))


def _quantised(name: str, made_by: Mapping[str, NodeProto]) -> bool:
    """Whether a tensor comes out of a DequantizeLinear."""
    while (node := made_by.get(name)) is not None and node.op_type in SHAPING:
        name = node.input[0]
    return node is not None and node.op_type == "DequantizeLinear"


def _type(number: int) -> str:
    """Name of an ONNX element type as ``inspect.TYPES`` has it; empty for one that it hasn't."""
    from onnx import TensorProto

    names = {
        TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16", TensorProto.INT8: "int8",
        TensorProto.FLOAT8E4M3FN: "fp8", TensorProto.INT4: "int4", TensorProto.FLOAT4E2M1: "fp4",
    }  # fmt: skip
    return names.get(number, "")
