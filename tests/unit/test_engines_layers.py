"""Layers of engines as TensorRT 10, TensorRT 11 and TensorRT-RTX write them.

Where the forms come from. REPORT was logged by TensorRT-RTX 1.7.1.116 while it built the float16 variant of the recipe digits, cut to
four layers. ELEVEN has the same fields as JSON; that TensorRT 11 writes ``I/O Tensors`` and splits ``Format/Datatype`` is on NVIDIA's
page "Migrating IEngineInspector Usage from TensorRT 10.x to 11.x". TEN has the fields of NVIDIA's developer guide for TensorRT 10
(section "Engine Inspector": ``Weights`` of a CaskConvolution) and, for generated kernels, of Torch-TensorRT's page on mixed precision
(constants among the inputs). No GPU was here to write them anew.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from forja.engines import inspect
from forja.engines.inspect import Layer
from forja.errors import BadInput

LINEAR = "Format: (Linear) Row major linear format"
NHWC = "Format: (NHWC) Channel major format"
REPORT = "\n".join(
    [
        "Layers:",
        "Name: __mye548_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: ",
        "Name: __myl_AddCastMulReplConc_myl0_1, LayerType: kgen, Inputs: [ { Name: input, Dimensions: [-1,1,8,8], Strides: [64,64,8,1], "
        f"StrideOrder: [3,2,1,0], Datatype: Float, {LINEAR} }}], Constants: [ {{ Name: __mye1210_dconst_myl0, Dimensions: [1,1,1,1], "
        f"Strides: [1,1,1,1], StrideOrder: [3,2,1,0], Datatype: Half, {LINEAR} }}], Outputs: [ {{ Name: /stem/Relu_output_0.1_9_myl0, "
        f"Dimensions: [-1,2,8,8], Strides: [128,1,16,2], StrideOrder: [3,0,2,1], Datatype: Half, {NHWC} }}], TacticName: "
        "__myl_AddCastMulReplConc_0x8f5fdba6429f12dde5eb702aface8eeb, StreamId: 0, "
        "Metadata: [ONNX Layer: 0006_/normalize/Mul]\x1f[ONNX Layer: 0007_/stem/Conv]",
        "Name: 0007_/stem/Conv_myl0_2, LayerType: correlation, Inputs: [ { Name: /stem/Relu_output_0.1_9_myl0, Dimensions: [-1,2,8,8], "
        f"Strides: [128,1,16,2], StrideOrder: [3,0,2,1], Datatype: Half, {NHWC} }}], Constants: [ {{ Name: __mye1729_dconst_myl0, "
        f"Dimensions: [32,2,3,3], Strides: [18,1,6,2], StrideOrder: [3,0,2,1], Datatype: Half, {NHWC} }}, {{ Name: __mye2223_const_myl0, "
        f"Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, {LINEAR} }}, {{ Name: __mye1454dconst_myl0, Dimensions: "
        f"[1,32,1,1], Strides: [32,1,32,32], StrideOrder: [3,0,2,1], Datatype: Half, {NHWC} }}], Outputs: [ {{ Name: "
        f"/blocks.0/Relu_output_0.1_10_myl0, Dimensions: [-1,32,8,8], Strides: [2048,1,256,32], StrideOrder: [3,0,2,1], Datatype: Half, "
        f"{NHWC} }}], TacticName: __myelin_CASK_STUB, StreamId: 0, "
        "Metadata: [ONNX Layer: 0007_/stem/Conv]\x1f[ONNX Layer: 0008_/stem/Relu]",
        "Name: __mye1_myl0_3, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, EventId: 1, Metadata: ",
        "",
        "I/O Tensors:",
        " Name: input, IOMode: Input, DataType: Float, Dimensions: [-1,1,8,8], Location: Device, IsShapeInferenceIO: false, "
        "ProfileInfo: [ { MinShape: [1,1,8,8], OptShape: [8,1,8,8], MaxShape: [32,1,8,8], "
        "Format: Row major linear FP32 format (kLINEAR) }]",
        "",
        "Engine Metadata:",
        " Multi-Device: Disabled",
    ]
)


def tensor(name: str, size: list[int], datatype: str) -> dict[str, Any]:
    """A tensor as TensorRT 11 writes it."""
    return {"Name": name, "Dimensions": size, "Strides": size, "StrideOrder": [0], "Datatype": datatype, "Format": "(Linear) Row major"}


ELEVEN = {
    "Layers": [
        {"Name": "wait0", "LayerType": "wait", "Inputs": [], "Constants": [], "Outputs": [], "StreamId": 0, "Metadata": ""},
        {
            "Name": "quantise", "LayerType": "kgen", "Inputs": [tensor("input", [-1, 1, 8, 8], "Float")],
            "Constants": [tensor("mean", [1, 1, 8, 8], "Float")], "Outputs": [tensor("q", [-1, 4, 8, 8], "Int8")],
            "Metadata": "[ONNX Layer: sub]\x1f[ONNX Layer: conv1]",
        },
        {
            "Name": "conv1_myl0_2", "LayerType": "correlation",
            "Inputs": [tensor("q", [-1, 4, 8, 8], "Int8"), tensor("r", [-1, 8, 8, 8], "Float")],
            "Constants": [tensor("w", [8, 4, 3, 3], "Int8"), tensor("scale", [1, 8, 1, 1], "Float")],
            "Outputs": [tensor("c", [-1, 8, 8, 8], "Float")], "Metadata": "[ONNX Layer: conv1]\x1e[ONNX Layer: relu]",
        },
        {
            "Name": "gather", "LayerType": "kgen", "Inputs": [tensor("indices", [3], "Int64")], "Constants": [],
            "Outputs": [tensor("g", [3], "Int32")], "Metadata": "",
        },
    ],
    "I/O Tensors": [{"Name": "input", "IOMode": "Input", "DataType": "Float", "Dimensions": [-1, 1, 8, 8], "Location": "Device"}],
    "Engine Metadata": {"Multi-Device": "Disabled"},
}  # fmt: skip


def old(name: str, size: list[int], text: str) -> dict[str, Any]:
    """A tensor as TensorRT 10 writes it."""
    return {"Name": name, "Location": "Device", "Dimensions": size, "Format/Datatype": text}


TEN = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to conv1", "LayerType": "Reformat",
            "Inputs": [old("input", [8, 3, 8, 8], "Row major linear FP32")],
            "Outputs": [old("copy", [8, 3, 8, 8], "Channel major FP16 format where channel % 4 == 0")],
            "ParameterType": "Reformat", "Origin": "REFORMAT", "TacticValue": "0x0", "StreamId": 0, "Metadata": "",
        },
        {
            "Name": "conv1 + relu1", "LayerType": "CaskConvolution",
            "Inputs": [old("copy", [8, 3, 8, 8], "Thirty-two wide channel vectorized row major Int8 format.")],
            "Outputs": [old("a", [8, 64, 8, 8], "Thirty-two wide channel vectorized row major Int8 format.")],
            "ParameterType": "Convolution", "Kernel": [3, 3], "Weights": {"Type": "Int8", "Count": 1728},
            "Bias": {"Type": "Float", "Count": 64}, "HasReLU": 1, "Metadata": "[ONNX Layer: conv1]\x1e[ONNX Layer: relu1]",
        },
        {
            "Name": "__myl_MulSum_myl0_0", "LayerType": "kgen",
            "Inputs": [old("__mye116_dconst", [64, 10], "Half"), old("pooled", [8, 64], "Half"), old("fc_constantHalf", [1, 10], "Half")],
            "Outputs": [old("logits", [8, 10], "Half")], "TacticName": "__myl_MulSum_0x1", "StreamId": 0, "Metadata": "",
        },
        {
            "Name": "pool", "LayerType": "CaskPooling", "Inputs": [old("a", [-1, 64, 8, 8], "N/A due to dynamic shapes")],
            "Outputs": [old("pooled", [-1, 64], "N/A due to dynamic shapes")], "ParameterType": "Pooling", "Metadata": "",
        },
    ],
    "Bindings": ["input", "logits"],
}  # fmt: skip


def only(kind: str, inputs: list[dict[str, Any]], constants: list[dict[str, Any]]) -> list[Layer]:
    """What is read of an engine of one layer."""
    return inspect.from_json(json.dumps({"Layers": [{"Name": "it", "LayerType": kind, "Inputs": inputs, "Constants": constants}]}))


FORMS: dict[str, tuple[list[Layer], list[Layer]]] = {
    "TensorRT-RTX's report": (
        inspect.from_report(REPORT),
        [
            Layer(
                name="__myl_AddCastMulReplConc_myl0_1", precision="fp32", weighted=False, nodes=("0006_/normalize/Mul", "0007_/stem/Conv")
            ),
            Layer(name="0007_/stem/Conv_myl0_2", precision="fp16", weighted=True, nodes=("0007_/stem/Conv", "0008_/stem/Relu")),
        ],
    ),
    "JSON of TensorRT 11": (
        inspect.from_json(json.dumps(ELEVEN)),
        [
            Layer(name="quantise", precision="fp32", weighted=False, nodes=("sub", "conv1")),
            Layer(name="conv1_myl0_2", precision="int8", weighted=True, nodes=("conv1", "relu")),
            Layer(name="gather", precision="int64", weighted=False),
        ],
    ),
    "JSON of TensorRT 10": (
        inspect.from_json(json.dumps(TEN)),
        [
            Layer(name="Reformatting CopyNode for Input Tensor 0 to conv1", precision="fp32", weighted=False),
            Layer(name="conv1 + relu1", precision="int8", weighted=True, nodes=("conv1", "relu1")),
            Layer(name="__myl_MulSum_myl0_0", precision="fp16", weighted=True),
            Layer(name="pool", precision="", weighted=False),
        ],
    ),
    "JSON with bare control characters between names": (
        inspect.from_json(json.dumps(ELEVEN).replace("\\u001f", "\x1f").replace("\\u001e", "\x1e"))[1:2],
        [Layer(name="conv1_myl0_2", precision="int8", weighted=True, nodes=("conv1", "relu"))],
    ),
    "a report of TensorRT 10, whose names are parted by another character": (
        inspect.from_report(
            "Layers:\nName: {ForeignNode[a + b...c]}, LayerType: gemm, Inputs: [ { Name: x, Location: Device, Dimensions: [1,40], "
            "Format/Datatype: Half }], Outputs: [ { Name: y, Dimensions: [1,8], Format/Datatype: Half }], "
            "Weights: { Type: Half, Count: 320 }, StreamId: 0, Metadata: [ONNX Layer: fc]\x1e[ONNX Layer: relu]"
        ),
        [Layer(name="{ForeignNode[a + b...c]}", precision="fp16", weighted=True, nodes=("fc", "relu"))],
    ),
    "weights narrower than what they are multiplied with": (
        only("gemm", [tensor("x", [8, 64], "Half")], [tensor("w", [64, 8], "Int8")]),
        [Layer(name="it", precision="fp16", weighted=True)],
    ),
    "weights wider than what they are multiplied with": (
        only("gemm", [tensor("x", [8, 64], "Int8")], [tensor("w", [64, 8], "Half")]),
        [Layer(name="it", precision="fp16", weighted=True)],
    ),
    "scales of channels, which are no weights": (
        only("maxpool", [tensor("x", [8, 64, 4, 4], "Int8")], [tensor("scale", [1, 64, 1, 1], "Float"), tensor("bias", [64], "Float")]),
        [Layer(name="it", precision="int8", weighted=False)],
    ),
    "an input whose type isn't known": (
        only("sum", [tensor("x", [8, 64], "Half"), tensor("y", [8, 64], "N/A due to dynamic shapes")], []),
        [Layer(name="it", precision="", weighted=False)],
    ),
    "an engine without detailed profiling": (inspect.from_json('{"Layers": ["conv1 + relu1", "pool"], "Bindings": []}'), []),
    "a builder that reports nothing": (inspect.from_report(""), []),
}


@pytest.mark.parametrize("name", FORMS)
def test_layers(name: str) -> None:
    found, wanted = FORMS[name]
    assert found == wanted


@pytest.mark.parametrize("text", ["", "Layers:", "[]", "{}", "null"])
def test_what_is_no_json_of_an_inspector(text: str) -> None:
    with pytest.raises(BadInput, match="inspector"):
        inspect.from_json(text)


def test_summary_counts_by_type_and_names_what_is_float32() -> None:
    assert inspect.summary(FORMS["JSON of TensorRT 10"][0], "inspector") == {
        "source": "inspector",
        "layers": {"fp16": 1, "fp32": 1, "int8": 1, "unknown": 1},
        "fp32": ["Reformatting CopyNode for Input Tensor 0 to conv1"],
        "weighted": [
            {"name": "conv1 + relu1", "precision": "int8", "nodes": ["conv1", "relu1"]},
            {"name": "__myl_MulSum_myl0_0", "precision": "fp16", "nodes": []},
        ],
    }


WORDS = {
    "Float": "fp32", "Row major linear FP32": "fp32", "Half": "fp16", "Two wide channel vectorized row major FP16 format": "fp16",
    "BFloat16": "bf16", "BF16": "bf16", "Int8": "int8", "Thirty-two wide channel vectorized row major Int8 format.": "int8", "FP8": "fp8",
    "Int32": "int32", "Int64": "int64", "Bool": "bool", "UInt8": "uint8", "Int4": "int4", "N/A due to dynamic shapes": "", "": "",
}  # fmt: skip


@pytest.mark.parametrize("text", WORDS)
def test_words_for_types(text: str) -> None:
    assert inspect._named(text) == WORDS[text]
