"""When the doorbell rings."""

from __future__ import annotations

import pytest
from kafka.errors import KafkaError

from forja.doorbell import Level, Ring, connect, ring

EMPTY = Level(ends={}, read={})
READ = Level(ends={0: 5, 1: 7}, read={0: 5, 1: 7})
LAG = Level(ends={0: 5, 1: 9}, read={0: 5, 1: 7})
ANSWERED = Level(ends={0: 5, 1: 12}, read={0: 5, 1: 9})


@pytest.mark.parametrize(
    ("level", "lag"),
    [
        pytest.param(EMPTY, 0, id="no such topic"),
        pytest.param(READ, 0, id="all read"),
        pytest.param(LAG, 2, id="two to read"),
        pytest.param(Level(ends={0: 5, 1: 2}, read={0: 3, 1: 8}), 2, id="a topic made anew lies before the group's offset"),
        pytest.param(Level(ends={0: 5}, read={}), 5, id="a partition that the group never saw"),
    ],
)
def test_lag(level: Level, lag: int) -> None:
    assert level.lag == lag


@pytest.mark.parametrize(
    ("level", "last", "now", "expected"),
    [
        pytest.param(READ, None, 0, False, id="nothing to do"),
        pytest.param(READ, Ring(at=0, read={}), 1000, False, id="nothing to do, long after"),
        pytest.param(LAG, None, 0, True, id="first ring"),
        pytest.param(LAG, Ring(at=0, read=LAG.read), 19, False, id="not answered, too soon"),
        pytest.param(LAG, Ring(at=0, read=LAG.read), 20, True, id="not answered: again"),
        pytest.param(LAG, Ring(at=0, read=LAG.read, unanswered=2), 79, False, id="not answered three times, too soon"),
        pytest.param(LAG, Ring(at=0, read=LAG.read, unanswered=9), 600, True, id="not answered ten times: every ten minutes"),
        pytest.param(ANSWERED, Ring(at=0, read=LAG.read), 1, False, id="answered, more came, too soon"),
        pytest.param(ANSWERED, Ring(at=0, read=LAG.read), 2, True, id="answered, more came"),
    ],
)
def test_rings(level: Level, last: Ring | None, now: float, expected: bool) -> None:
    assert (ring(level, last, now=now, gap_s=20) is not None) is expected


def test_pauses_grow_until_somebody_answers() -> None:
    first = ring(LAG, None, now=0, gap_s=20)
    assert first is not None
    second = ring(LAG, first, now=20, gap_s=20)
    assert second is not None
    assert second.unanswered == 1
    third = ring(ANSWERED, second, now=22, gap_s=20)
    assert third is not None
    assert third.unanswered == 0


def test_no_broker_is_an_error_in_time() -> None:
    with pytest.raises(KafkaError):
        connect("127.0.0.1:30001", "forja-nobody")
