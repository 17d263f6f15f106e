"""The doorbell: tells from Kafka's offsets whether there is something to ingest. It never consumes.

It is level-triggered: as long as records lie beyond the consumer group's offsets it rings again, so a ring that gets lost
costs seconds and no data. https://kafka.apache.org/documentation/#intro_concepts_and_terms
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kafka import KafkaConsumer

GAP_MOST_S = 600.0
"""Longest pause between two rings that nobody answers, for example because training holds all slots."""

SETTLE_S = 2.0
"""Seconds between a ring and the next when an ingest moved the offsets in between: it read what there was when it began."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """How far a topic and its reader are: records, by partition."""

    ends: Mapping[int, int]
    """Offset after the last committed record."""
    read: Mapping[int, int]
    """Offset up to which the group has ingested; the first offset there is when it has none yet."""

    @property
    def lag(self) -> int:
        """Records to ingest, at most: compacted and transactional topics have gaps."""
        return sum(max(0, end - self.read.get(p, 0)) for p, end in self.ends.items())


@dataclass(frozen=True, kw_only=True)
class Ring:
    """The last ring."""

    at: float
    """When, seconds of a monotonic clock."""
    read: Mapping[int, int]
    """Level.read at that moment."""
    unanswered: int = 0
    """Rings before it that moved nothing."""


def ring(level: Level, last: Ring | None, *, now: float, gap_s: float) -> Ring | None:
    """The ring that is due, None when none is: there is lag, and the last ring is answered, or old.

    Args:
        gap_s: seconds after the first ring that nobody answered; they double with each further one.
    """
    if not level.lag:
        return None
    if last is None:
        return Ring(at=now, read=level.read)
    answered = dict(level.read) != dict(last.read)
    gap = min(SETTLE_S, gap_s) if answered else min(GAP_MOST_S, gap_s * 2**last.unanswered)
    if now - last.at < gap:
        return None
    return Ring(at=now, read=level.read, unanswered=0 if answered else last.unanswered + 1)


def connect(bootstrap: str, group: str) -> KafkaConsumer:
    """A consumer that joins no group and reads no record; KafkaError when no broker answers within five seconds."""
    from kafka import KafkaConsumer

    return KafkaConsumer(
        bootstrap_servers=bootstrap, group_id=group, client_id="forja-doorbell", enable_auto_commit=False,
        # With read_committed the end is the last stable offset: what ingest can see.
        isolation_level="read_committed", auto_offset_reset="none", bootstrap_timeout_ms=5000, request_timeout_ms=10_000,
    )  # fmt: skip


def level(client: KafkaConsumer, topic: str) -> Level:
    """Offsets of ``topic`` now; empty while the topic doesn't exist. Raises KafkaError when the broker doesn't answer."""
    from kafka import TopicPartition

    partitions = [TopicPartition(topic, p) for p in sorted(_partitions(client, topic))]
    if not partitions:
        return Level(ends={}, read={})
    ends, begins = client.end_offsets(partitions), client.beginning_offsets(partitions)
    read = {p.partition: max(_committed(client, p), begins[p]) for p in partitions}
    return Level(ends={p.partition: ends[p] for p in partitions}, read=read)


def _partitions(client: Any, topic: str) -> set[int]:
    return client.partitions_for_topic(topic) or set()


def _committed(client: Any, partition: Any) -> int:
    return client.committed(partition) or 0
