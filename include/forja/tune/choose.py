"""What tune tries and what it chooses: pure functions over candidates and what was measured of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from forja.recipes.base import Serving
from forja.serving.config import bounded
from forja.tune.measured import Load

FRACTIONS = (0.7, 0.9, 0.5, 0.3)
"""Shares of a closed loop's throughput that are offered, in the order of their promise; see ``next_rate``."""
KEPT_UP = 0.97
"""Share of what was offered that must be answered: below it the queue grows, and the latency is only as low as the run was short."""
SAME = 0.03
"""Throughputs that differ by less than this share are the same; the plainer candidate wins."""
QUEUES = (0.5, 1.0, 2.0)
"""Ends of the queue that are tried, as shares of what the server answers within the latency bound (Little 1961: L = lambda W)."""
OVERLOAD = 1.5
"""Share of its best throughput that is offered to a candidate to see what its queue refuses."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Settings of Triton that are tried."""

    max_batch: int
    serving: Serving
    batching: bool = True
    """False for Triton without a dynamic batcher."""

    @property
    def title(self) -> str:
        """A short name for people."""
        count = f"{self.serving.instances} instance{'s' if self.serving.instances > 1 else ''}"
        if not self.batching:
            return f"{count}, no dynamic batching"
        delay = f", {self.serving.delay_us / 1000:g} ms delay" if self.serving.delay_us else ""
        queue = f", queue {self.serving.queue}" if bounded(self.serving) else ", queue without end"
        return f"{count}, batch {self.max_batch}{delay}{queue}"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What was measured of a candidate."""

    candidate: Candidate
    top: Load | None = None
    """A closed loop: as much as it bears at all."""
    loads: tuple[Load, ...] = ()
    """Open loops at several rates."""
    failed: str = ""
    """Why nothing was measured, when Triton could not serve it."""


def plainest(recipe: Serving, max_batch: int) -> Candidate:
    """Triton as it is without any settings: one instance, no dynamic batching."""
    return Candidate(max_batch=max_batch, serving=dataclasses.replace(recipe, instances=1, delay_us=0), batching=False)


def coarse(now: Candidate, most: int, cores: int) -> list[Candidate]:
    """First candidates: the plainest, what is set now, and instances by largest batch without a delay.

    Args:
        most: largest batch that the recipe allows.
    """
    batches = sorted({min(4, most), max(1, most // 4), most})
    grid = [
        Candidate(max_batch=batch, serving=dataclasses.replace(now.serving, instances=count, delay_us=0))
        for count in sorted({1, min(2, cores), cores})
        for batch in batches
    ]
    return _unique([plainest(now.serving, most), now, *grid])


def finer(best: Candidate, most: int, bound_ms: float, tried: Sequence[Candidate]) -> list[Candidate]:
    """Neighbours of the best candidate that weren't tried: other delays, the next batches, one instance more.

    Args:
        most: largest batch that the recipe allows.
        bound_ms: largest p99; a delay takes a tenth of it at most.
        tried: what was measured already.
    """
    serving = best.serving
    delays = (serving.delay_us // 2, serving.delay_us * 2) if serving.delay_us else (500, 2000)
    found = [dataclasses.replace(best, serving=dataclasses.replace(serving, delay_us=d)) for d in delays if 100 <= d <= bound_ms * 100]
    found += [dataclasses.replace(best, max_batch=b) for b in (best.max_batch // 2, best.max_batch * 2) if 1 <= b <= most]
    found.append(dataclasses.replace(best, serving=dataclasses.replace(serving, instances=serving.instances + 1)))
    return [c for c in _unique(found) if c not in tried]


def queues(best: Candidate, throughput: float, bound_ms: float) -> list[Candidate]:
    """The best candidate with other ends of its queue; none where Triton's queue has no end anyway.

    What waits behind ``throughput`` times the latency bound can't be answered within the bound.
    """
    if not bounded(best.serving) or not best.batching:
        return []
    fits = throughput * bound_ms / 1000
    sizes = sorted({min(100_000, max(1, round(share * fits))) for share in QUEUES})
    return [dataclasses.replace(best, serving=dataclasses.replace(best.serving, queue=size)) for size in sizes]


def passes(load: Load, bound_ms: float) -> bool:
    """Whether a load was borne within the latency bound. A latency that wasn't measured, or is infinite, doesn't pass."""
    if load.offered is None or load.saturated or load.p99_ms is None or not load.p99_ms <= bound_ms:
        return False
    return load.throughput >= KEPT_UP * load.offered


def within(trial: Trial, bound_ms: float) -> Load | None:
    """The largest load that a candidate bore within the latency bound; None when it bore none."""
    return max((load for load in trial.loads if passes(load, bound_ms)), key=lambda load: load.throughput, default=None)


def next_rate(trial: Trial, bound_ms: float, runs: int) -> float | None:
    """The next rate to offer, in requests per second; None when what was measured is enough.

    It goes down from a share of the closed loop's throughput until a load is borne within the bound, and then halves the distance to
    the smallest that wasn't.

    Args:
        runs: open loops for one candidate at most.
    """
    if trial.top is None or not trial.top.throughput or len(trial.loads) >= runs:
        return None
    rates = [(load.offered or 0.0, passes(load, bound_ms)) for load in trial.loads]
    good = max((rate for rate, passed in rates if passed), default=0.0)
    bad = min((rate for rate, passed in rates if not passed and rate > good), default=0.0)
    offered = {round(rate) for rate, _ in rates}
    if good and bad:
        rate = (good + bad) / 2
    elif good:
        rate = max(FRACTIONS) * trial.top.throughput if good < 0.9 * max(FRACTIONS) * trial.top.throughput else 1.15 * good
    else:
        rate = next((f * trial.top.throughput for f in FRACTIONS if not bad or f * trial.top.throughput < 0.99 * bad), bad / 2)
    return None if round(rate) in offered or rate < 1 else rate


def ranked(trials: Sequence[Trial], bound_ms: float) -> list[Trial]:
    """Trials that bore a load within the bound, the best first; of equal ones (see ``SAME``) the plainer. The others are left out."""
    found = [(load.throughput, trial) for trial in trials if (load := within(trial, bound_ms)) is not None]
    order: list[Trial] = []
    while found:
        most = max(throughput for throughput, _ in found)
        same = [item for item in found if item[0] >= (1 - SAME) * most]
        chosen = min(same, key=lambda item: (_fuss(item[1].candidate), -item[0]))
        order.append(chosen[1])
        found.remove(chosen)
    return order


def best_queue(trials: Sequence[Trial], bound_ms: float) -> Trial | None:
    """Of loads beyond what can be borne: the queue that answers most while those it answers get theirs within the bound.

    None when no queue does, or none was measured.
    """
    found = [
        (load.throughput, trial)
        for trial in trials
        for load in trial.loads
        if not load.saturated and load.answered_p99_ms is not None and load.answered_p99_ms <= bound_ms
    ]
    most = max((throughput for throughput, _ in found), default=0.0)
    same = [trial for throughput, trial in found if throughput >= (1 - SAME) * most]
    return max(same, key=lambda trial: trial.candidate.serving.queue, default=None)


def _fuss(candidate: Candidate) -> tuple[bool, int, int, int]:
    return candidate.batching, candidate.serving.instances, candidate.serving.delay_us, candidate.max_batch


def _unique(candidates: Sequence[Candidate]) -> list[Candidate]:
    return list(dict.fromkeys(candidates))
