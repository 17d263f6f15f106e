"""The protocol that times an engine: order of calls and arithmetic, on stand-ins. No GPU has run it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from forja.engines import latency
from forja.errors import Refused

BATCH, SHAPE = 16, (3, 4)
MILLISECONDS = 2.5
"""What a request of the stand-in takes."""


class Gpu:
    """A GPU, TensorRT and torch in one, which write down what is asked of them, in order."""

    def __init__(self, *, types: tuple[str, str] = ("float", "float"), runs: bool = True, gives_back: int = 0, most: int = BATCH) -> None:
        self.calls: list[str] = []
        self.types, self.runs, self.gives_back, self.most = types, runs, gives_back, most
        self.free, self.held, self.clock, self.shape = 10_000_000, 1_000_000, 0.0, (0,)
        self.requests = 0
        self.trt: Any = SimpleNamespace(
            DataType=SimpleNamespace(FLOAT="float", HALF="half"), TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out")
        )
        self.torch: Any = SimpleNamespace(
            cuda=SimpleNamespace(
                synchronize=lambda: self.note("synchronize"), mem_get_info=lambda: (self.free, 0), memory_reserved=lambda: self.held,
                Stream=lambda: SimpleNamespace(cuda_stream=7, synchronize=lambda: self.note("stream done")), Event=self.event,
            ),
            Generator=lambda device: SimpleNamespace(manual_seed=lambda seed: seed), randn=self.tensor, empty=self.tensor,
        )  # fmt: skip

    def note(self, call: str) -> None:
        if not self.calls or self.calls[-1] != call:  # runs of one call are one
            self.calls.append(call)

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        made = SimpleNamespace(at=0.0, synchronize=lambda: self.note("event done"))

        def record(stream: Any) -> None:
            assert stream.cuda_stream == 7
            self.note("record")
            made.at = self.clock

        made.record = record
        made.elapsed_time = lambda other: other.at - made.at
        return made

    def tensor(self, size: tuple[int, ...], device: str, generator: Any = None) -> Any:
        assert device == "cuda"
        self.held += 500_000  # a buffer: what torch holds of it isn't the engine's
        self.free -= 500_000
        self.note(f"{'random' if generator is not None else 'empty'} {size}")
        return SimpleNamespace(data_ptr=lambda: 1000 + size[0])

    def load(self) -> Any:
        self.note("load")
        self.free -= 3_000_000 - self.gives_back
        names = ("input", "probabilities")
        return SimpleNamespace(
            num_io_tensors=2, get_tensor_name=lambda i: names[i], get_tensor_dtype=lambda n: self.types[names.index(n)],
            get_tensor_mode=lambda n: "in" if n == "input" else "out", create_execution_context=self.context,
        )  # fmt: skip

    def context(self) -> Any:
        self.note("context")
        self.free -= 1_000_000
        return SimpleNamespace(
            set_input_shape=self.set_shape, get_tensor_shape=lambda n: self.shape if n == "input" else (self.shape[0], 10),
            set_tensor_address=lambda n, p: self.note(f"address {n} {p}"), execute_async_v3=self.execute,
        )  # fmt: skip

    def set_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        self.note(f"shape {name} {shape}")
        return shape[0] <= self.most

    def execute(self, stream: int) -> bool:
        assert stream == 7
        self.note("request")
        self.requests += 1
        # Batch 1: every fiftieth request is slow; the first, cold one is slowest of all.
        slow = 40.0 if self.requests == 1 else 9.0 if self.requests % 50 == 0 else MILLISECONDS
        self.clock += slow if self.shape[0] == 1 else 4 * MILLISECONDS
        return self.runs

    def measure(self) -> latency.Speed:
        return latency.measure(self.trt, self.torch, self.load, SHAPE, largest=BATCH)


def bound(batch: int) -> list[str]:
    return [
        f"shape input ({batch}, 3, 4)", f"random ({batch}, 3, 4)", f"address input {1000 + batch}", f"empty ({batch}, 10)",
        f"address probabilities {1000 + batch}", "synchronize",
    ]  # fmt: skip


def test_order_of_calls() -> None:
    gpu = Gpu()
    gpu.measure()
    warm = ["request", "stream done"]
    single = ["record", "request", "record", "event done"] * latency.ITERATIONS
    full = ["record", "request", "record", "event done"]
    assert gpu.calls == ["synchronize", "load", "context", *bound(1), *warm, *single, *bound(BATCH), *warm, *full]
    assert gpu.requests == 2 * latency.WARM_UP + latency.ITERATIONS + latency.FULL


def test_arithmetic() -> None:
    found = Gpu().measure()
    assert found.p50_ms == MILLISECONDS  # the cold request was a warm-up
    assert found.p99_ms == 9.0  # 2 % of the requests are slow
    assert found.throughput == pytest.approx(BATCH / (4 * MILLISECONDS / 1e3))
    assert found.memory_mb == 4.0  # engine and context, without the buffers
    assert found.reason == ""


def test_memory_that_another_process_gave_back_is_not_a_measurement() -> None:
    found = Gpu(gives_back=5_000_000).measure()
    assert found.memory_mb is None
    assert "memory" in found.reason
    assert found.p50_ms == MILLISECONDS


BROKEN: dict[str, tuple[Gpu, str]] = {
    "an output in float16": (Gpu(types=("float", "half")), "probabilities"),
    "a batch that the profile lacks": (Gpu(most=BATCH - 1), "outside of its profile"),
    "TensorRT doesn't run it": (Gpu(runs=False), "doesn't run"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_refuses(name: str) -> None:
    gpu, text = BROKEN[name]
    with pytest.raises(Refused, match=text):
        gpu.measure()


def test_refuses_without_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    monkeypatch.setattr(gpu, "context", lambda: None)
    with pytest.raises(Refused, match="no execution context"):
        gpu.measure()


@pytest.mark.parametrize(("percent", "wanted"), [(50, 5), (99, 10), (90, 9), (91, 10), (1, 1), (100, 10)])
def test_percentile_is_the_nearest_rank(percent: float, wanted: float) -> None:
    assert latency.percentile(list(range(1, 11)), percent) == wanted
