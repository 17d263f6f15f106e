"""Precision of each layer of an engine, from what TensorRT says about it.

Two sources say the same things: the inspector of an engine that was loaded (JSON), and the builder's own report of the engine that it
made, which needs no GPU (text, ``log.keeper``). TensorRT 10 names a tensor's type in ``Format/Datatype`` and counts constants among
the inputs; TensorRT 11 and TensorRT-RTX 1.7 have ``Datatype`` beside ``Format``, and ``Constants`` apart.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from forja.errors import BadInput

TYPES = {
    "fp32": ("float", "float32", "fp32"),
    "fp16": ("half", "float16", "fp16"),
    "bf16": ("bfloat16", "bf16"),
    "fp8": ("fp8",),
    "int8": ("int8",),
    "fp4": ("fp4",),
    "int4": ("int4",),
    "int64": ("int64",),
    "int32": ("int32",),
    "uint8": ("uint8",),
    "bool": ("bool",),
}
"""TensorRT's words for each type, in small letters."""
WIDTH = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "fp4": 4, "int4": 4}
"""Bits of the types that layers compute in; the others are for shapes and indices."""

WORDS = {word: name for name, words in TYPES.items() for word in words}
CONSTANT = re.compile(r"const(ant)?(float|half|bfloat16|int8|fp8)?(_myl\d*)?$", re.IGNORECASE)
"""Ending of the name of a constant that TensorRT 10 counts among the inputs."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of an engine that computes something."""

    name: str
    """As TensorRT calls it."""
    precision: str
    """Type it computes in: one of TYPES, or empty where TensorRT doesn't say."""
    weighted: bool
    """Whether it multiplies with constant weights."""
    nodes: tuple[str, ...] = ()
    """Names of the ONNX nodes that went into it."""


def information(trt: ModuleType, engine: Any, shape: Sequence[int]) -> str:
    """The inspector's JSON about a loaded engine with one input, at this input shape.

    Without a shape TensorRT 10 says "N/A due to dynamic shapes" instead of types.
    """
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    for name in names:
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            context.set_input_shape(name, tuple(shape))
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def from_json(text: str) -> list[Layer]:
    """Layers in the inspector's JSON, of TensorRT 10 or 11; empty for an engine that was built without detailed profiling.

    Raises:
        BadInput: this is no JSON of an inspector.
    """
    try:
        found = json.loads(text, strict=False)["Layers"]  # names of ONNX nodes are parted by control characters
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput("inspector: not JSON with Layers", value=text[:80]) from error
    return [layer for item in found if isinstance(item, dict) and (layer := _layer(item)) is not None]


def from_report(text: str) -> list[Layer]:
    """Layers in the report that the builder logs, of TensorRT 10, 11 or TensorRT-RTX; empty for an empty text."""
    # Not splitlines: it takes the control characters between names of ONNX nodes for ends of lines.
    return [layer for line in text.split("\n") if (item := _parsed(line)) is not None and (layer := _layer(item)) is not None]


LINE = re.compile(
    r"Name: (?P<Name>.*?), LayerType: (?P<LayerType>[^,]*), Inputs: \[(?P<Inputs>.*?)\]"
    r"(?:, Constants: \[(?P<Constants>.*?)\])?, Outputs: \[(?P<rest>.*)"
)
TENSOR = re.compile(
    r"\{ Name: (?P<Name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<Dimensions>[-\d,]*)\].*?\b[Dd]ata[Tt]ype: (?P<Datatype>[^,}]*)"
)


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of the report in the form of the JSON, None for one that isn't about a layer."""
    found = LINE.match(line)
    if found is None:
        return None
    item: dict[str, Any] = {"Name": found["Name"], "LayerType": found["LayerType"]}
    for key in ("Inputs", "Constants"):
        if found[key] is not None:
            item[key] = [
                {**t.groupdict(), "Dimensions": [int(x) for x in t["Dimensions"].split(",") if x]} for t in TENSOR.finditer(found[key])
            ]
    if weights := re.search(r"Weights: \{\s*Type: (\w+)", found["rest"]):
        item["Weights"] = {"Type": weights[1]}
    item["Metadata"] = found["rest"].rpartition("Metadata: ")[2]
    return item


def _layer(item: dict[str, Any]) -> Layer | None:
    """A layer from its JSON; None for one that moves no data: signals, waits, constants."""
    tensors = [t for t in item.get("Inputs", []) if isinstance(t, dict)]
    constants = [t for t in item.get("Constants", []) if isinstance(t, dict)]
    if "Constants" not in item:
        constants = [t for t in tensors if CONSTANT.search(str(t.get("Name", "")))]
        tensors = [t for t in tensors if t not in constants]
    if not tensors:
        return None
    weights = _weights(item, constants)
    # Beside the first input a layer with weights may read the sum that it is fused with, in another type.
    read = [_type(t) for t in (tensors[:1] if weights is not None else tensors)]
    return Layer(
        name=str(item.get("Name", "")),
        precision=_widest([*read, *([] if weights is None else [weights])]),
        weighted=weights is not None,
        nodes=tuple(dict.fromkeys(re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(item.get("Metadata", ""))))),
    )


def _weights(item: dict[str, Any], constants: list[dict[str, Any]]) -> str | None:
    """Type of the weights, None without any.

    Biases, scales and means of channels have one dimension above 1. In a generated kernel (``kgen``) a constant whose first dimension
    is 1 is added to each sample or multiplied with it, whatever its other dimensions: the mean of an image.
    """
    stated = item.get("Weights")
    if isinstance(stated, dict) and "Type" in stated:
        return _named(str(stated["Type"]))
    for tensor in constants:
        size = tensor.get("Dimensions", [])
        if sum(d > 1 for d in size) > 1 and not (item.get("LayerType") == "kgen" and size[0] == 1):
            return _type(tensor)
    return None


def _type(tensor: dict[str, Any]) -> str:
    return _named(next((str(tensor[k]) for k in ("Datatype", "DataType", "Format/Datatype") if k in tensor), ""))


def _named(text: str) -> str:
    """Type that a text names, for example "Row major linear FP32" or "Half"; empty for none."""
    return next((WORDS[w] for w in re.findall(r"[a-z]+\d*", text.lower()) if w in WORDS), "")


def _widest(types: list[str]) -> str:
    """The widest type to compute in, or the first of the others; empty when one isn't known."""
    if not all(types):
        return ""
    computing = [t for t in types if t in WIDTH]
    return max(computing, key=lambda t: WIDTH[t]) if computing else types[0]


def summary(layers: Sequence[Layer], source: str) -> dict[str, Any]:
    """What engine.json says of the layers.

    Args:
        layers: of one engine.
        source: who says so: ``inspector``, or ``builder`` for an engine that no GPU has loaded.

    Returns:
        ``source``; ``layers``: how many compute in each type; ``fp32``: names of those in float32; ``weighted``: those with weights,
        each with its ``name``, ``precision`` and the ONNX ``nodes`` in it.
    """
    return {
        "source": source,
        "layers": dict(sorted(Counter(layer.precision or "unknown" for layer in layers).items())),
        "fp32": [layer.name for layer in layers if layer.precision == "fp32"],
        "weighted": [{"name": x.name, "precision": x.precision, "nodes": list(x.nodes)} for x in layers if x.weighted],
    }
