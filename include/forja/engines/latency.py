"""How fast an engine is on the GPU at hand, by one protocol.

Inputs and outputs stay on the GPU; one CUDA stream, no CUDA graph, normal random inputs. After WARM_UP requests:

* latency: ITERATIONS requests of batch 1, each enqueued once the one before it is done, each timed by a pair of CUDA events.
* throughput: FULL requests of the largest batch, enqueued without waiting, timed by one pair of events.
* memory: what the GPU has less free than before the plan was loaded, without the buffers: the engine, one execution context and the
  code that CUDA loaded. Whatever other processes take or give back meanwhile is in that number.

trtexec 11 measures with CUDA graphs by default, so its numbers are lower. **No GPU has run this module.** Its order of calls and its
arithmetic are tested with stand-ins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from types import ModuleType
from typing import Any

from forja.errors import Refused

WARM_UP = 50
ITERATIONS = 1000
"""Enough that ten requests are slower than the 99th percentile."""
FULL = 200
SEED = 0
NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured of an engine; None for what wasn't."""

    p50_ms: float | None = None
    """Median latency of batch 1, in milliseconds."""
    p99_ms: float | None = None
    """99th percentile of it, in milliseconds."""
    throughput: float | None = None
    """Samples per second in full batches."""
    memory_mb: float | None = None
    """Memory of the engine and one execution context on the GPU, in MB."""
    reason: str = ""
    """Why numbers are missing; empty when none is."""


def measure(trt: ModuleType, torch: Any, load: Callable[[], Any], shape: Sequence[int], *, largest: int) -> Speed:
    """Time an engine on CUDA's current GPU.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        torch: the module ``torch``, with CUDA; its tensors are the buffers.
        load: gives the engine; it is called once, so that its memory is seen.
        shape: of one input.
        largest: the profile's largest batch.

    Raises:
        Refused: a tensor of the engine isn't float32, its profile lacks batch 1 or ``largest``, or TensorRT doesn't run a request.
    """
    torch.cuda.synchronize()
    free, held = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
    engine = load()
    context = engine.create_execution_context()
    if context is None:
        raise Refused("engine: no execution context", do="see whether the GPU has memory left")
    stream = torch.cuda.Stream()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    single = _bind(trt, torch, engine, context, (1, *shape))
    _warm_up(context, stream)
    times = []
    for _ in range(ITERATIONS):
        start.record(stream)
        _enqueue(context, stream)
        end.record(stream)
        end.synchronize()
        times.append(float(start.elapsed_time(end)))

    full = _bind(trt, torch, engine, context, (largest, *shape))
    _warm_up(context, stream)
    start.record(stream)
    for _ in range(FULL):
        _enqueue(context, stream)
    end.record(stream)
    end.synchronize()
    seconds = float(start.elapsed_time(end)) / 1e3
    taken = (free - torch.cuda.mem_get_info()[0]) - (torch.cuda.memory_reserved() - held)
    del single, full  # TensorRT has their addresses only: they had to live until here
    times.sort()
    return Speed(
        p50_ms=percentile(times, 50), p99_ms=percentile(times, 99), throughput=largest * FULL / seconds,
        memory_mb=taken / 1e6 if taken > 0 else None,
        reason="" if taken > 0 else "memory: another process gave back more than the engine took",
    )  # fmt: skip


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` percent of all are no larger than (nearest rank).

    Args:
        ordered: ascending, one value or more.
        percent: above 0, up to 100.
    """
    return ordered[ceil(len(ordered) * percent / 100) - 1]


def _bind(trt: ModuleType, torch: Any, engine: Any, context: Any, shape: tuple[int, ...]) -> list[Any]:
    """Buffers of all inputs and outputs at this input shape; the context has their addresses, the caller must keep them."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    if other := [name for name in names if engine.get_tensor_dtype(name) != trt.DataType.FLOAT]:
        raise Refused("engine: tensors of another type than float32", value=other)
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    for name in inputs:
        if not context.set_input_shape(name, shape):
            raise Refused("engine: input shape outside of its profile", value=shape)
    random = torch.Generator(device="cuda").manual_seed(SEED)
    buffers = []
    for name in names:
        size = tuple(context.get_tensor_shape(name))
        made = torch.randn(size, device="cuda", generator=random) if name in inputs else torch.empty(size, device="cuda")
        context.set_tensor_address(name, made.data_ptr())
        buffers.append(made)
    torch.cuda.synchronize()  # they were filled on another stream
    return buffers


def _enqueue(context: Any, stream: Any) -> None:
    if not context.execute_async_v3(stream.cuda_stream):
        raise Refused("engine: TensorRT doesn't run it")


def _warm_up(context: Any, stream: Any) -> None:
    """The first requests load code and grow clocks: they aren't timed."""
    for _ in range(WARM_UP):
        _enqueue(context, stream)
    stream.synchronize()
