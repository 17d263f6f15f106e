"""What a run of the load generator found: when each request was due, left and ended, the server's own counts, and what follows."""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forja.tune.transport import Kind, Target

KINDS: tuple[Kind, ...] = ("ok", "rejected", "timeout", "overflow", "other")
LAG_MS, LAG_SHARE = 1.0, 0.25
"""The generator is too slow for what is asked when one request in a hundred leaves later than it should by more than this, and by more
than this share of the 99th percentile of the latency: then the latencies are its own."""
DRIFT = 0.01
"""It is too slow as well when its schedule takes longer than it should by more than this share."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a server counted of one model."""

    requests: int
    """Requests that it answered or refused."""
    samples: int
    """Samples that went through the model."""
    batches: int
    """Runs of the model."""
    queue_ms: float
    """Milliseconds that requests waited in it, all together."""
    infer_ms: float
    """Milliseconds that requests were computed, all together."""

    def __sub__(self, before: Counts) -> Counts:
        return Counts(**{name: value - getattr(before, name) for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a run found."""

    offered: float | None
    """Requests per second that were asked for; None for a closed loop."""
    throughput: float
    """Answers per second, errors left out."""
    sent: int
    """Requests of the measurement, those that could not be sent included."""
    errors: Mapping[str, int]
    """How many of them ended otherwise than with an answer, by kind."""
    p50_ms: float | None
    """Median latency in milliseconds, errors counted as infinite; None when it is infinite or the generator was too slow."""
    p90_ms: float | None
    p99_ms: float | None
    answered_p99_ms: float | None
    """99th percentile of those that were answered alone: what they get when a full queue refuses the others."""
    lag_ms: float
    """99th percentile of how much later than it should a request left; 0 for a closed loop."""
    saturated: bool
    """Whether the generator was too slow: latencies aren't reported then."""
    arrived: float | None
    """Requests per second that reached the server by its own count, warm-up included; None when it doesn't say."""
    batch: float | None
    """Average batch that the server made."""

    @property
    def error_share(self) -> float:
        """Share of the requests that got no answer."""
        return sum(self.errors.values()) / self.sent if self.sent else 1.0

    @property
    def rate_error(self) -> float | None:
        """Difference between what arrived and what was offered, as a share of that."""
        return None if self.offered is None or self.arrived is None else abs(self.arrived - self.offered) / self.offered


def counts(target: Target, address: str = "") -> Counts | None:
    """What a server counted of a model so far; None when there is nobody to ask over HTTP."""
    if not address and target.protocol != "http":
        return None
    version = f"/versions/{target.version}" if target.version else ""
    opener: Any = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address or target.address}/v2/models/{target.model}{version}/stats", timeout=5.0) as answer:
            found = json.loads(answer.read())["model_stats"][-1]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    stats = found["inference_stats"]
    return Counts(
        requests=stats["success"]["count"] + stats["fail"]["count"],
        samples=found["inference_count"],
        batches=found["execution_count"],
        queue_ms=stats["queue"]["ns"] / 1e6,
        infer_ms=stats["compute_infer"]["ns"] / 1e6,
    )


class Record:
    """When each request was to leave, left, and ended, in seconds of the loop's clock, and how it ended."""

    def __init__(self, count: int) -> None:
        self.begun = 0.0
        self.due = [math.nan] * count
        self.sent = [math.nan] * count
        self.ended = [math.inf] * count
        self.kinds: list[Kind] = ["timeout"] * count
        self.in_flight = 0

    def add(self, now: float) -> int:
        """A request that wasn't planned; its number."""
        self.due.append(now)
        self.sent.append(now)
        self.ended.append(math.inf)
        self.kinds.append("timeout")
        return len(self.due) - 1


def summary(record: Record, warmup_s: float, seconds: float, offered: float | None, counted: Counts | None) -> Load:
    """What a run found, of the requests that were due after the warm-up.

    Args:
        offered: requests per second of an open loop; None for a closed one.
        counted: what the server counted over the whole run.
    """
    import numpy

    due, sent, ended = (numpy.array(values) - record.begun for values in (record.due, record.sent, record.ended))
    answered = numpy.array([kind == "ok" for kind in record.kinds], dtype=bool)
    within = (due >= warmup_s) & (due < warmup_s + seconds)
    in_window = answered & (ended >= warmup_s) & (ended < warmup_s + seconds)
    latency = numpy.where(answered, ended - due, numpy.inf)[within] * 1e3
    # A generator that falls behind takes longer than the schedule to send it.
    length = warmup_s + seconds
    span = length if offered is None else max(length, float(sent.max()))
    lag = float(_percentile((sent - due)[within] * 1e3, 99)) if offered is not None else 0.0
    finite = latency[numpy.isfinite(latency)]
    late = lag > LAG_MS and lag > LAG_SHARE * _percentile(finite, 99)
    saturated = bool(late or span > (1 + DRIFT) * length)
    kinds = [kind for kind, counts_here in zip(record.kinds, within.tolist(), strict=True) if counts_here]
    p50, p90, p99 = (None if saturated else _finite(_percentile(latency, q)) for q in (50, 90, 99))
    return Load(
        offered=offered, throughput=round(int(in_window.sum()) / seconds, 2), sent=len(kinds),
        errors={kind: kinds.count(kind) for kind in KINDS[1:] if kind in kinds}, p50_ms=p50, p90_ms=p90, p99_ms=p99,
        answered_p99_ms=None if saturated else _finite(_percentile(finite, 99)), lag_ms=round(lag, 3),
        saturated=saturated, arrived=None if counted is None else counted.requests / span,
        batch=None if counted is None or not counted.batches else round(counted.samples / counted.batches, 2),
    )  # fmt: skip


def _percentile(values: Any, q: float) -> float:
    """The smallest value that ``q`` per cent of them don't exceed; infinite ones are values like others, and there is one."""
    import numpy

    return float(numpy.percentile(values, q, method="inverted_cdf")) if len(values) else math.inf


def _finite(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None
