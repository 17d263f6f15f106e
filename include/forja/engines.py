"""Engines: one builder function behind two libraries with one interface, TensorRT and TensorRT-RTX.

TensorRT-RTX builds ahead of time on a host without a GPU; that proves that NVIDIA's parser accepts the graph and that a
strongly typed engine comes out, and no more. TensorRT builds for the GPU at hand, so it needs one.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from forja.errors import BadInput, Refused

DRIVER = Path("/proc/driver/nvidia/version")
"""There when the NVIDIA kernel driver is loaded; reading it starts nothing on the GPU."""
NOT_MEASURED = "not measured"
WORKSPACE_BYTES = 1 << 30
"""Most scratch memory that a layer's kernel may use; the default is all of the device's."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A built engine and what is known of it."""

    plan: bytes
    """Serialised engine."""
    build_s: float
    """Seconds that parsing and building took."""
    facts: dict[str, Any]
    """For the receipt; what no hardware has shown is ``not measured`` or null."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A library that builds engines."""

    name: str
    module: str
    ahead_of_time: bool
    """Whether it builds for a GPU that isn't here."""


TENSORRT = Backend(name="tensorrt", module="tensorrt", ahead_of_time=False)
TENSORRT_RTX = Backend(name="tensorrt-rtx", module="tensorrt_rtx", ahead_of_time=True)


def backend() -> Backend:
    """TensorRT where a GPU's driver and the library are, TensorRT-RTX anywhere else."""
    here = DRIVER.exists() and importlib.util.find_spec(TENSORRT.module) is not None
    return TENSORRT if here else TENSORRT_RTX


LIBRARIES = ("tensorrt-cu12", "tensorrt-cu13", "tensorrt", "tensorrt-rtx-cu12")
"""Distributions that bring a builder, in the order in which one is asked for."""


def signature() -> str:
    """What of this host an engine depends on: driver, GPU and builder; empty without a GPU, where the lock says it all.

    Nothing is imported or started on the GPU. A value that can't be found out is ``unknown``, so hosts that differ in what they
    show have different signatures.
    """
    if not DRIVER.exists():
        return ""
    driver = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", DRIVER.read_text(errors="replace"))
    return f"driver {driver[0] if driver else 'unknown'}, compute capability {_capability()}, {_library()}"


def _capability() -> str:
    """Compute capability of the host's GPUs, as ``nvidia-smi`` names it: ``9.0``; each kind once."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    try:
        done = subprocess.run(
            [tool, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return "+".join(sorted(set(re.findall(r"\d+\.\d+", done.stdout)))) or "unknown"


def _library() -> str:
    for name in LIBRARIES:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "no builder"


def make(model: bytes, shape: tuple[int, ...], *, max_batch: int, capability: str) -> Engine:
    """Build an engine with the backend that fits this host.

    Args:
        model: ONNX with one input, float32 [N, *shape]; its types are the engine's precision.
        shape: shape of one input.
        max_batch: N goes from 1 to this; kernels are chosen for this.
        capability: GPU generation to build for ahead of time, for example ``SM86``.

    Raises:
        BadInput: no such GPU generation, or the parser doesn't take the graph (its errors are in the message).
        Refused: the builder gave no engine.
    """
    chosen = backend()
    trt = importlib.import_module(chosen.module)
    logger = _logger(trt)
    began = time.monotonic()
    plan = build(trt, logger, model, shape, max_batch=max_batch, capability=capability if chosen.ahead_of_time else "")
    facts: dict[str, Any] = {
        "backend": chosen.name,
        "version": trt.__version__,
        "compute_capability": capability if chosen.ahead_of_time else "current",
        "deserialised": NOT_MEASURED,
        "latency_ms": None,
        "reason": "no NVIDIA driver on this host: nothing could load the plan, so its latency and real precision are unknown",
    }
    if DRIVER.exists():
        loaded = trt.Runtime(logger).deserialize_cuda_engine(plan) is not None
        facts |= {"deserialised": "yes" if loaded else "no", "reason": "latency: no timing loop has run on this GPU"}
    return Engine(plan=plan, build_s=time.monotonic() - began, facts=facts)


def build(trt: ModuleType, logger: Any, model: bytes, shape: tuple[int, ...], *, max_batch: int, capability: str = "") -> bytes:
    """Serialised, strongly typed engine with one optimisation profile: batch 1 to ``max_batch``, tuned for ``max_batch``.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        logger: its logger, from this module, which keeps messages.
        model: as in ``make``.
        shape: as in ``make``.
        max_batch: as in ``make``.
        capability: as in ``make``; empty to build for the GPU at hand.
    """
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise BadInput("ONNX model: the parser doesn't take it", value=parser_errors(parser), allowed="operators of opset 9 to 25")
    if network.num_inputs != 1:
        raise BadInput("ONNX model: inputs", value=network.num_inputs, allowed="one")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    if capability:
        _target(trt, config, capability)
    profile = builder.create_optimization_profile()
    profile.set_shape(network.get_input(0).name, (1, *shape), (max_batch, *shape), (max_batch, *shape))
    if config.add_optimization_profile(profile) < 0:
        raise BadInput("optimisation profile", value=[max_batch, *shape], allowed="the shape of the model's input")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Refused("the builder gave no engine", value=logger.kept[-5:])
    return bytes(plan)


def _target(trt: ModuleType, config: Any, capability: str) -> None:
    known = [n for n in dir(trt.ComputeCapability) if n.startswith("SM")]
    if capability not in known:
        raise BadInput("recipe field Optimize.compute_capability", value=capability, allowed=", ".join(known))
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)


def parser_errors(parser: Any) -> list[str]:
    """The parser's errors, each with the node that it is about."""
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return [f"node {e.node()} {e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors]


def _logger(trt: ModuleType) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps errors and warnings for messages instead of printing them."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.kept: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                self.kept.append(message)

    return Logger()
