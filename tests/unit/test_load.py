"""The load generator against a small server whose faults are known: it must find them, and notice when it is itself too slow."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from forja.errors import BadInput, Unavailable
from forja.tune import load, measured
from forja.tune.load import Offer, closed_loop, open_loop, schedule
from forja.tune.measured import Load, Record, summary
from forja.tune.transport import Kind, Target

SAMPLES = [np.full((1, 4), i, np.float32) for i in range(3)]


@dataclass
class Server:
    """Answers inference after ``answer(number)`` gives its delay in seconds and its status; counts what arrives."""

    answer: Callable[[int], tuple[float, int]] = lambda number: (0.001, 200)
    arrived: int = 0
    seen: list[bytes] = field(default_factory=list)
    port: int = 0

    @property
    def target(self) -> Target:
        return Target(address=f"127.0.0.1:{self.port}", model="m")

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(
                    next((line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), b"0")
                )
                body = await reader.readexactly(length)
                if head.startswith(b"GET"):
                    zero = {"count": self.arrived, "ns": 0}
                    stats = {"success": zero, "fail": {"count": 0}, "queue": {"ns": 0}, "compute_infer": {"ns": 0}}
                    counted = {"inference_count": self.arrived, "execution_count": max(1, self.arrived // 4), "inference_stats": stats}
                    content, status = json.dumps({"model_stats": [counted]}).encode(), 200
                else:
                    self.seen.append(body)
                    delay, status = self.answer(self.arrived)
                    self.arrived += 1
                    await asyncio.sleep(delay)
                    content = b"{}"
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(content), content))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


@pytest.fixture
def server() -> Iterator[Server]:
    """A server in a thread of its own."""
    made, started = Server(), threading.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        listening = await asyncio.start_server(made.talk, "127.0.0.1", 0)
        made.port = listening.sockets[0].getsockname()[1]
        started.set()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(5)
    yield made
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)


def offer(**changes: Any) -> Offer:
    return Offer(**{"rate": 200.0, "seconds": 0.6, "warmup_s": 0.2, "timeout_s": 1.0, **changes})


def test_the_schedule_is_a_poisson_process_of_exactly_that_rate() -> None:
    times = schedule(offer(rate=5000.0, seconds=3.8))
    gaps = np.diff(times)
    assert len(times) == 20_000
    assert (gaps >= 0).all()
    assert (times >= 0).all()
    assert times.max() <= 4.0
    # Gaps of a Poisson process are exponential: their deviation is their mean, and exp(-1) of them are longer than it.
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.03)
    assert (gaps > gaps.mean()).mean() == pytest.approx(math.exp(-1), abs=0.015)


def test_the_schedule_follows_its_seed() -> None:
    assert (schedule(offer()) == schedule(offer())).all()
    assert (schedule(offer()) != schedule(offer(seed=1))).any()


def test_what_is_offered_arrives(server: Server) -> None:
    found = open_loop(server.target, SAMPLES, offer())
    assert server.arrived == 160
    assert found.arrived == pytest.approx(200, rel=0.02)
    assert found.rate_error is not None
    assert found.rate_error <= 0.02
    assert (found.offered, found.errors, found.error_share) == (200.0, {}, 0.0)
    assert 100 <= found.sent <= 140
    assert found.batch == pytest.approx(4, abs=0.2)
    assert len({body[-16:] for body in server.seen}) == 3  # the samples take turns


def test_arrivals_that_the_server_lacks_are_an_error(server: Server) -> None:
    """Must fail: a server that counts fewer than were offered."""
    counted = iter([_counts(0), _counts(100)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "counts", lambda *_: next(counted))
        found = open_loop(server.target, SAMPLES, offer())
    assert found.rate_error == pytest.approx(60 / 160, abs=0.02)


def _counts(requests: int) -> measured.Counts:
    return measured.Counts(requests=requests, samples=requests, batches=max(1, requests), queue_ms=0.0, infer_ms=0.0)


def test_a_stall_counts_for_all_that_were_due_meanwhile(server: Server) -> None:
    """The server stops for 0.4 s once. Whoever was due then waited; a client that waits for answers would have asked only once."""
    stopped = {"until": 0.0}

    def answer(number: int) -> tuple[float, int]:
        now = time.monotonic()
        if number == 60:
            stopped["until"] = now + 0.4
        return max(0.001, stopped["until"] - now), 200

    server.answer = answer
    opened = open_loop(server.target, SAMPLES, offer(rate=200.0, seconds=1.0))
    stopped["until"] = 0.0
    server.answer = lambda number: (0.4 if number == server.arrived_at else 0.001, 200)
    server.arrived_at = server.arrived + 30  # type: ignore[attr-defined]
    closed = closed_loop(server.target, SAMPLES, in_flight=1, seconds=1.0, warmup_s=0.0)
    assert opened.p90_ms is not None
    assert closed.p90_ms is not None
    assert opened.p90_ms > 100
    assert closed.p90_ms < 50


def test_latency_counts_from_the_moment_when_a_request_was_due() -> None:
    """Must fail: counted from when it was sent, it would be 1 ms."""
    record = _record([(0.0, 0.5, 0.501, "ok")] * 100)
    found = summary(record, 0.0, 1.0, 100.0, None)
    assert found.answered_p99_ms is None or found.answered_p99_ms == pytest.approx(501)
    assert found.lag_ms == pytest.approx(500)
    assert found.saturated


def _record(rows: list[tuple[float, float, float, Kind]]) -> Record:
    record = Record(len(rows))
    for i, (due, sent, ended, kind) in enumerate(rows):
        record.due[i], record.sent[i], record.ended[i], record.kinds[i] = due, sent, ended, kind
    return record


SUMMARIES: dict[str, tuple[list[tuple[float, float, float, Kind]], dict[str, Any]]] = {
    "all answered": ([(i / 100, i / 100, i / 100 + 0.01, "ok") for i in range(100)], {"p50_ms": 10.0, "p99_ms": 10.0, "sent": 100}),
    "one in a hundred not": (
        [(i / 100, i / 100, i / 100 + 0.01, "ok" if i else "rejected") for i in range(100)],
        {"p99_ms": 10.0, "errors": {"rejected": 1}},
    ),
    "two in a hundred not": (
        [(i / 100, i / 100, i / 100 + 0.01, "ok" if i > 1 else "overflow") for i in range(100)],
        {"p99_ms": None, "p90_ms": 10.0, "answered_p99_ms": 10.0, "errors": {"overflow": 2}},
    ),
    "most not": (
        [(i / 100, i / 100, i / 100 + 0.01, "ok" if i > 60 else "timeout") for i in range(100)],
        {"p50_ms": None, "p99_ms": None, "answered_p99_ms": 10.0},
    ),
    "late by less than a millisecond": ([(i / 100, i / 100 + 0.0009, i / 100 + 0.002, "ok") for i in range(100)], {"saturated": False}),
    "late, but little of the latency": ([(i / 100, i / 100 + 0.01, i / 100 + 0.1, "ok") for i in range(100)], {"saturated": False}),
    "late, and most of the latency": (
        [(i / 100, i / 100 + 0.01, i / 100 + 0.012, "ok") for i in range(100)],
        {"saturated": True, "p50_ms": None, "p99_ms": None, "answered_p99_ms": None},
    ),
    "falls behind": (
        [(i / 100, i / 100 * 1.02, i / 100 * 1.02 + 0.5, "ok") for i in range(100)],
        {"saturated": True, "p99_ms": None},
    ),
}


@pytest.mark.parametrize("case", SUMMARIES, ids=str)
def test_summaries(case: str) -> None:
    rows, wanted = SUMMARIES[case]
    found = summary(_record(rows), 0.0, 0.995, 100.0, None)
    for name, value in wanted.items():
        assert getattr(found, name) == (pytest.approx(value) if isinstance(value, float) else value), name


def test_the_warm_up_does_not_count() -> None:
    rows: list[tuple[float, float, float, Kind]] = [(i / 100, i / 100, i / 100 + (1.0 if i < 50 else 0.01), "ok") for i in range(100)]
    found = summary(_record(rows), 0.5, 0.5, 100.0, None)
    assert (found.sent, found.p99_ms) == (50, 10.0)


def test_a_full_queue_is_told_from_other_errors(server: Server) -> None:
    server.answer = lambda number: (0.001, {0: 503, 1: 400, 2: 500}.get(number % 5, 200))
    found = open_loop(server.target, SAMPLES, offer())
    assert set(found.errors) == {"rejected", "other"}
    assert found.errors["rejected"] == pytest.approx(found.sent / 5, abs=8)
    assert found.errors["other"] == pytest.approx(2 * found.sent / 5, abs=8)
    assert (found.p50_ms, found.p99_ms) == (None, None)  # three of five got no answer
    assert found.throughput == pytest.approx(80, abs=20)


def test_a_request_is_given_up(server: Server) -> None:
    server.answer = lambda number: (5.0 if number % 4 == 0 else 0.001, 200)
    began = time.monotonic()
    found = open_loop(server.target, SAMPLES, offer(timeout_s=0.2))
    assert time.monotonic() - began < 4
    assert found.errors["timeout"] == pytest.approx(found.sent / 4, abs=8)


def test_what_is_not_sent_is_an_error_and_not_forgotten(server: Server) -> None:
    server.answer = lambda number: (0.1, 200)
    found = open_loop(server.target, SAMPLES, offer(max_in_flight=5))
    assert found.sent == pytest.approx(120, abs=20)
    assert found.errors["overflow"] > 40
    assert found.p99_ms is None
    assert server.arrived + found.errors["overflow"] <= 160


def test_it_notices_that_it_is_too_slow(server: Server) -> None:
    """Must fail: more than any Python can send."""
    found = open_loop(server.target, SAMPLES, offer(rate=100_000.0, seconds=0.05, warmup_s=0.0, max_in_flight=50))
    assert found.saturated
    assert (found.p50_ms, found.p90_ms, found.p99_ms, found.answered_p99_ms) == (None,) * 4


def test_a_closed_loop_keeps_requests_under_way(server: Server) -> None:
    server.answer = lambda number: (0.05, 200)
    found = closed_loop(server.target, SAMPLES, in_flight=10, seconds=0.6, warmup_s=0.1)
    assert found.throughput == pytest.approx(200, rel=0.25)
    assert (found.offered, found.lag_ms, found.saturated, found.rate_error) == (None, 0.0, False, None)


@pytest.mark.parametrize("run", [lambda t: open_loop(t, SAMPLES, offer()), lambda t: closed_loop(t, SAMPLES, in_flight=2, seconds=0.1)])
def test_nobody_answers(run: Callable[[Target], Load]) -> None:
    with pytest.raises(Unavailable, match=r"answered none of \d+ requests: got \{'other'"):
        run(Target(address="127.0.0.1:9", model="m"))


@pytest.mark.parametrize(
    ("name", "value"), [("rate", 0.0), ("seconds", 0.0), ("timeout_s", 0.0), ("max_in_flight", 0), ("max_in_flight", 901)]
)
def test_offers_that_make_no_sense(name: str, value: float) -> None:
    with pytest.raises(BadInput, match=f"field {name}"):
        offer(**{name: value})


def test_a_protocol_that_there_is_none_of() -> None:
    with pytest.raises(BadInput, match="http or grpc"):
        Target(address="x:1", model="m", protocol="smtp")  # type: ignore[arg-type]
