"""Lines of a pod's log: a read goes on after the last line that was told, by the node's own clock. A new triggerer tells some again."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Iterator

MARGIN_S = 60
"""The API cuts logs by seconds before now, so more is read than is new; clocks of node and Airflow may differ by this much."""


def since_seconds(after: datetime.datetime | None) -> int | None:
    """How far back to read, for lines after a moment; None for all of them."""
    if after is None:
        return None
    return max(1, math.ceil((datetime.datetime.now(datetime.UTC) - after).total_seconds())) + MARGIN_S


def new(lines: Iterable[str], after: datetime.datetime | None) -> Iterator[tuple[datetime.datetime, str]]:
    """Moment and text of each line that was written after ``after``.

    Args:
        lines: as the API gives them with timestamps; what has none is the API's own and is left out.
    """
    for line in lines:
        stamp, _, text = line.rstrip("\r\n").partition(" ")
        try:
            moment = datetime.datetime.fromisoformat(stamp)
        except ValueError:
            continue
        if moment.tzinfo is not None and (after is None or moment > after):
            yield moment, text


def moment(value: datetime.datetime | str | None) -> datetime.datetime | None:
    """A moment as it comes back from a trigger's event."""
    return datetime.datetime.fromisoformat(value) if isinstance(value, str) else value
