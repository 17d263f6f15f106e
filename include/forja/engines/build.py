"""ONNX to a plan: one function for TensorRT 10, TensorRT 11 and TensorRT-RTX.

Precision lives in the ONNX file. TensorRT 11 has no precision flags left; TensorRT 10 ignores them for a strongly typed network, which
has to be asked for there and is all that 11 knows.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

from forja.engines import describe, host, inspect, latency, log
from forja.engines.describe import Built
from forja.engines.host import Host
from forja.engines.latency import NOT_MEASURED, Speed
from forja.engines.verdict import precision_verdict
from forja.errors import BadInput, ForjaError, Refused, Unavailable
from forja.recipes.base import VARIANTS

WORKSPACE_BYTES = 1 << 30
"""Most scratch memory that a layer's kernel may use; the default is all of the device's."""
NO_DRIVER = "no NVIDIA driver on this host: nothing could load the plan"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A built engine and what is known of it."""

    plan: bytes
    """Serialised engine."""
    build_s: float
    """Seconds that parsing and building took."""
    facts: dict[str, Any]
    """For the receipt; what no hardware has shown is ``not measured`` or null."""
    document: dict[str, Any]
    """Content of engine.json, see ``describe.document``."""
    cache: bytes | None
    """Timing cache to store at ``host.timing_key``; None where none is kept."""


def make(
    model: bytes, shape: tuple[int, ...], *, batches: tuple[int, int, int], capability: str, precision: str, cache: bytes = b""
) -> Engine:  # fmt: skip
    """Build an engine with the backend that fits this host; where a GPU is, also load it, read its layers and time it.

    Args:
        model: ONNX with one input, float32 [N, *shape]; its types are the engine's precision.
        shape: shape of one input.
        batches: smallest, best and largest N; kernels are chosen for the best.
        capability: GPU generation to build for ahead of time, for example ``SM86``; a library that builds for its own GPU ignores it.
        precision: the variant that ``model`` is; float32 is computed in full in ``fp32``, elsewhere TF32 may do.
        cache: timing cache of an earlier build with this version on this GPU; one that doesn't fit is left aside.

    Raises:
        BadInput: batches out of order, no such variant or GPU generation, or the parser doesn't take the graph (its errors are in
            the message).
        Refused: the builder gave no engine.
        Unavailable: the builder finds no GPU.
    """
    if precision not in VARIANTS:
        raise BadInput("engine: precision", value=precision, allowed=", ".join(VARIANTS))
    if not 1 <= batches[0] <= batches[1] <= batches[2]:
        raise BadInput("engine: batches", value=batches, allowed="smallest, best, largest, from 1 up")
    chosen = host.backend()
    trt = importlib.import_module(chosen.module)
    place = host.here(chosen)
    target = capability if chosen.ahead_of_time else ""
    began = time.monotonic()
    built = build(
        trt, model, shape, batches=batches, capability=target, tf32=precision != "fp32", cache=cache if chosen.timing_cache else None
    )  # fmt: skip
    built = replace(built, seconds=time.monotonic() - began)
    found = inspect.from_report(built.report)
    document = describe.document(
        model, built, place, precision=precision, profiles=[(n, *shape) for n in batches], target=target,
        layers=inspect.summary(found, "builder") if found else None, reason="the builder reported none, and nothing loaded the plan",
    )  # fmt: skip
    loaded, speed = _tried(trt, built.plan, document, place, shape, batches)
    verdict = precision_verdict(document, model)
    facts = {
        "backend": chosen.name,
        "version": place.library,
        "compute_capability": target or f"SM{place.compute_capability.replace('.', '')}",
        "deserialised": loaded,
        "latency_ms": speed.p50_ms,
        "speed": {name: value for name, value in asdict(speed).items() if name != "reason"},
        "precision": asdict(verdict),
        "reason": speed.reason,
    }
    return Engine(plan=built.plan, build_s=built.seconds, facts=facts, document=document, cache=built.cache)


