"""The load generator: what a served model bears, asked as independent clients would ask it.

Open loop: requests are sent when a Poisson process says so, whether or not earlier ones were answered, and a request's latency counts
from that moment. A generator that waits for answers asks a slow server less, and so hides its worst latencies (coordinated omission:
Schroeder, Wierman, Harchol-Balter 2006, "Open versus closed: a cautionary tale"; Tene, "How not to measure latency").
What was offered and not answered is an error that counts, with an infinite latency.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import selectors
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from forja.errors import BadInput, Unavailable
from forja.tune.measured import KINDS, Load, Record, counts, summary
from forja.tune.transport import Kind, Target, Transport, connect

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Answer = TypeVar("Answer")
DRAIN_S = 1.0
"""Seconds beyond the time-out for the last answers."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What an open-loop run asks."""

    rate: float
    """Requests per second."""
    seconds: float
    """Length of the measurement."""
    warmup_s: float = 1.0
    """Seconds of the same load before it, which don't count."""
    seed: int = 0
    max_in_flight: int = 400
    """Requests under way at most; what would be one more isn't sent, and counts as an error."""
    timeout_s: float = 5.0
    """Seconds after which a request is given up."""

    def __post_init__(self) -> None:
        for name, least in (("rate", 0.0), ("seconds", 0.0), ("timeout_s", 0.0), ("max_in_flight", 0)):
            if not getattr(self, name) > least:
                raise BadInput(f"load: field {name}", value=getattr(self, name), allowed=f"above {least:g}")
        if self.max_in_flight > 900:
            raise BadInput("load: field max_in_flight", value=self.max_in_flight, allowed="900 or less: select() watches 1024 files")


def schedule(offer: Offer) -> NDArray[np.float64]:
    """Moments of the requests in seconds from the start, float64 [N], ascending, over warm-up and measurement.

    Given how many there are, the moments of a Poisson process are uniform and sorted (Ross, "Stochastic processes", theorem 2.3.1); so
    exactly rate times length of them are drawn, and a difference between offered and arrived is the generator's and not chance.
    """
    import numpy

    length = offer.warmup_s + offer.seconds
    return numpy.sort(numpy.random.default_rng(offer.seed).uniform(0, length, max(1, round(offer.rate * length))))


def open_loop(target: Target, samples: Sequence[NDArray[np.float32]], offer: Offer, *, statistics: str = "") -> Load:
    """Offer a load, and measure.

    Args:
        samples: inputs float32 [n, *shape] that requests take in turn.
        statistics: host:port where the server counts over HTTP, if not at the target's own.

    Raises:
        Unavailable: not one request was answered.
    """
    times = schedule(offer)

    async def run() -> Record:
        transport = connect(target, samples, offer.timeout_s)
        record = Record(len(times))
        try:
            await _paced(transport, times, record, offer)
        finally:
            await transport.close()
        return record

    before = counts(target, statistics)
    record = _run(run)
    after = counts(target, statistics)
    _answered(target, record)
    return summary(record, offer.warmup_s, offer.seconds, offer.rate, after - before if before and after else None)


def closed_loop(
    target: Target, samples: Sequence[NDArray[np.float32]], *, in_flight: int, seconds: float, warmup_s: float = 1.0,
    timeout_s: float = 5.0, statistics: str = "",
) -> Load:  # fmt: skip
    """Keep ``in_flight`` requests under way all the time: the largest throughput, with latencies that mean little (see above)."""
    record = Record(0)

    async def run() -> Record:
        transport = connect(target, samples, timeout_s)
        try:
            await _kept_busy(transport, record, in_flight, warmup_s + seconds, timeout_s)
        finally:
            await transport.close()
        return record

    before = counts(target, statistics)
    _run(run)
    after = counts(target, statistics)
    _answered(target, record)
    return summary(record, warmup_s, seconds, None, after - before if before and after else None)


def _answered(target: Target, record: Record) -> None:
    if "ok" not in record.kinds:
        kinds = {kind: record.kinds.count(kind) for kind in KINDS if kind in record.kinds}
        raise Unavailable(f"model {target.model} at {target.address} answered none of {len(record.kinds)} requests", value=kinds)


def _run(work: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
    # asyncio's usual selector rounds a wait up to a whole millisecond; select() takes microseconds.
    with _no_pauses(), asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(work())


@contextlib.contextmanager
def _no_pauses() -> Iterator[None]:
    """The garbage collector would stop the generator for milliseconds."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def _paced(transport: Transport, times: NDArray[np.float64], record: Record, offer: Offer) -> None:
    clock = asyncio.get_running_loop().time
    record.begun = clock() + 0.02

    def ended(number: int, kind: Kind) -> None:
        record.ended[number], record.kinds[number] = clock(), kind
        record.in_flight -= 1

    for number, at in enumerate(times.tolist()):
        record.due[number] = due = record.begun + at
        # Always a turn of the loop, also when late: answers must be read, and their moments taken.
        await asyncio.sleep(max(0.0, due - clock()))
        record.sent[number] = clock()
        if record.in_flight >= offer.max_in_flight:
            record.ended[number], record.kinds[number] = clock(), "overflow"
            continue
        record.in_flight += 1
        transport.send(number, lambda kind, n=number: ended(n, kind))  # type: ignore[misc]
    deadline = clock() + offer.timeout_s + DRAIN_S
    while record.in_flight and clock() < deadline:
        await asyncio.sleep(0.005)


async def _kept_busy(transport: Transport, record: Record, in_flight: int, seconds: float, timeout_s: float) -> None:
    clock = asyncio.get_running_loop().time
    record.begun = clock()
    until = record.begun + seconds

    def ask() -> None:
        number = record.add(clock())
        record.in_flight += 1
        transport.send(number, lambda kind: ended(number, kind))

    def ended(number: int, kind: Kind) -> None:
        record.ended[number], record.kinds[number] = clock(), kind
        record.in_flight -= 1
        if record.ended[number] < until:
            ask()

    for _ in range(in_flight):
        ask()
    await asyncio.sleep(seconds)
    deadline = clock() + timeout_s + DRAIN_S
    while record.in_flight and clock() < deadline:
        await asyncio.sleep(0.005)
