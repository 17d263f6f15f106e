"""Precision variants: what they keep, what calibration reads, and what the graph linter refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from forja import evaluation
from forja.errors import BadInput, Refused
from forja.evaluation import answers
from forja.precision import calibration, floats, graph, int8, mixed
from forja.precision.lint import lint

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
    half = floats.fp16(source).model
    assert signature(half) == signature(source)
    assert np.abs(answers(half, inputs) - answers(source, inputs)).max() < 5e-3
    assert {t.data_type for t in onnx.load_from_string(half).graph.initializer if t.name.startswith("w")} == {TensorProto.FLOAT16}


def test_fp16_by_the_plain_converter_loses_raw_inputs(inputs: Any) -> None:
    """Must fail: without taking out the round trips, the raw input itself becomes float16, and that is infinite."""
    from onnxruntime.transformers import float16

    source = onnx.load_from_string(network())
    graph.named(source)
    plain = float16.convert_float_to_float16(source, keep_io_types=True, node_block_list=sorted(graph.front_nodes(source.graph)))
    with pytest.raises(Refused, match="not a valid ONNX"):
        graph.checked(plain, "fp16")  # its nodes are out of order
    graph.sort_nodes(plain.graph)
    del plain.graph.value_info[:]
    assert not np.isfinite(answers(graph.checked(plain, "fp16"), inputs)).all()


OVERFLOWS: dict[str, tuple[bytes, dict[str, float] | None, str]] = {
    "a weight beyond float16": (network(scale=1e6), None, "Conv"),
    "an activation that calibration saw beyond it": (network(), {"c2": 1e5}, "Conv"),
    "one that leaves no headroom": (network(), {"c2": 40_000.0}, "Conv"),
    "an activation that is no number": (network(), {"logits": float("nan")}, "Gemm"),
}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_fp16_keeps_in_float32_what_could_overflow_and_says_so(name: str, inputs: Any) -> None:
    source, peaks, kind = OVERFLOWS[name]
    half = floats.fp16(source, peaks)
    assert any(kind in line for line in half.kept)
    nodes = {node.name: node for node in onnx.load_from_string(half.model).graph.node}
    stored = {t.name: t.data_type for t in onnx.load_from_string(half.model).graph.initializer}
    for line in half.kept:
        node = nodes[line.partition(":")[0]]
        assert {stored[i] for i in node.input if i in stored} <= {TensorProto.FLOAT}
    assert np.isfinite(answers(half.model, inputs)).all()


def test_fp16_of_a_tame_network_keeps_nothing(inputs: Any, tmp_path: Path) -> None:
    peaks = calibration.peaks(int8.prepared(network()), inputs, tmp_path)
    assert peaks["input"] == pytest.approx(np.abs(inputs).max())
    assert floats.fp16(network(), peaks).kept == ()


def test_fp16_that_overflows_without_the_list(inputs: Any, tmp_path: Path) -> None:
    """Must fail: weights of 1000 are fine in float16, what they make of the activations isn't."""
    source = network(scale=1000)
    assert not np.isfinite(answers(floats.emulated(source, "fp16"), inputs)).all()
    kept = floats.fp16(source, calibration.peaks(int8.prepared(source), inputs, tmp_path)).kept
    assert len(kept) >= 3
    rounded = answers(floats.emulated(source, "fp16", kept), inputs)
    assert evaluation.agreement(rounded, answers(source, inputs)) > 0.95


def test_bf16_has_its_weights_from_float32_and_is_imitated_closely(inputs: Any) -> None:
    source = network()
    brain = onnx.load_from_string(floats.bf16(source))
    assert signature(brain.SerializeToString()) == signature(source)
    assert {t.data_type for t in brain.graph.initializer if t.name.startswith("w")} == {TensorProto.BFLOAT16}
    assert brain.opset_import[0].version == floats.BF16_OPSET
    exact, imitated = answers(source, inputs), answers(floats.emulated(source, "bf16"), inputs)
    assert 1e-5 < np.abs(exact - imitated).max() < 5e-2  # it rounds, and no more than that
    large = onnx.load_from_string(floats.bf16(network(scale=1e6)))
    weights = next(t for t in large.graph.initializer if t.name == "w1")
    assert np.abs(numpy_helper.to_array(weights).astype("float32")).max() > floats.FP16_MAX  # float16 would have clipped them