def _tried(
    trt: ModuleType, plan: bytes, document: dict[str, Any], place: Host, shape: tuple[int, ...], batches: tuple[int, int, int]
) -> tuple[str, Speed]:  # fmt: skip
    """Whether this host's GPU loads the plan, and how fast it is there; the document gets the inspector's word on its layers."""
    if not place.driver:
        return NOT_MEASURED, Speed(reason=f"{NO_DRIVER}, so its latency is unknown")
    if document["compute_capability"] != place.compute_capability:
        return NOT_MEASURED, Speed(reason=f"built for {document['compute_capability']}, this host's GPU has {place.compute_capability}")
    import torch

    def load() -> Any:
        return describe.load(trt, plan, document, place, onnx=document["onnx"])

    try:
        found = inspect.from_json(inspect.information(trt, load(), (batches[1], *shape)))
    except Refused as error:
        return "no", Speed(reason=str(error))
    if found:
        document |= {"layers": inspect.summary(found, "inspector"), "layers_reason": None}
    try:
        return "yes", latency.measure(trt, torch, load, shape, largest=batches[2])
    except ForjaError as error:
        return "yes", Speed(reason=str(error))


def build(
    trt: ModuleType, model: bytes, shape: tuple[int, ...], *, batches: tuple[int, int, int], capability: str = "", tf32: bool = False,
    cache: bytes | None = None,
) -> Built:  # fmt: skip
    """A strongly typed engine with one optimisation profile.

    Args:
        trt: the module ``tensorrt`` (10 or 11) or ``tensorrt_rtx``.
        model: as in ``make``, like ``shape`` and ``batches``.
        capability: GPU generation to build for ahead of time, which only ``tensorrt_rtx`` can; empty for the GPU at hand.
        tf32: whether float32 may be multiplied with mantissas of 10 bits, which is TensorRT's default.
        cache: timing cache to start from, ``b""`` for none; None when the library keeps none.
    """
    logger = log.keeper(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # "factory function returned nullptr"
        raise Unavailable("GPU: the builder finds none", value=log.last(logger), do="run it where a GPU is") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise BadInput("ONNX model: the parser doesn't take it", value=parser_errors(parser), allowed="operators of opset 9 to 25")
    if network.num_inputs != 1:
        raise BadInput("ONNX model: inputs", value=network.num_inputs, allowed="one")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if capability:
        _target(trt, config, capability)
    profile = builder.create_optimization_profile()
    tensor = network.get_input(0)
    profile.set_shape(tensor.name, *((n, *shape) for n in batches))
    if config.add_optimization_profile(profile) < 0:
        raise BadInput("optimisation profile", value=[list(batches), *shape], allowed="the shape of the model's input")
    times, reused = (None, False) if cache is None else _timing_cache(config, cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Refused("the builder gave no engine", value=log.last(logger))
    return Built(
        plan=bytes(plan),
        input=tensor.name,
        flags=tuple(name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)),
        settings={"strongly_typed": True, "workspace_bytes": WORKSPACE_BYTES, "optimization_level": int(config.builder_optimization_level)},
        report=logger.report,
        cache=None if times is None else bytes(times.serialize()),
        reused=reused,
    )


def _timing_cache(config: Any, stored: bytes) -> tuple[Any, bool]:
    """A timing cache that the configuration takes, and whether it is the stored one.

    One of another GPU or version isn't worth a failure: the times are measured again.
    """
    if stored:
        times = config.create_timing_cache(stored)
        if times is not None and config.set_timing_cache(times, False):
            return times, True
    times = config.create_timing_cache(b"")
    config.set_timing_cache(times, False)
    return times, False


def _target(trt: ModuleType, config: Any, capability: str) -> None:
    """Build for a GPU generation that needn't be here; only TensorRT-RTX has these names."""
    known = [n for n in dir(trt.ComputeCapability) if n.startswith("SM")]
    if capability not in known:
        raise BadInput("recipe field Optimize.compute_capability", value=capability, allowed=", ".join(known))
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)


def parser_errors(parser: Any) -> list[str]:
    """The parser's errors, each with the node that it is about."""
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return [f"node {e.node()} {e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors]
