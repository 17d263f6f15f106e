"""Did the engine come out in the precision that was asked for? Real plans by TensorRT-RTX, and plans passed off as others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from unit.engine_nets import RESNET18, convolutions

from forja import engines
from forja.engines import Engine, precision_verdict, verdict
from forja.engines.weights import Weight, weights
from forja.lake import sha256

pytestmark = pytest.mark.ml

VARIANTS = ("fp32", "fp16", "int8")


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    return {name: convolutions(name, RESNET18) for name in VARIANTS}


@pytest.fixture(scope="module")
def built(models: dict[str, bytes]) -> dict[str, Engine]:
    """Engines of as many weights as ResNet-18 has."""
    return {n: engines.make(m, (3, 16, 16), batches=(1, 4, 8), capability="SM86", precision=n) for n, m in models.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_real_engines_are_what_was_asked_for(name: str, models: dict[str, bytes], built: dict[str, Engine]) -> None:
    found = precision_verdict(built[name].document, models[name])
    assert found.value == "proven"
    assert f"17 of 17 with weights compute in {name}" in found.reason
    assert "which no GPU has loaded" in found.reason
    assert "size: " in found.reason
    alone = precision_verdict({**built[name].document, "layers": None}, models[name])
    assert alone.value == "proven", "by its size alone"


FALSE = [(real, claimed) for real in VARIANTS for claimed in VARIANTS if real != claimed]


def passed_off(engine: Engine, model: bytes, precision: str) -> dict[str, Any]:
    """The document of an engine, changed to say that it was built from another file in another precision."""
    return {**engine.document, "onnx": sha256(model), "precision": precision}


@pytest.mark.parametrize(("real", "claimed"), FALSE)
def test_an_engine_passed_off_as_another_is_found_by_its_layers(
    real: str, claimed: str, models: dict[str, bytes], built: dict[str, Engine]
) -> None:
    document = passed_off(built[real], models[claimed], claimed) | {"bytes": built[claimed].document["bytes"]}
    found = precision_verdict(document, models[claimed])
    assert found.value == "wrong"
    assert "17 (conv0 in" in found.reason
    assert "of 17 with weights compute in another type than the file's" in found.reason
    assert "size" not in found.reason


@pytest.mark.parametrize(("real", "claimed"), FALSE)
def test_an_engine_passed_off_as_another_is_found_by_its_size(
    real: str, claimed: str, models: dict[str, bytes], built: dict[str, Engine]
) -> None:
    document = passed_off(built[real], models[claimed], claimed) | {"layers": None}
    found = precision_verdict(document, models[claimed])
    assert found.value == "wrong"
    assert found.reason.startswith("size: ")


def test_layers_that_lie_do_not_help_against_the_size(models: dict[str, bytes], built: dict[str, Engine]) -> None:
    document = passed_off(built["fp32"], models["fp16"], "fp16") | {"layers": built["fp16"].document["layers"]}
    assert precision_verdict(document, models["fp16"]).value == "wrong"


def test_a_float32_file_called_fp16_is_wrong_before_anything_is_built(models: dict[str, bytes], built: dict[str, Engine]) -> None:
    found = precision_verdict({**built["fp32"].document, "precision": "fp16"}, models["fp32"])
    assert found.value == "wrong"
    assert "the ONNX file isn't fp16: 17 (conv0, conv1, conv2, ...) of 17 layers" in found.reason


def test_another_file_than_the_engine_was_built_from(models: dict[str, bytes], built: dict[str, Engine]) -> None:
    found = precision_verdict(built["fp16"].document, models["int8"])
    assert (found.value, found.reason) == ("wrong", f"built from another ONNX file than this one: {sha256(models['fp16'])}")


SMALL = (3, 8, 8, 8)


def small(precision: str, **options: Any) -> tuple[dict[str, Any], bytes]:
    """Document and model of a network whose plan is mostly kernels."""
    model = convolutions(precision, SMALL, **options)
    return engines.make(model, (3, 16, 16), batches=(1, 4, 8), capability="SM86", precision=precision).document, model


def test_size_says_nothing_of_a_small_network_but_the_builder_does() -> None:
    document, model = small("fp16")
    assert precision_verdict(document, model).value == "proven"
    alone = precision_verdict({**document, "layers": None}, model)
    assert alone.value == "not measured"
    assert "mostly kernels" in alone.reason
    assert "nothing says in which types" in alone.reason


def test_a_small_float32_engine_is_told_apart_by_nothing_but_its_layers() -> None:
    document, model = small("fp32")
    assert precision_verdict(document, model).value == "proven"
    assert precision_verdict({**document, "layers": None}, model).value == "not measured"


def test_layers_that_the_file_keeps_in_float32_may_be() -> None:
    document, model = small("fp16", kept=[1])
    found = precision_verdict(document, model)
    assert found.value == "proven"
    assert "2 of 3 with weights compute in fp16" in found.reason


def test_one_layer_in_another_type_than_the_files_is_named() -> None:
    document, _ = small("fp16", kept=[1])
    whole = convolutions("fp16", SMALL)
    found = precision_verdict({**document, "onnx": sha256(whole)}, whole)
    assert found.value == "wrong"
    assert "1 (conv1 in fp32) of 3 with weights compute in another type than the file's" in found.reason


def test_nodes_without_names() -> None:
    document, model = small("fp16", names=False)
    assert precision_verdict(document, model).value == "proven"
    mixed = small("fp16", kept=[0], names=False)
    assert precision_verdict(*mixed).value == "proven"
    other, _ = small("fp32")
    assert precision_verdict({**other, "onnx": sha256(model), "precision": "fp16"}, model).value == "wrong"


def test_mixed_is_int8_with_the_files_exceptions() -> None:
    model = convolutions("int8", SMALL, kept=[0])
    document = engines.make(model, (3, 16, 16), batches=(1, 4, 8), capability="SM86", precision="mixed").document
    assert precision_verdict(document, model).value == "proven"


def test_without_weights_nothing_can_tell() -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["input"], ["out"])],
        "relu",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    found = precision_verdict({"precision": "fp16", "onnx": sha256(model), "layers": None, "bytes": 1}, model)
    assert found.value == "not measured"


def one(stored: str, millions: float = 10.0) -> list[Weight]:
    return [Weight(node="a", precision=stored, stored=stored, elements=int(millions * 1e6), tensor="w")]


SIZES: dict[str, tuple[list[Weight], float, str]] = {
    "fp16 that doesn't fit": (one("fp16"), 19.9, "wrong"),
    "fp16 with small kernels": (one("fp16"), 21, "proven"),
    "fp16 with kernels as large as half of the weights": (one("fp16"), 30.1, "not measured"),
    "fp16 as large as fp32": (one("fp16"), 40, "wrong"),
    "fp16 weights that two layers share": (one("fp16") * 2, 21, "proven"),
    "int8 as large as fp16": (one("int8"), 20, "wrong"),
    "int8 as large as fp16, few enough that kernels could fill it": (one("int8", 5), 10.1, "not measured"),
    "fp32 that doesn't fit": (one("fp32"), 39, "wrong"),
    "fp32 with small kernels": (one("fp32"), 41, "proven"),
    "fp32 with large kernels": (one("fp32"), 50, "not measured"),
    "fp32, few enough that kernels could be half": (one("fp32", 2), 8.5, "not measured"),
}
"""Weights, MB of the plan, and what that says."""


@pytest.mark.parametrize("name", SIZES)
def test_by_size(name: str) -> None:
    found, size, wanted = SIZES[name]
    assert verdict.by_size(found, int(size * 1e6)).value == wanted


def layers(*types_and_nodes: Any) -> dict[str, Any]:
    """Layers with weights: type, nodes, type, nodes and so on."""
    pairs = zip(types_and_nodes[::2], types_and_nodes[1::2], strict=True)
    return {"source": "inspector", "weighted": [{"name": "x", "precision": p, "nodes": nodes} for p, nodes in pairs]}


FOUND = [
    Weight(node="a", precision="fp16", stored="fp16", elements=100, tensor="wa"),
    Weight(node="b", precision="fp32", stored="fp32", elements=100, tensor="wb"),
    *(Weight(node=n, precision="fp16", stored="fp16", elements=100, tensor=f"w{n}") for n in "cd"),
]
LAYERS: dict[str, tuple[dict[str, Any] | None, str]] = {
    "the nodes' types": (layers("fp16", ["a"], "fp32", ["b"], "fp16", ["c"]), "proven"),
    "half of the layers": (layers("fp16", ["a"], "fp16", ["c"]), "proven"),
    "less than half of them": (layers("fp16", ["a"]), "not measured"),
    "another node's type": (layers("fp32", ["a"], "fp16", ["c"]), "wrong"),
    "narrower than the file": (layers("int8", ["a"], "fp16", ["c"]), "wrong"),
    "only what the file keeps": (layers("fp32", ["b"]), "wrong"),
    "types that aren't known": (layers("", ["a"], "", ["c"]), "not measured"),
    "a fusion of both": (layers("fp32", ["a", "b"], "fp16", ["c"]), "proven"),
    "a table that no layer multiplies with": (layers("fp16", ["a"], "fp16", ["c"], "fp32", ["t"]), "proven"),
    "no layers with weights": (layers(), "not measured"),
    "nothing": (None, "not measured"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_by_layers(name: str) -> None:
    given, wanted = LAYERS[name]
    found = verdict.by_layers("fp16", FOUND, given)
    assert found.value == wanted
    assert "no GPU" not in found.reason, "the inspector's engine was loaded"


ASKED: dict[str, tuple[str, list[Weight], str]] = {
    "float32 with one layer in float16": ("fp32", FOUND, "wrong"),
    "float16 with one layer in float32": ("fp16", FOUND, "not measured"),
    "int8 without any": ("int8", FOUND, "wrong"),
    "mixed without any int8": ("mixed", FOUND, "wrong"),
    "mixed with some": ("mixed", [*FOUND, *one("int8")], "not measured"),
}
"""Precision, weights of the file, and what they say."""


@pytest.mark.parametrize("name", ASKED)
def test_by_file(name: str) -> None:
    asked, found, wanted = ASKED[name]
    assert verdict.by_file(asked, found).value == wanted


def quantised_weights_alone() -> bytes:
    """MatMul whose weights, on its left, are int8 behind a Transpose, while its activation is float16."""
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["wd"]),
            helper.make_node("Transpose", ["wd"], ["wt"], perm=[1, 0]),
            helper.make_node("MatMul", ["wt", "input"], ["out"], name="left"),
            helper.make_node("MatMul", ["input", "out"], ["other"], name="of activations"),
        ],
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT16, [4, 4])],
        [helper.make_tensor_value_info("other", TensorProto.FLOAT16, [4, 4])],
        [
            numpy_helper.from_array(np.ones((4, 4), np.int8), "w"), numpy_helper.from_array(np.float16(1), "scale"),
            numpy_helper.from_array(np.int8(0), "zero"),
        ],
    )  # fmt: skip
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString())


def constant_node() -> bytes:
    """Gemm with float32 weights in a Constant node, read in float16 behind a Cast and an Identity."""
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones((4, 3), np.float32))),
            helper.make_node("Identity", ["c"], ["same"]),
            helper.make_node("Cast", ["same"], ["half"], to=TensorProto.FLOAT16),
            helper.make_node("Gemm", ["input", "half"], ["out"], name="gemm"),
        ],
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT16, ["n", 4])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT16, ["n", 3])],
    )
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())


FILES: dict[str, tuple[Callable[[], bytes], list[Weight]]] = {
    "fp32": (lambda: convolutions("fp32", (3, 8)), [Weight(node="conv0", precision="fp32", stored="fp32", elements=216, tensor="w0")]),
    "fp16": (lambda: convolutions("fp16", (3, 8)), [Weight(node="conv0", precision="fp16", stored="fp16", elements=216, tensor="w0")]),
    "int8 of float32 weights": (
        lambda: convolutions("int8", (3, 8)),
        [Weight(node="conv0", precision="int8", stored="int8", elements=216, tensor="w0")],
    ),
    "weights alone in int8": (quantised_weights_alone, [Weight(node="left", precision="fp16", stored="int8", elements=16, tensor="w")]),
    "a constant's node and a cast": (constant_node, [Weight(node="gemm", precision="fp16", stored="fp16", elements=12, tensor="c")]),
}


@pytest.mark.parametrize("name", FILES)
def test_weights_of_a_file(name: str) -> None:
    make, wanted = FILES[name]
    assert weights(make()) == wanted