def test_int8_is_symmetric_repeatable_and_close(inputs: Any, tmp_path: Path) -> None:
    source = network()
    first = int8.int8(source, inputs, tmp_path)
    assert signature(first) == signature(source)
    assert first == int8.int8(source, inputs, tmp_path)
    assert lint(onnx.load_from_string(first)) == []
    assert evaluation.agreement(answers(first, inputs), answers(source, inputs)) > 0.95


def test_int8_leaves_front_and_convolution_branch_without_pairs(inputs: Any, tmp_path: Path) -> None:
    graph = onnx.load_from_string(int8.int8(network(), inputs, tmp_path)).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    by_type = {node.op_type: [makers.get(i, "") for i in node.input] for node in graph.node}
    assert sorted(by_type["Add"]) == ["Conv", "DequantizeLinear"]
    assert by_type["Sub"] == ["", ""]
    assert by_type["Mul"] == ["Sub", ""]


def test_onnxruntime_defaults_are_refused(inputs: Any, tmp_path: Path) -> None:
    """Must fail: what quantize_static writes by default is what TensorRT refuses."""
    from onnxruntime import quantization

    source = onnx.load_from_string(network())
    graph.named(source)
    quantization.quantize_static(source, str(tmp_path / "q.onnx"), calibration.Reader("input", inputs))
    problems = " ".join(lint(onnx.load(tmp_path / "q.onnx")))
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
    model = onnx.load_from_string(int8.int8(network(), inputs, tmp_path))
    damage(model.graph)
    assert problem in " ".join(lint(model))


def test_calibration_is_balanced_and_repeatable() -> None:
    keys = [f"k{i:03d}" for i in range(100)]
    labels = [0] * 90 + [1] * 10
    chosen = calibration.balanced(labels, keys, 40)
    assert sorted(chosen) == [*range(30), *range(90, 100)]  # class 1 has ten only; class 0 takes its turns
    order = np.random.default_rng(0).permutation(100)
    again = calibration.balanced([labels[i] for i in order], [keys[i] for i in order], 40)
    assert [keys[order[i]] for i in again] == [keys[i] for i in chosen]
    with pytest.raises(BadInput):
        calibration.balanced([], [], 4)


@pytest.mark.parametrize("method", calibration.OPTIONS)
@pytest.mark.parametrize("place", [0, 37, 270])
def test_every_sample_counts_wherever_it_comes(method: str, place: int, inputs: Any, tmp_path: Path) -> None:
    """A tool that keeps the last batch's ranges alone passes for place 270 and fails for the others."""
    inputs[place : place + 30] *= 50
    found = calibration.ranges(int8.prepared(network()), inputs, tmp_path, method=method, percentile=100.0, operators=["Conv"])
    scaled = found["scaled"]
    widest = np.abs(inputs).max() / RAW
    assert float(np.abs([scaled.lowest, scaled.highest]).max()) == pytest.approx(widest, rel=0.6 if method == "entropy" else 0.02)


def test_a_percentile_leaves_out_what_is_rare(inputs: Any, tmp_path: Path) -> None:
    inputs[0, 0, 0, 0] = 500 * RAW
    whole, most = (
        calibration.ranges(int8.prepared(network()), inputs, tmp_path, method="percentile", percentile=p, operators=["Conv"])["scaled"]
        for p in (100.0, 99.9)
    )
    assert float(whole.highest) > 490
    assert float(most.highest) < 5


