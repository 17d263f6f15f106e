"""Small networks of convolutions as ONNX, in each precision, for the tests of engines."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

RESNET18 = (3, *(64,) * 5, *(128,) * 4, *(256,) * 4, *(512,) * 4)
"""Channels in front of and behind its 3x3 convolutions: 11.0 million weights with 17 layers, as many as ResNet-18's."""
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}


def convolutions(precision: str, channels: Sequence[int], *, kept: Sequence[int] = (), names: bool = True) -> bytes:
    """A chain of 3x3 convolutions and ReLU over float32 [N, channels[0], 16, 16], from and to float32.

    Args:
        precision: ``fp32``, ``fp16`` or ``int8`` (Q/DQ pairs, weights per channel).
        channels: of the input and of each layer's output.
        kept: numbers of layers that stay float32.
        names: whether nodes have names.
    """
    rng = np.random.default_rng(0)
    nodes: list[NodeProto] = []
    constants = [numpy_helper.from_array(np.float32(0.05), "activation_scale"), numpy_helper.from_array(np.int8(0), "zero")]

    def add(operator: str, inputs: list[str], output: str, **attributes: int | list[int]) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], name=output if names else "", **attributes))
        return output

    tensor = "input"
    for i, (before, after) in enumerate(pairwise(channels)):
        kind = "fp32" if i in kept else precision
        weight = (rng.standard_normal((after, before, 3, 3), dtype=np.float32) / (3 * before**0.5)).astype("float32")
        constants.append(numpy_helper.from_array(weight.astype("float16") if kind == "fp16" else weight, f"w{i}"))
        source = f"w{i}"
        if kind == "fp16":
            tensor = add("Cast", [tensor], f"half{i}", to=TYPES["fp16"])
        if kind == "int8":
            constants.append(numpy_helper.from_array(np.full(after, 0.01, np.float32), f"scale{i}"))
            constants.append(numpy_helper.from_array(np.zeros(after, np.int8), f"zero{i}"))
            source = add("QuantizeLinear", [source, f"scale{i}", f"zero{i}"], f"wq{i}", axis=0)
            source = add("DequantizeLinear", [source, f"scale{i}", f"zero{i}"], f"wdq{i}", axis=0)
            tensor = add("QuantizeLinear", [tensor, "activation_scale", "zero"], f"q{i}")
            tensor = add("DequantizeLinear", [tensor, "activation_scale", "zero"], f"dq{i}")
        tensor = add("Conv", [tensor, source], f"conv{i}", pads=[1, 1, 1, 1])
        tensor = add("Relu", [tensor], f"relu{i}")
        if kind == "fp16":
            tensor = add("Cast", [tensor], f"single{i}", to=TYPES["fp32"])
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", channels[0], 16, 16])],
        [helper.make_tensor_value_info(tensor, TensorProto.FLOAT, ["n", channels[-1], 16, 16])],
        constants,
    )
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())
