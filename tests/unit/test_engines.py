"""Engines by TensorRT-RTX on this host, and what is said when none can be built or tried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from forja import engines
from forja.engines import build, describe, host, latency
from forja.engines.host import Host
from forja.errors import BadInput, ForjaError, Refused, Unavailable
from forja.lake import sha256

pytestmark = pytest.mark.ml


def model(operator: str = "Relu", inputs: int = 1) -> bytes:
    """Linear layer of four features and an operator, three outputs."""
    names = [f"input{i}" if i else "input" for i in range(inputs)]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "w"], ["h"], name="product"), helper.make_node(operator, ["h"], ["out"])],
        "layer",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in names],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.ones((4, 3), "float32"), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "DRIVER", Path("/nonexistent"))


def make(**changes: Any) -> engines.Engine:
    arguments: dict[str, Any] = {
        "model": model(), "shape": (4,), "batches": (1, 4, 8), "capability": "SM86", "precision": "fp32", **changes,
    }  # fmt: skip
    return engines.make(arguments.pop("model"), arguments.pop("shape"), **arguments)


@pytest.mark.usefixtures("no_gpu")
def test_builds_without_a_gpu_and_claims_nothing_more() -> None:
    engine = make(cache=b"times of another library")
    assert len(engine.plan) > 1000
    assert engine.cache is None, "TensorRT-RTX keeps no times"
    facts = engine.facts
    assert (facts["backend"], facts["compute_capability"]) == ("tensorrt-rtx", "SM86")
    assert (facts["deserialised"], facts["latency_ms"]) == ("not measured", None)
    assert set(facts["speed"].values()) == {None}
    assert "no NVIDIA driver" in facts["reason"]
    json.dumps(facts)


@pytest.mark.usefixtures("no_gpu")
def test_the_document_says_what_was_built_from_what() -> None:
    engine = make()
    found = describe.parse(json.dumps(engine.document).encode())
    assert (found["onnx"], found["plan"], found["bytes"]) == (sha256(model()), sha256(engine.plan), len(engine.plan))
    assert (found["backend"], found["library"]) == ("tensorrt-rtx", engine.facts["version"])
    assert (found["compute_capability"], found["gpu"], found["driver"], found["timing_cache"]) == ("8.6", None, None, None)
    assert found["profiles"] == [{"input": "input", "min": [1, 4], "opt": [4, 4], "max": [8, 4]}]
    assert found["layers"]["source"] == "builder"
    assert [x["precision"] for x in found["layers"]["weighted"]] == ["fp32"]
    assert 0 < found["build_s"] < 60
    with pytest.raises(Refused, match="compute_capability differs"):
        describe.check(found, host.here(), plan=engine.plan, onnx=found["onnx"])


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("precision", "flags"), [("fp32", []), ("fp16", ["TF32"]), ("mixed", ["TF32"])])
def test_fp32_is_computed_in_full(precision: str, flags: list[str]) -> None:
    assert make(precision=precision).document["flags"] == flags


@pytest.mark.usefixtures("no_gpu")
def test_an_engine_of_another_precision_than_asked_for_is_told() -> None:
    assert make().facts["precision"]["value"] == "proven"
    assert make(precision="fp16").facts["precision"]["value"] == "wrong"


CASES: dict[str, tuple[dict[str, Any], type[ForjaError], str]] = {
    "an operator that the parser doesn't know": ({"model": model("NoSuchOperator")}, BadInput, "NoSuchOperator"),
    "no ONNX at all": ({"model": b"not onnx"}, BadInput, "ONNX model"),
    "two inputs": ({"model": model(inputs=2)}, BadInput, "inputs: got 2"),
    "a GPU generation that it can't build for": ({"capability": "SM53"}, BadInput, "SM86"),
    "another input shape than the model's": ({"shape": (5,)}, Refused, "profile"),
    "a precision that there isn't": ({"precision": "tf32"}, BadInput, "fp32, fp16"),
    "a best batch above the largest": ({"batches": (1, 9, 8)}, BadInput, "batches"),
    "a batch of nothing": ({"batches": (0, 1, 8)}, BadInput, "batches"),
}


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", CASES)
def test_refuses(name: str) -> None:
    arguments, kind, text = CASES[name]
    with pytest.raises(kind, match=text):
        make(**arguments)


class Fake:
    """The module ``tensorrt`` as far as a build needs it, on a GPU that isn't there; it writes down how it was set."""

    __version__ = "11.4.0.106"

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class BuilderFlag:
        __members__ = {"TF32": "tf32", "REFIT": "refit"}  # noqa: RUF012
        TF32 = "tf32"

    class NetworkDefinitionCreationFlag:
        STRONGLY_TYPED = 1

    class MemoryPoolType:
        WORKSPACE = "workspace"

    class ProfilingVerbosity:
        DETAILED = "detailed"

    class TensorIOMode:
        INPUT = "in"

    class LayerInformationFormat:
        JSON = "json"

    def __init__(
        self, *, plan: bytes | None = b"plan" * 100, takes: tuple[bytes, ...] = (b"",), loads: bool = True, gpu: bool = True
    ) -> None:
        self.plan, self.takes, self.loads, self.gpu = plan, takes, loads, gpu
        self.set: dict[str, Any] = {"flags": {"tf32"}}
        self.profiling_verbosity, self.builder_optimization_level, self.execution_context = "", 3, None
        self.num_inputs, self.name, self.num_io_tensors = 1, "input", 1

    def Builder(self, logger: Any) -> Fake:
        self.logger = logger
        logger.log(Fake.ILogger.WARNING, "said by the builder")
        if not self.gpu:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return self

    def __getattr__(self, name: str) -> Any:
        """Builder, network, parser, configuration, profile, runtime, engine, context and inspector are all this object."""
        gives_itself = (
            "OnnxParser", "create_builder_config", "create_optimization_profile", "get_input", "Runtime", "create_execution_context",
            "create_engine_inspector",
        )  # fmt: skip
        values = {
            "parse": True, "add_optimization_profile": 0, "get_tensor_name": "input", "get_tensor_mode": "in", "set_input_shape": True,
            "get_engine_information": json.dumps({"Layers": [LOADED]}),
        }  # fmt: skip
        if name not in gives_itself and name not in values:
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.set[name] = arguments
            return self if name in gives_itself else values[name]

        return call

    def create_network(self, flags: int) -> Fake:
        self.set["network"] = flags
        return self

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.set[pool] = size

    def clear_flag(self, flag: str) -> None:
        self.set["flags"].discard(flag)

    def get_flag(self, flag: str) -> bool:
        return flag in self.set["flags"]

    def set_shape(self, *shapes: Any) -> None:
        self.set["profile"] = shapes

    def create_timing_cache(self, stored: bytes) -> Any:
        if stored == b"broken":
            return None
        self.stored = stored
        return self

    def set_timing_cache(self, times: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return self.stored in self.takes

    def serialize(self) -> bytes:
        return self.stored + b"+"

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        self.logger.log(Fake.ILogger.ERROR, "could not find any implementation")
        return self.plan

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        return self if self.loads else None


LOADED = {
    "Name": "g", "LayerType": "gemm", "Inputs": [{"Name": "x", "Dimensions": [4, 4], "Datatype": "Float"}],
    "Constants": [{"Name": "w", "Dimensions": [4, 3], "Datatype": "Float"}], "Metadata": "[ONNX Layer: product]",
}  # fmt: skip


def built(trt: Any, **changes: Any) -> describe.Built:
    return build.build(trt, b"model", (4,), batches=(1, 4, 8), **changes)


def test_how_tensorrt_is_set() -> None:
    trt = Fake()
    found = built(trt)
    assert trt.set["network"] == 1 << 1, "TensorRT 10 must be asked for strong types"
    assert trt.set["workspace"] == 1 << 30
    assert trt.set["profile"] == ("input", (1, 4), (4, 4), (8, 4))
    assert trt.profiling_verbosity == "detailed"
    assert (found.flags, found.cache, found.reused) == ((), None, False)
    assert built(Fake(), tf32=True).flags == ("TF32",)


TIMES: dict[str, tuple[bytes, tuple[bytes, ...], bytes, bool]] = {
    "none yet": (b"", (b"",), b"+", False),
    "one that fits": (b"old", (b"old",), b"old+", True),
    "one of another GPU": (b"old", (b"",), b"+", False),
    "one that can't be read": (b"broken", (b"",), b"+", False),
}
"""Timing cache that is stored, those that TensorRT takes, the one to store, and whether the first was used."""


@pytest.mark.parametrize("name", TIMES)
def test_timing_cache(name: str) -> None:
    stored, takes, kept, reused = TIMES[name]
    found = built(Fake(takes=takes), cache=stored)
    assert (found.cache, found.reused) == (kept, reused)


def test_a_builder_that_gives_nothing_is_quoted() -> None:
    with pytest.raises(Refused, match=r"gave no engine.*could not find any implementation"):
        built(Fake(plan=None))


def test_a_builder_without_a_gpu_is_not_a_bug() -> None:
    with pytest.raises(Unavailable, match=r"GPU: the builder finds none.*said by the builder"):
        built(Fake(gpu=False))


H100 = Host(backend="tensorrt", library=Fake.__version__, compute_capability="9.0", gpu="NVIDIA H100", driver="580.65.06")
SPEED = latency.Speed(p50_ms=0.5, p99_ms=0.7, throughput=1000.0, memory_mb=80.0)


def on_gpu(monkeypatch: pytest.MonkeyPatch, trt: Fake, speed: latency.Speed | ForjaError = SPEED, *, rtx: bool = False) -> engines.Engine:
    """What make says where a GPU is, with stand-ins for GPU, library and timing."""
    chosen = host.TENSORRT_RTX if rtx else host.TENSORRT
    monkeypatch.setattr(host, "backend", lambda: chosen)
    monkeypatch.setattr(host, "here", lambda backend: H100)
    monkeypatch.setattr(build.importlib, "import_module", lambda name: trt)
    monkeypatch.setattr(build, "_target", lambda *_: None)

    def measure(trt: Any, torch: Any, load: Any, shape: tuple[int, ...], *, largest: int) -> latency.Speed:
        assert load() is trt
        assert (shape, largest) == ((4,), 8)
        if isinstance(speed, ForjaError):
            raise speed
        return speed

    monkeypatch.setattr(latency, "measure", measure)
    return make(cache=b"old")


def test_on_a_gpu_the_inspector_and_the_clock_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = Fake(takes=(b"old",))
    engine = on_gpu(monkeypatch, trt)
    assert (engine.facts["deserialised"], engine.facts["latency_ms"], engine.facts["compute_capability"]) == ("yes", 0.5, "SM90")
    assert engine.facts["speed"] == {"p50_ms": 0.5, "p99_ms": 0.7, "throughput": 1000.0, "memory_mb": 80.0}
    assert engine.facts["precision"]["value"] == "proven"
    assert "by the inspector" in engine.facts["precision"]["reason"]
    assert engine.document["layers"]["source"] == "inspector"
    assert engine.document["layers_reason"] is None
    assert (engine.document["gpu"], engine.document["driver"]) == ("NVIDIA H100", "580.65.06")
    assert engine.cache == b"old+"
    assert engine.document["timing_cache"] == {"sha256": sha256(b"old+"), "reused": True}
    assert trt.set["set_input_shape"] == ("input", (4, 4)), "without a shape the inspector knows no types"
    assert trt.execution_context is trt


def test_a_plan_that_its_own_gpu_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = on_gpu(monkeypatch, Fake(loads=False))
    assert (engine.facts["deserialised"], engine.facts["latency_ms"]) == ("no", None)
    assert "doesn't take the plan" in engine.facts["reason"]
    assert (engine.document["layers"], engine.facts["precision"]["value"]) == (None, "not measured")


def test_a_clock_that_fails_leaves_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = on_gpu(monkeypatch, Fake(), Refused("engine: TensorRT doesn't run it"))
    assert (engine.facts["deserialised"], engine.facts["latency_ms"]) == ("yes", None)
    assert "doesn't run it" in engine.facts["reason"]


def test_a_plan_for_another_gpu_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = on_gpu(monkeypatch, Fake(), rtx=True)
    assert (engine.facts["deserialised"], engine.facts["latency_ms"]) == ("not measured", None)
    assert engine.facts["reason"] == "built for 8.6, this host's GPU has 9.0"
