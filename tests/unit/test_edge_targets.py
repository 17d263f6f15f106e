"""The catalogue, and which variant a target gets."""

from __future__ import annotations

import configparser
import dataclasses
from typing import Any

import pytest
from unit.edge_parts import DATASET, content

from forja.edge import bundle, choice, deepstream, targets
from forja.edge.targets import TARGETS
from forja.errors import BadInput, Refused
from forja.recipes.base import CAPABILITIES, VARIANTS, Images


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_is_whole(name: str) -> None:
    target = TARGETS[name]
    assert target.name == name
    assert target.title
    assert target.precisions
    assert set(target.precisions) <= set(VARIANTS)
    assert 9 <= target.opset <= 25
    assert target.max_batch >= 1
    assert (target.runtime == "onnxruntime") == (target.tensorrt == ("", "")) == (target.compute_capability == "")
    assert target.runtime != "tensorrt-rtx" or target.compute_capability in CAPABILITIES, "TensorRT-RTX builds ahead of time for these"
    assert target.runtime != "tensorrt" or target.models
    assert target.nvpmodel is None or target.modes
    for variant in target.precisions:
        assert targets.carried(target, variant) in ("fp32", variant)
        assert isinstance(targets.flags(target, variant), tuple)


def test_int8_is_asked_for_by_name() -> None:
    assert [n for n, t in TARGETS.items() if "int8" in t.precisions] == [n for n in TARGETS if n.endswith("-int8")]


def test_the_nano_reads_what_it_can() -> None:
    nano = TARGETS["jetson-nano"]
    assert (nano.opset, nano.ir, nano.python, nano.tensorrt[0]) == (13, 7, (3, 6), "8.2")
    assert nano.precisions == ("fp16", "fp32")
    assert targets.carried(nano, "fp16") == "fp32", "TensorRT 8.2 takes float16 from a flag, not from the file"
    assert targets.carried(TARGETS["thor"], "fp16") == "fp16"


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(BadInput, match=r"'toaster'.*jetson-nano"):
        targets.find("toaster")


def verdict(*, chosen: str | None = "fp32", **passed: bool | None) -> dict[str, Any]:
    """A gate's verdict.json: True passed, False failed a rule, None was made and not judged."""
    verdicts = [{"variant": v, "metric": "accuracy", "rule": "least", "passed": ok} for v, ok in passed.items() if ok is not None]
    return {"chosen": chosen, "reason": "because", "verdicts": verdicts, "models": {v: "0" * 64 for v in passed}}


CHOICES: dict[str, tuple[str, dict[str, Any], list[str] | str]] = {
    "the best that passed": ("jetson-nano", verdict(fp32=True, fp16=True, int8=True), ["fp16", "fp32"]),
    "the best failed": ("jetson-nano", verdict(fp32=True, fp16=False, int8=True), ["fp32"]),
    "int8 on a target of its own": ("orin-int8", verdict(fp32=True, fp16=True, int8=True), ["int8"]),
    "mixed where int8 failed": ("thor-int8", verdict(fp32=True, int8=False, mixed=True), ["mixed"]),
    "int8 refused": ("orin-int8", verdict(fp32=True, fp16=True, int8=False), "orin-int8: it runs int8.*int8 failed accuracy"),
    "never made": ("orin-int8", verdict(fp32=True, fp16=True), "int8 was not made"),
    "made and not judged": ("orin-int8", verdict(fp32=True, int8=None), "orin-int8: it runs int8"),
    "a weakly typed target doesn't get mixed": ("orin-int8", verdict(fp32=True, mixed=True), "orin-int8: it runs int8"),
    "the gate refused the model": ("cpu", verdict(chosen=None, fp32=True), "gate chose no variant.*because"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_choice(case: str) -> None:
    name, found, wanted = CHOICES[case]
    if isinstance(wanted, list):
        assert choice.candidates(TARGETS[name], found, "gate") == wanted
        return
    with pytest.raises(Refused, match=wanted):
        choice.candidates(TARGETS[name], found, "gate")


def test_one_failed_rule_of_many_is_a_failure() -> None:
    found = verdict(fp32=True, fp16=True)
    found["verdicts"].append({"variant": "fp16", "metric": "agreement", "rule": "least", "passed": False})
    assert choice.passing(found) == ["fp32"]


# DeepStream's "Gst-nvinfer File Configuration Specifications", group [property].
NVINFER = {
    "gpu-id", "gie-unique-id", "process-mode", "network-type", "network-mode", "model-engine-file", "labelfile-path", "batch-size",
    "infer-dims", "network-input-order", "model-color-format", "net-scale-factor", "offsets", "maintain-aspect-ratio", "output-blob-names",
    "classifier-threshold", "interval",
}  # fmt: skip
COLOURS = Images(height=24, width=32, channels=3, classes=("a b", "c"))


@pytest.mark.parametrize(("dataset", "colour", "offsets", "dims"), [(DATASET, "2", "0", "1;2;2"), (COLOURS, "0", "0;0;0", "3;24;32")])
def test_nvinfer_leaves_the_pixels_alone(dataset: Images, colour: str, offsets: str, dims: str) -> None:
    files = deepstream.files(TARGETS["orin"], dataset, "fp16", 8)
    parser = configparser.ConfigParser()
    parser.read_string(files[deepstream.CONFIG].decode())
    found = dict(parser["property"])
    assert set(found) == NVINFER
    assert (found["net-scale-factor"], found["offsets"]) == ("1.0", offsets)
    assert (found["model-color-format"], found["infer-dims"], found["network-input-order"]) == (colour, dims, "0")
    assert (found["network-type"], found["network-mode"], found["output-blob-names"]) == ("1", "2", "probabilities")
    assert "onnx-file" not in found, "it would build an engine that nobody verified"
    assert files[deepstream.LABELS] == (";".join(dataset.classes) + "\n").encode(), "one line: the labels of one output layer"


def test_a_label_that_deepstream_would_cut_is_refused() -> None:
    with pytest.raises(BadInput, match="a;b"):
        deepstream.files(TARGETS["orin"], dataclasses.replace(DATASET, classes=("a;b", "c")), "fp16", 8)


@pytest.mark.parametrize("name", ["a ", " a", "a\nb", ""])
def test_a_class_that_is_no_line_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="one line each"):
        bundle.files(content(dataset=dataclasses.replace(DATASET, classes=(name, "c", "d"))), b"")
