"""Engines by TensorRT-RTX on this host, and what is said when none can be built or tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from forja import engines
from forja.errors import BadInput, ForjaError, Refused

pytestmark = pytest.mark.ml


def model(operator: str = "Relu", inputs: int = 1) -> bytes:
    """Linear layer of four features and an operator, three outputs."""
    names = [f"input{i}" if i else "input" for i in range(inputs)]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "w"], ["h"]), helper.make_node(operator, ["h"], ["out"])],
        "layer",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in names],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.ones((4, 3), "float32"), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def test_builds_without_a_gpu_and_claims_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "DRIVER", Path("/nonexistent"))
    engine = engines.make(model(), (4,), max_batch=8, capability="SM86")
    assert len(engine.plan) > 1000
    assert engine.facts["backend"] == "tensorrt-rtx"
    assert engine.facts["compute_capability"] == "SM86"
    assert (engine.facts["deserialised"], engine.facts["latency_ms"]) == ("not measured", None)


CASES: dict[str, tuple[dict[str, Any], type[ForjaError], str]] = {
    "an operator that the parser doesn't know": ({"model": model("NoSuchOperator")}, BadInput, "NoSuchOperator"),
    "no ONNX at all": ({"model": b"not onnx"}, BadInput, "ONNX model"),
    "two inputs": ({"model": model(inputs=2)}, BadInput, "inputs: got 2"),
    "a GPU generation that it can't build for": ({"capability": "SM53"}, BadInput, "SM86"),
    "another input shape than the model's": ({"shape": (5,)}, Refused, "profile"),
}


@pytest.mark.parametrize("name", CASES)
def test_refuses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "DRIVER", Path("/nonexistent"))
    arguments, kind, text = CASES[name]
    arguments = {"model": model(), "shape": (4,), "capability": "SM86", **arguments}
    with pytest.raises(kind, match=text):
        engines.make(arguments.pop("model"), arguments.pop("shape"), max_batch=8, **arguments)


def test_tensorrt_needs_driver_and_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engines, "DRIVER", tmp_path)
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert engines.backend() is engines.TENSORRT_RTX
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: object())
    assert engines.backend() is engines.TENSORRT
    monkeypatch.setattr(engines, "DRIVER", tmp_path / "none")
    assert engines.backend() is engines.TENSORRT_RTX


OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U16)\nGCC version:  gcc 12.3.0\n"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"


def host(folder: Path, monkeypatch: pytest.MonkeyPatch, driver: str, smi: str = "") -> str:
    """Signature of a host with this driver, whose nvidia-smi is this shell script; empty for none."""
    (folder / "version").write_text(driver)
    monkeypatch.setattr(engines, "DRIVER", folder / "version")
    tool = folder / "nvidia-smi"
    tool.unlink(missing_ok=True)
    if smi:
        tool.write_text(f"#!/bin/sh\n{smi}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin")
    return engines.signature()


def test_signature_names_driver_gpu_and_builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert host(tmp_path, monkeypatch, OPEN, "echo 9.0; echo 9.0") == "driver 570.86.15, compute capability 9.0, " + engines._library()
    assert host(tmp_path, monkeypatch, CLOSED, "echo 8.6; echo 8.0").startswith("driver 550.54.15, compute capability 8.0+8.6, ")
    assert engines._library().startswith("tensorrt-rtx-cu12 1.")
    for broken in ("", "echo no devices were found; exit 6"):
        assert "compute capability unknown" in host(tmp_path, monkeypatch, OPEN, broken)


def test_signature_is_empty_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engines, "DRIVER", tmp_path / "none")
    assert engines.signature() == ""