BAD_SAMPLES: dict[str, tuple[Any, type[Exception], str]] = {
    "another resolution": (np.zeros((4, 1, 16, 16), "float32"), BadInput, r"\[4, 1, 16, 16\]; allowed: \[1 or more, 1, 8, 8\]"),
    "another number of channels": (np.zeros((4, 3, 8, 8), "float32"), BadInput, "allowed"),
    "none": (np.zeros((0, 1, 8, 8), "float32"), BadInput, "1 or more"),
    "one that isn't finite": (np.full((4, 1, 8, 8), np.inf, "float32"), Refused, "aren't finite"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_calibration_refuses(name: str, tmp_path: Path) -> None:
    samples, kind, message = BAD_SAMPLES[name]
    with pytest.raises(kind, match=message):
        int8.int8(network(), samples, tmp_path)
    with pytest.raises(BadInput, match="calibration method"):
        int8.int8(network(), np.zeros((4, 1, 8, 8), "float32"), tmp_path, method="mean")


def test_a_poisoned_calibration_set_shows_in_the_answers(inputs: Any, tmp_path: Path) -> None:
    """Must fail the gate: ranges of samples a thousand times larger leave the real ones a few steps of 255."""
    source = network()
    good, bad = (int8.int8(source, samples, tmp_path) for samples in (inputs, inputs * 1000))
    reference = answers(source, inputs)
    assert evaluation.agreement(answers(good, inputs), reference) > 0.95
    assert evaluation.agreement(answers(bad, inputs), reference) < 0.8


def search(inputs: Any, tmp_path: Path, judge: Callable[[bytes], tuple[bool, float]], tries: int = 4) -> mixed.Found:
    return mixed.search(network(), inputs, tmp_path, method="minmax", percentile=99.99, tries=tries, judge=judge)


def test_mixed_puts_the_worst_layers_back_until_the_judge_accepts(inputs: Any, tmp_path: Path) -> None:
    seen = []

    def judge(model: bytes) -> tuple[bool, float]:
        seen.append(model)
        return len(seen) == 3, float(len(seen))

    found = search(inputs, tmp_path, judge)
    worst = [layer.name for layer in found.ranking]
    assert [len(t.kept) for t in found.tries] == [0, 1, 2]
    assert found.best.kept == tuple(worst[:2])
    assert [layer.noise for layer in found.ranking] == sorted((layer.noise for layer in found.ranking), reverse=True)
    assert found.best.model == seen[-1]
    for one in found.tries:
        model = onnx.load_from_string(one.model)
        assert lint(model) == []
        assert TensorProto.FLOAT16 in {t.data_type for t in model.graph.initializer}
        makers = graph.makers(model.graph)
        plain = [n for n in model.graph.node if n.op_type in graph.WEIGHTED and makers.get(n.input[1]) is None]
        assert len(plain) == len([k for k in one.kept if "Add" not in k])
        assert evaluation.agreement(answers(one.model, inputs), answers(network(), inputs)) > 0.9


def test_mixed_takes_the_best_when_the_tries_end(inputs: Any, tmp_path: Path) -> None:
    scores = iter([0.5, float("nan"), 0.9, 0.7])
    found = search(inputs, tmp_path, lambda model: (False, next(scores)))
    assert [len(t.kept) for t in found.tries] == [0, 1, 2]  # four layers: putting all of them back is fp16
    assert found.best is found.tries[2]
    assert mixed.facts(found)["tries"][1]["score"] is None
    one = search(inputs, tmp_path, lambda model: (False, 0.1), tries=1)
    assert [t.kept for t in one.tries] == [()]


def test_the_ranking_finds_a_damaged_layer(inputs: Any, tmp_path: Path) -> None:
    """One weight a thousand times the others of its channel leaves those no steps."""
    model = onnx.load_from_string(network())
    weights = next(t for t in model.graph.initializer if t.name == "w2")
    array = numpy_helper.to_array(weights).copy()
    array[:, 0, 0, 0] *= 1000
    weights.CopyFrom(numpy_helper.from_array(array, "w2"))
    source = int8.prepared(model.SerializeToString())
    ranges = calibration.ranges(source, inputs, tmp_path, operators=int8.KINDS)
    ranked = mixed.rank(source, int8.quantized(source, ranges), inputs[:64], tmp_path)
    untouched = int8.prepared(network())
    ranges = calibration.ranges(untouched, inputs, tmp_path, operators=int8.KINDS)
    before = {layer.name: layer.noise for layer in mixed.rank(untouched, int8.quantized(untouched, ranges), inputs[:64], tmp_path)}
    assert "0004" in ranked[0].name
    assert ranked[0].noise > 1.5 * before[ranked[0].name]
