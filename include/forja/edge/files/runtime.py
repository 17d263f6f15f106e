"""The runtimes of a bundle: ONNX Runtime, TensorRT by its Python API, or trtexec where that is missing.

All take float32 [N, *shape] of raw inputs and give float32 [N, classes] of probabilities. Python 3.6, numpy; this module is imported
only after ``trust.check`` passed.
"""
# ruff: noqa: UP006, UP035, UP045 (the syntax of Python 3.6)

import ctypes
import ctypes.util
import glob
import json
import os
import re
import shutil
import subprocess
import time
from typing import Any, Dict, List, Optional

import numpy as np

TRTEXEC = "/usr/src/tensorrt/bin/trtexec"
"""Where JetPack puts it."""
CUDART = "/usr/local/cuda/lib64/libcudart.so*"


class Unusable(Exception):
    """No runtime here can run the bundle; the message says what to do."""


def load(bundle: str, manifest: Dict[str, Any], simulated: bool = False) -> Any:
    """The runtime that this bundle wants on this device.

    Args:
        bundle: folder of a bundle that ``trust.check`` passed.
        manifest: what it returned.
        simulated: run on ONNX Runtime whatever the target is.
    """
    if simulated or manifest["runtime"] == "onnxruntime":
        return OnnxRuntime(bundle, manifest)
    if manifest["runtime"] == "tensorrt-rtx":
        return TensorRt(bundle, manifest, _module("tensorrt_rtx"), os.path.join(bundle, "engine.plan"))
    plan = built(bundle, manifest)
    try:
        trt = _module("tensorrt")
    except Unusable:
        return Trtexec(bundle, manifest, plan)
    return TensorRt(bundle, manifest, trt, plan)


def built(bundle: str, manifest: Dict[str, Any]) -> str:
    """Path of the engine that build.sh made of this very bundle."""
    plan, facts = os.path.join(bundle, "work", "engine.plan"), os.path.join(bundle, "work", "engine.json")
    if not (os.path.isfile(plan) and os.path.isfile(facts)):
        raise Unusable("no engine in work/; run ./build.sh")
    with open(facts) as file:
        found = json.load(file)
    wanted = manifest["files"]["model.onnx"]["sha256"]
    if found.get("onnx_sha256") != wanted:
        raise Unusable(f"the engine in work/ was built from ONNX {found.get('onnx_sha256')}, this bundle has {wanted}; run ./build.sh")
    return plan


def built_by(bundle: str) -> str:
    """Version of TensorRT that built the engine in work/."""
    with open(os.path.join(bundle, "work", "engine.json")) as file:
        return str(json.load(file)["tensorrt"])


def in_range(version: str, manifest: Dict[str, Any]) -> None:
    """Refuse a TensorRT that the bundle isn't made for."""
    limits = manifest["tensorrt"]
    if not _numbers(limits["min"]) <= _numbers(version) < _numbers(limits["below"]):
        raise Unusable(f"TensorRT {version} is here; this bundle is for {limits['min']} or newer and older than {limits['below']}")


def _numbers(version: str) -> List[int]:
    return [int(n) for n in re.findall(r"\d+", version)[:4]]


