"""What tune tries next and what it chooses, by what was measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from forja.recipes.base import Serving
from forja.tune import choose
from forja.tune.choose import Candidate, Trial
from forja.tune.measured import Load

BOUND = 100.0


def candidate(instances: int = 2, delay_us: int = 0, max_batch: int = 32, queue: int = 256, batching: bool = True) -> Candidate:
    return Candidate(max_batch=max_batch, serving=Serving(instances=instances, delay_us=delay_us, queue=queue), batching=batching)


def load(offered: float | None, p99_ms: float | None = 10.0, throughput: float | None = None, **changes: Any) -> Load:
    given: dict[str, Any] = {
        "offered": offered, "throughput": offered if throughput is None else throughput, "sent": 100, "errors": {}, "p50_ms": 1.0,
        "p90_ms": 2.0, "p99_ms": p99_ms, "answered_p99_ms": p99_ms, "lag_ms": 0.1, "saturated": False, "arrived": offered, "batch": 1.0,
    }  # fmt: skip
    return Load(**{**given, **changes})


def trial(*loads: Load, top: float | None = 1000.0, **changes: Any) -> Trial:
    return Trial(candidate=candidate(**changes), top=None if top is None else load(None, throughput=top), loads=loads)


PASSING = {
    "borne": (load(500), True),
    "at the bound": (load(500, p99_ms=100.0), True),
    "over the bound": (load(500, p99_ms=100.1), False),
    "infinite, since more than one in a hundred failed": (load(500, p99_ms=None), False),
    "not measured, since the generator was too slow": (load(500, saturated=True), False),
    "not kept up with": (load(500, throughput=480), False),
    "just kept up with": (load(500, throughput=486), True),
    "a closed loop": (load(None, throughput=900), False),
    "latency that is no number": (load(500, p99_ms=float("nan")), False),
}


@pytest.mark.parametrize("case", PASSING, ids=str)
def test_what_is_borne(case: str) -> None:
    given, wanted = PASSING[case]
    assert choose.passes(given, BOUND) is wanted


def test_the_highest_throughput_within_the_bound() -> None:
    found = choose.within(trial(load(300), load(700, p99_ms=99.0), load(900, p99_ms=150.0)), BOUND)
    assert found is not None
    assert found.throughput == 700
    assert choose.within(trial(load(900, p99_ms=150.0)), BOUND) is None
    assert choose.within(trial(), BOUND) is None


RATES: dict[str, tuple[Trial, float | None]] = {
    "first": (trial(), 700.0),
    "then higher": (trial(load(700)), 900.0),
    "higher still": (trial(load(700), load(900)), 1035.0),
    "or lower": (trial(load(700, p99_ms=200.0)), 500.0),
    "lower still": (trial(load(700, p99_ms=200.0), load(500, p99_ms=200.0)), 300.0),
    "far lower": (trial(load(700, p99_ms=200.0), load(500, p99_ms=200.0), load(300, p99_ms=200.0)), 150.0),
    "between": (trial(load(700), load(900, p99_ms=200.0)), 800.0),
    "between again": (trial(load(700), load(900, p99_ms=200.0), load(800)), 850.0),
    "enough": (trial(load(700), load(900, p99_ms=200.0), load(800), load(850)), None),
    "no closed loop": (trial(top=None), None),
    "a model that answers nothing": (trial(top=0.0), None),
}


@pytest.mark.parametrize("case", RATES, ids=str)
def test_the_next_rate(case: str) -> None:
    given, wanted = RATES[case]
    assert choose.next_rate(given, BOUND, runs=4) == (pytest.approx(wanted) if wanted else None)


def test_the_search_ends() -> None:
    """Whatever is measured: at most as many runs as allowed, no rate twice."""
    for passing in ("all", "none", "below 800"):
        found = trial()
        for _ in range(10):
            rate = choose.next_rate(found, BOUND, runs=6)
            if rate is None:
                break
            fine = passing == "all" or (passing == "below 800" and rate < 800)
            found = dataclasses.replace(found, loads=(*found.loads, load(rate, p99_ms=10.0 if fine else 500.0)))
        rates = [round(one.offered or 0) for one in found.loads]
        assert len(rates) <= 6
        assert len(set(rates)) == len(rates)


def test_the_best_comes_first_and_the_unmeasured_never() -> None:
    low, high = trial(load(400), max_batch=4), trial(load(900), max_batch=8)
    slow = trial(load(2000, p99_ms=None, saturated=True), max_batch=16)
    failed = Trial(candidate=candidate(max_batch=2), failed="Triton ended")
    over = trial(load(1500, p99_ms=400.0), max_batch=1)
    assert choose.ranked([low, slow, failed, over, high], BOUND) == [high, low]
    assert choose.ranked([slow, failed, over], BOUND) == []


SAME = {
    "fewer instances": (trial(load(1000), instances=3), trial(load(990), instances=2)),
    "no delay": (trial(load(1000), delay_us=500), trial(load(990))),
    "smaller batch": (trial(load(1000), max_batch=64), trial(load(990), max_batch=32)),
    "no batching": (trial(load(1000)), trial(load(990), batching=False)),
    "the higher of equally plain ones": (trial(load(985)), trial(load(990), queue=9)),
    "really better": (trial(load(960)), trial(load(1000), instances=3)),
}


@pytest.mark.parametrize("case", SAME, ids=str)
def test_of_equal_ones_the_plainer(case: str) -> None:
    other, wanted = SAME[case]
    assert choose.ranked([other, wanted], BOUND)[0] == wanted
    assert choose.ranked([wanted, other], BOUND)[0] == wanted


def test_the_first_candidates() -> None:
    now = candidate(instances=1, delay_us=300, max_batch=16)
    found = choose.coarse(now, 32, cores=2)
    assert not found[0].batching
    assert found[0].serving.instances == 1
    assert found[1] == now
    grid = {(c.serving.instances, c.max_batch, c.serving.delay_us) for c in found[2:]}
    assert grid == {(i, b, 0) for i in (1, 2) for b in (4, 8, 32)}
    assert len(found) == len(set(found))
    assert {c.max_batch for c in choose.coarse(candidate(max_batch=1), 1, cores=1)} == {1}
    assert max(c.serving.instances for c in choose.coarse(now, 32, cores=8)) == 8


def test_neighbours() -> None:
    best = candidate(instances=2, delay_us=0, max_batch=32)
    found = choose.finer(best, 32, BOUND, [best])
    assert {(c.serving.instances, c.serving.delay_us, c.max_batch) for c in found} == {(2, 500, 32), (2, 2000, 32), (2, 0, 16), (3, 0, 32)}
    assert choose.finer(best, 32, BOUND, [best, *found]) == []
    again = choose.finer(candidate(delay_us=2000), 64, BOUND, [])
    assert {c.serving.delay_us for c in again} == {1000, 4000, 2000}
    assert {c.max_batch for c in again} == {16, 32, 64}
    short = choose.finer(best, 32, 5.0, [best])
    assert {c.serving.delay_us for c in short} == {0, 500}  # 2 ms would be more than a tenth of the bound


def test_ends_of_the_queue_follow_what_can_be_answered_in_time() -> None:
    """Little's law: 1000 a second within 100 ms are 100 under way."""
    found = choose.queues(candidate(), 1000.0, BOUND)
    assert [c.serving.queue for c in found] == [50, 100, 200]
    assert choose.queues(candidate(instances=1), 1000.0, BOUND) == []
    assert choose.queues(candidate(batching=False), 1000.0, BOUND) == []


def queue(size: int, throughput: float, answered: float | None, saturated: bool = False) -> Trial:
    found = load(1500, p99_ms=None, throughput=throughput, answered_p99_ms=answered, saturated=saturated)
    return trial(found, top=None, queue=size)


def test_the_queue_under_too_much_load() -> None:
    small, fits, large = queue(50, 900.0, 60.0), queue(100, 1000.0, 95.0), queue(200, 1005.0, 180.0)
    assert choose.best_queue([small, fits, large], BOUND) == fits
    assert choose.best_queue([queue(50, 990.0, 50.0), fits], BOUND) == fits  # equal: the one that refuses less
    assert choose.best_queue([small, large], BOUND) == small
    assert choose.best_queue([large, queue(9, 1000.0, None), queue(8, 1000.0, 10.0, saturated=True)], BOUND) is None
    assert choose.best_queue([], BOUND) is None


def test_titles() -> None:
    assert candidate(batching=False, instances=1).title == "1 instance, no dynamic batching"
    assert candidate(delay_us=500).title == "2 instances, batch 32, 0.5 ms delay, queue 256"
    assert candidate(instances=1).title == "1 instance, batch 32, queue without end"
