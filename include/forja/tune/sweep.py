"""The sweep: candidates are served one after the other and loaded, from a coarse grid to the neighbours of the best, then its queue."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from forja.errors import ForjaError, Refused, Unavailable
from forja.settings import Settings
from forja.tune import choose
from forja.tune.choose import OVERLOAD, Candidate, Trial
from forja.tune.load import Offer, closed_loop, open_loop
from forja.tune.measured import Load
from forja.tune.subject import Served, Subject, serve

START_S, REST_S = 3.0, 1.5
"""Seconds until a Triton serves, and that a measurement takes beside its length: for the estimate."""
WARMUP_S = 0.5
RUNS = 4
"""Open loops for one candidate."""
LOADED, REFINED = 4, 2
"""Candidates of the coarse grid whose latency is measured, and rounds of neighbours."""
SECONDS_LAST = 3
"""The winner's last measurement is this many times as long as the others."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All that was measured, and what is best."""

    trials: tuple[Trial, ...]
    """In the order of their measurement; one that was measured again stands there once, with all its loads."""
    plainest: Trial
    """Triton without any settings."""
    best: Trial | None
    """The highest throughput within the bound; None when no candidate kept it."""
    queues: tuple[Trial, ...] = ()
    """The best candidate with several ends of its queue, under a load that it can't bear."""
    last: Load | None = None
    """The winner once more, for longer, at its rate."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a sweep needs."""

    settings: Settings
    subject: Subject
    bound_ms: float
    """Largest p99, in milliseconds."""
    seconds: float
    """Length of one measurement."""
    protocol: Literal["http", "grpc"]
    scratch: Path
    say: Callable[[str], None]
    most: int
    """Largest batch that the recipe allows."""
    cores: int = os.cpu_count() or 1


def estimate(now: Candidate, setup: Setup) -> float:
    """Seconds that a sweep takes at most, about."""
    one = setup.seconds + REST_S
    grid = len(choose.coarse(now, setup.most, setup.cores))
    neighbours = REFINED * 5
    closed = (grid + LOADED + neighbours) * (START_S + one)
    return closed + (LOADED + 1 + neighbours) * RUNS * one + 3 * (START_S + one) + START_S + SECONDS_LAST * setup.seconds


def run(now: Candidate, setup: Setup) -> Sweep:
    """Measure, from coarse to fine.

    Args:
        now: what the recipe and the site say now.
    """
    say, bound = setup.say, setup.bound_ms
    grid = [measure(setup, candidate, runs=0) for candidate in choose.coarse(now, setup.most, setup.cores)]
    by_throughput = sorted(grid[1:], key=lambda t: t.top.throughput if t.top else 0.0, reverse=True)
    say(f"latency of the best {LOADED} and of Triton without settings")
    measured = {t.candidate: t for t in grid}
    for candidate in dict.fromkeys([grid[0].candidate, now, *(t.candidate for t in by_throughput[:LOADED] if t.top)]):
        measured[candidate] = measure(setup, candidate, runs=RUNS)
    for _ in range(REFINED):
        order = choose.ranked(list(measured.values()), bound)
        if not order:
            break
        new = choose.finer(order[0].candidate, setup.most, bound, list(measured))
        say(f"neighbours of {order[0].candidate.title}")
        for candidate in new:
            measured[candidate] = measure(setup, candidate, runs=RUNS)
        if choose.ranked(list(measured.values()), bound)[0].candidate == order[0].candidate:
            break
    return _finished(setup, list(measured.values()))


def _finished(setup: Setup, trials: Sequence[Trial]) -> Sweep:
    """The queue of the best, and its last, longer measurement: if that is out of bounds, the next best has its turn."""
    plainest = trials[0]
    for best in choose.ranked(trials, setup.bound_ms):
        found = choose.within(best, setup.bound_ms)
        assert found is not None and found.offered is not None  # noqa: S101, PT018 - ranked leaves out the others
        queues = []
        for candidate in choose.queues(best.candidate, found.throughput, setup.bound_ms):
            queues.append(measure(setup, candidate, runs=0, rates=[OVERLOAD * found.throughput]))
        chosen = choose.best_queue(queues, setup.bound_ms)
        final = dataclasses.replace(best, candidate=chosen.candidate) if chosen else best
        last = measure(setup, final.candidate, runs=0, rates=[found.offered], times=SECONDS_LAST)
        if last.loads and choose.passes(last.loads[-1], setup.bound_ms):
            return Sweep(trials=tuple(trials), plainest=plainest, best=final, queues=tuple(queues), last=last.loads[-1])
        setup.say(f"{final.candidate.title}: not again within {setup.bound_ms:g} ms; the next best")
    return Sweep(trials=tuple(trials), plainest=plainest, best=None)


def measure(setup: Setup, candidate: Candidate, *, runs: int, rates: Sequence[float] = (), times: int = 1) -> Trial:
    """Serve a candidate and load it: open loops at ``rates``; without them a closed loop, and ``runs`` rates of ``choose.next_rate``.

    A candidate that Triton can't serve, or that answers nothing, is a trial that failed.
    """
    try:
        with serve(setup.settings, setup.subject, candidate, setup.scratch) as served:
            trial = Trial(candidate=candidate, top=None if rates else closed(setup, served, candidate))
            while (rate := choose.next_rate(trial, setup.bound_ms, runs)) is not None:
                trial = dataclasses.replace(trial, loads=(*trial.loads, opened(setup, served, rate, len(trial.loads), times)))
            for rate in rates:
                trial = dataclasses.replace(trial, loads=(*trial.loads, opened(setup, served, rate, len(trial.loads), times)))
    except (Refused, Unavailable) as error:
        trial = Trial(candidate=candidate, failed=_short(error))
    setup.say(f"{candidate.title}: {describe(trial, setup.bound_ms)}")
    return trial


def closed(setup: Setup, served: Served, candidate: Candidate) -> Load:
    """Twice as many requests under way as its instances take at once: one batch is computed, another waits."""
    width = candidate.max_batch if candidate.batching else 1
    in_flight = min(256, max(8, 2 * width * candidate.serving.instances))
    return closed_loop(
        served.target(setup.protocol), setup.subject.samples, in_flight=in_flight, seconds=setup.seconds, warmup_s=WARMUP_S,
        statistics=served.http,
    )  # fmt: skip


def opened(setup: Setup, served: Served, rate: float, seed: int, times: int) -> Load:
    """One open loop; once more when the generator itself was too slow, which another process of the machine can cause."""
    offer = Offer(rate=rate, seconds=setup.seconds * times, warmup_s=WARMUP_S, seed=seed)
    for _ in range(2):
        load = open_loop(served.target(setup.protocol), setup.subject.samples, offer, statistics=served.http)
        if not load.saturated:
            break
    return load


def describe(trial: Trial, bound_ms: float) -> str:
    """What was found, in one line."""
    if trial.failed:
        return f"failed, {trial.failed}"
    words = [f"{trial.top.throughput:.0f}/s at most"] if trial.top else []
    if best := choose.within(trial, bound_ms):
        words.append(f"{best.throughput:.0f}/s within {bound_ms:g} ms (p99 {best.p99_ms:.1f} ms)")
    elif trial.loads:
        words.append(
            "the load generator was too slow" if all(load.saturated for load in trial.loads) else f"nothing within {bound_ms:g} ms"
        )
    return ", ".join(words)


def _short(error: ForjaError) -> str:
    return " ".join(f"{error.thing}: {error.value}".split())[:200]