def _module(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise Unusable(f"the Python module {name} is missing: {error}") from error


class OnnxRuntime:
    """ONNX Runtime on the CPU, one thread: a sum that is split otherwise rounds otherwise."""

    def __init__(self, bundle: str, manifest: Dict[str, Any]) -> None:
        ort = _module("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        if hasattr(options, "add_session_config_entry"):
            # As in the evaluation that the gate judged: without VNNI the kernels for int8 saturate.
            options.add_session_config_entry("session.x64quantprecision", "1")
        self.session = ort.InferenceSession(os.path.join(bundle, "model.onnx"), options, providers=["CPUExecutionProvider"])
        self.name, self.version = "onnxruntime", str(ort.__version__)
        self.input = manifest["input"]["name"]

    def run(self, batch: Any) -> Any:
        """Answers to one batch."""
        return self.session.run(None, {self.input: batch})[0]


class Cuda:
    """The five calls of the CUDA runtime that inference needs, through ctypes: JetPack brings no Python package for them."""

    def __init__(self) -> None:
        paths = [p for p in [ctypes.util.find_library("cudart")] if p] + sorted(glob.glob(CUDART))
        for path in paths:
            try:
                self.lib = ctypes.CDLL(path)
                break
            except OSError:
                continue
        else:
            raise Unusable(f"the CUDA runtime is missing: no libcudart.so on the library path nor at {CUDART}")
        self.lib.cudaGetErrorString.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the CUDA runtime; an error is raised with its text."""
        status = getattr(self.lib, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: {self.lib.cudaGetErrorString(status).decode()}")

    def allocate(self, size: int) -> int:
        """Address of ``size`` bytes on the device."""
        pointer = ctypes.c_void_p()
        self.call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        return int(pointer.value or 0)

    def copy(self, target: int, source: int, size: int, kind: int) -> None:
        """Copy bytes: ``kind`` 1 to the device, 2 from it (cudaMemcpyKind)."""
        self.call("cudaMemcpy", ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size), ctypes.c_int(kind))


class TensorRt:
    """TensorRT's Python API: that of 8.2, with bindings by number, and that of 8.5 and later, with tensors by name."""

    def __init__(self, bundle: str, manifest: Dict[str, Any], trt: Any, plan: str) -> None:
        self.name, self.version = trt.__name__, str(trt.__version__)
        in_range(self.version, manifest)
        if manifest["runtime"] == "tensorrt" and _numbers(built_by(bundle))[:3] != _numbers(self.version)[:3]:
            raise Unusable(f"the engine in work/ was built by TensorRT {built_by(bundle)}, {self.version} is here; run ./build.sh")
        self.logger = trt.Logger(trt.Logger.WARNING)
        with open(plan, "rb") as file:
            self.engine = trt.Runtime(self.logger).deserialize_cuda_engine(file.read())
        if self.engine is None:
            raise Unusable("TensorRT can't load the engine; run ./build.sh")
        self.context = self.engine.create_execution_context()
        self.cuda = Cuda()
        self.names = manifest["input"]["name"], manifest["output"]["name"]
        self.classes = len(manifest["classes"])
        sizes = [int(np.prod(manifest["input"]["shape"])), self.classes]
        self.buffers = [self.cuda.allocate(4 * manifest["batch"]["max"] * size) for size in sizes]

    def run(self, batch: Any) -> Any:
        """Answers to one batch."""
        source = np.ascontiguousarray(batch, dtype=np.float32)
        answers = np.empty((len(source), self.classes), np.float32)
        self.cuda.copy(self.buffers[0], source.ctypes.data, source.nbytes, 1)
        done = self._named(source.shape) if hasattr(self.engine, "num_io_tensors") else self._numbered(source.shape)
        if not done:
            raise RuntimeError("TensorRT did not run the batch")
        self.cuda.call("cudaDeviceSynchronize")
        self.cuda.copy(answers.ctypes.data, self.buffers[1], answers.nbytes, 2)
        return answers

    def _named(self, shape: Any) -> bool:
        if not self.context.set_input_shape(self.names[0], tuple(shape)):
            raise RuntimeError(f"TensorRT doesn't take a batch of shape {shape}")
        for name, address in zip(self.names, self.buffers):  # noqa: B905 - Python 3.6 has no strict
            self.context.set_tensor_address(name, address)
        return bool(self.context.execute_async_v3(0))

    def _numbered(self, shape: Any) -> bool:
        numbers = [self.engine.get_binding_index(name) for name in self.names]
        if not self.context.set_binding_shape(numbers[0], tuple(shape)):
            raise RuntimeError(f"TensorRT doesn't take a batch of shape {shape}")
        bindings = [0] * self.engine.num_bindings
        for number, address in zip(numbers, self.buffers):  # noqa: B905
            bindings[number] = address
        return bool(self.context.execute_v2(bindings))


class Trtexec:
    """NVIDIA's command-line tool, for devices without TensorRT's Python package: a process for each batch, and its own timing."""

    name = "trtexec"

    def __init__(self, bundle: str, manifest: Dict[str, Any], plan: str) -> None:
        self.tool, self.plan, self.manifest = trtexec(), plan, manifest
        self.work = os.path.join(bundle, "work")
        self.version = built_by(bundle)
        in_range(self.version, manifest)

    def run(self, batch: Any) -> Any:
        """Answers to one batch."""
        inputs, outputs = (os.path.join(self.work, n) for n in ("trtexec-input.bin", "trtexec-output.json"))
        np.ascontiguousarray(batch, dtype=np.float32).tofile(inputs)
        name = self.manifest["input"]["name"]
        self._call(len(batch), f"--loadInputs={name}:{inputs}", "--iterations=1", "--warmUp=0", "--duration=0", f"--exportOutput={outputs}")
        with open(outputs) as file:
            found = [t for t in json.load(file) if t["name"] == self.manifest["output"]["name"]]
        return np.array(found[0]["values"], np.float32).reshape([int(n) for n in found[0]["dimensions"].split("x")])

    def times(self, runs: int) -> List[float]:
        """Milliseconds of each of at least ``runs`` batches of one, copies to and from the GPU included."""
        times = os.path.join(self.work, "trtexec-times.json")
        # Since 11 the copies are left out unless they are asked for.
        copies = ["--includeDataTransfers"] if _numbers(self.version)[0] >= 11 else []
        self._call(1, f"--iterations={runs}", "--warmUp=200", "--duration=0", f"--exportTimes={times}", *copies)
        with open(times) as file:
            return [float(t["latencyMs"]) for t in json.load(file)]

    def _call(self, count: int, *arguments: str) -> None:
        shape = "x".join(str(n) for n in [count, *self.manifest["input"]["shape"]])
        shapes = f"--shapes={self.manifest['input']['name']}:{shape}"
        command = [self.tool, f"--loadEngine={self.plan}", shapes, *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}: {done.stdout.decode(errors='replace')[-400:]}")


def trtexec() -> str:
    """Path of trtexec."""
    found: Optional[str] = os.environ.get("TRTEXEC") or shutil.which("trtexec")
    if not found and os.access(TRTEXEC, os.X_OK):
        found = TRTEXEC
    if not found:
        raise Unusable(f"neither the Python module tensorrt nor trtexec is here (PATH, {TRTEXEC}); install TensorRT of this JetPack")
    return found


def timed(runtime: Any, inputs: Any, warm_up: int, runs: int, most_s: float) -> Dict[str, Any]:
    """Latency and frames per second, one batch of one after the other, host to host; the protocol goes with the numbers."""
    if hasattr(runtime, "times"):
        times = runtime.times(runs)
        protocol = f"trtexec, {len(times)} batches of 1, one stream, latencyMs: copy in, compute, copy out"
    else:
        times = []
        batches = [inputs[i : i + 1] for i in range(len(inputs))]
        for number in range(warm_up):
            runtime.run(batches[number % len(batches)])
        began = time.perf_counter()
        while len(times) < runs and time.perf_counter() - began < most_s:
            start = time.perf_counter()
            runtime.run(batches[len(times) % len(batches)])
            times.append(1000 * (time.perf_counter() - start))
        protocol = f"{len(times)} batches of 1 after {warm_up} to warm up, one after the other, wall time from array to array"
    ordered = sorted(times)
    rank = [ordered[min(len(ordered) - 1, int(np.ceil(q * len(ordered))) - 1)] for q in (0.5, 0.99)]
    return {
        "protocol": protocol, "runs": len(times), "p50_ms": round(rank[0], 4), "p99_ms": round(rank[1], 4),
        "fps": round(1000 * len(times) / sum(times), 2),
    }  # fmt: skip
