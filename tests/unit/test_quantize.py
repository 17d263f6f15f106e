"""fp16 and int8 files: what they keep, and what the graph linter refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from forja import evaluation, quantize
from forja.errors import BadInput, Refused
from forja.evaluation import answers

pytestmark = pytest.mark.ml

RAW = 1e6
"""Scale of raw inputs: beyond float16, like strain or power of a machine."""


def network(seed: int = 0, scale: float = 1.0) -> bytes:
    """A residual network with raw inputs [N, 1, 8, 8], a normalising front and softmax, three classes."""
    rng = np.random.default_rng(seed)

    def weights(*shape: int) -> Any:
        return (rng.normal(size=shape) * scale / np.sqrt(np.prod(shape[1:]))).astype("float32")

    constants = {
        "mean": np.float32(0.0), "factor": np.float32(1 / RAW), "w1": weights(8, 1, 3, 3), "b1": weights(8), "w2": weights(8, 8, 3, 3),
        "b2": weights(8), "fc": weights(3, 8) * 8, "bias": weights(3),
    }  # fmt: skip
    same = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    nodes = [
        helper.make_node("Sub", ["input", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "factor"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "w1", "b1"], ["c1"], **same),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], **same),
        helper.make_node("Add", ["c2", "r1"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["r2"]),
        helper.make_node("ReduceMean", ["r2"], ["pooled"], axes=[2, 3], keepdims=0),
        helper.make_node("Gemm", ["pooled", "fc", "bias"], ["logits"], transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


@pytest.fixture
def inputs() -> Any:
    return (np.random.default_rng(1).normal(size=(300, 1, 8, 8)) * RAW).astype("float32")


def signature(model: bytes) -> list[tuple[str, int]]:
    graph = onnx.load_from_string(model).graph
    return [(t.name, t.type.tensor_type.elem_type) for t in (*graph.input, *graph.output)]


def test_fp16_keeps_the_signature_and_answers(inputs: Any) -> None:
    source = network()
    half = quantize.fp16(source)
    assert signature(half) == signature(source)
    assert np.abs(answers(half, inputs) - answers(source, inputs)).max() < 5e-3
    assert {t.data_type for t in onnx.load_from_string(half).graph.initializer if t.name.startswith("w")} == {TensorProto.FLOAT16}


def test_fp16_by_the_plain_converter_loses_raw_inputs(inputs: Any) -> None:
    """Must fail: without taking out the round trips, the raw input itself becomes float16, and that is infinite."""
    from onnxruntime.transformers import float16

    source = onnx.load_from_string(network())
    quantize.named(source)
    plain = float16.convert_float_to_float16(source, keep_io_types=True, node_block_list=sorted(quantize.front_nodes(source.graph)))
    with pytest.raises(Refused, match="not a valid ONNX"):
        quantize.checked(plain, "fp16")  # its nodes are out of order
    quantize.sort_nodes(plain.graph)
    del plain.graph.value_info[:]
    assert not np.isfinite(answers(quantize.checked(plain, "fp16"), inputs)).all()


def test_fp16_refuses_a_weight_beyond_its_range() -> None:
    with pytest.raises(Refused, match="65504"):
        quantize.fp16(network(scale=1e6))


def test_int8_is_symmetric_repeatable_and_close(inputs: Any, tmp_path: Path) -> None:
    source = network()
    first = quantize.int8(source, inputs, tmp_path)
    assert signature(first) == signature(source)
    assert first == quantize.int8(source, inputs, tmp_path)
    assert quantize.lint(onnx.load_from_string(first)) == []
    assert evaluation.agreement(answers(first, inputs), answers(source, inputs)) > 0.95


def test_int8_leaves_front_and_convolution_branch_without_pairs(inputs: Any, tmp_path: Path) -> None:
    graph = onnx.load_from_string(quantize.int8(network(), inputs, tmp_path)).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    by_type = {node.op_type: [makers.get(i, "") for i in node.input] for node in graph.node}
    assert sorted(by_type["Add"]) == ["Conv", "DequantizeLinear"]
    assert by_type["Sub"] == ["", ""]
    assert by_type["Mul"] == ["Sub", ""]


def test_onnxruntime_defaults_are_refused(inputs: Any, tmp_path: Path) -> None:
    """Must fail: what quantize_static writes by default is what TensorRT refuses."""
    from onnxruntime import quantization

    source = onnx.load_from_string(network())
    quantize.named(source)
    quantization.quantize_static(source, str(tmp_path / "q.onnx"), quantize._Reader("input", inputs))
    problems = " ".join(quantize.lint(onnx.load(tmp_path / "q.onnx")))
    assert "zero point -" in problems or "zero point 1" in problems
    assert "int32 constant (a bias)" in problems
    assert "one scale" in problems


def _zero_point(graph: Any) -> None:
    _replace(graph, "zero_point", lambda a: (a + 3).astype("int8"))


def _unsigned(graph: Any) -> None:
    _replace(graph, "zero_point", lambda a: a.astype("uint8"))


def _axis(graph: Any) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "DequantizeLinear" and attribute.name == "axis":
                attribute.i = 1


def _qoperator(graph: Any) -> None:
    graph.node.append(helper.make_node("QLinearConv", ["a"], ["b"], name="q"))


def _bias(graph: Any) -> None:
    graph.initializer.append(numpy_helper.from_array(np.zeros(8, "int32"), "bias32"))
    pair = next(n for n in graph.node if n.op_type == "DequantizeLinear")
    graph.node.append(helper.make_node("DequantizeLinear", ["bias32", pair.input[1], pair.input[2]], ["b32"], name="b"))


def _none(graph: Any) -> None:
    del graph.node[:]


def _replace(graph: Any, suffix: str, change: Callable[[Any], Any]) -> None:
    for tensor in graph.initializer:
        if tensor.name.endswith(suffix):
            tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_zero_point, "zero point 3, allowed: 0"),
        (_unsigned, "zero point of type uint8, allowed: int8"),
        (_axis, "along axis 1, allowed: 0"),
        (_qoperator, "operator QLinearConv"),
        (_bias, "int32 constant (a bias)"),
        (_none, "nothing is quantised"),
    ],
)
def test_linter_refuses(damage: Callable[[Any], None], problem: str, inputs: Any, tmp_path: Path) -> None:
    model = onnx.load_from_string(quantize.int8(network(), inputs, tmp_path))
    damage(model.graph)
    assert problem in " ".join(quantize.lint(model))


def test_calibration_is_balanced_and_repeatable() -> None:
    keys = [f"k{i:03d}" for i in range(100)]
    labels = [0] * 90 + [1] * 10
    chosen = quantize.balanced(labels, keys, 40)
    assert sorted(chosen) == [*range(30), *range(90, 100)]  # class 1 has ten only; class 0 takes its turns
    order = np.random.default_rng(0).permutation(100)
    again = quantize.balanced([labels[i] for i in order], [keys[i] for i in order], 40)
    assert [keys[order[i]] for i in again] == [keys[i] for i in chosen]
    with pytest.raises(BadInput):
        quantize.balanced([], [], 4)


def test_metrics_leave_out_what_cannot_be_measured() -> None:
    good = np.array([[0.9, 0.1], [0.2, 0.8]], "float32")
    assert evaluation.measure(good, np.array([0, 1]), "average_precision") == {"accuracy": 1.0, "average_precision": 1.0}
    assert evaluation.measure(good, np.array([0, 0]), "average_precision") == {"accuracy": 0.5}  # no positive sample
    assert evaluation.measure(good * np.nan, np.array([0, 1]), "accuracy") == {}
    assert evaluation.measure(good[:0], np.array([], int), "accuracy") == {}
