"""Events in Kafka: topics, offsets and the producer's side. Offsets that count are in the lake, not in Kafka."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forja.errors import BadInput, Unavailable
from forja.recipes.base import Source

if TYPE_CHECKING:
    from kafka import KafkaConsumer


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One event: what a producer in a plant sends."""

    key: str
    label: str
    payload: bytes


@contextmanager
def reachable(bootstrap: str) -> Iterator[None]:
    """Turn the client's ways to say that no broker answers into Unavailable."""
    from kafka.errors import KafkaConnectionError, KafkaTimeoutError

    try:
        yield
    except (KafkaTimeoutError, KafkaConnectionError) as error:
        raise Unavailable("Kafka doesn't answer", value=bootstrap, do="./forja status, then ./forja up; or set FORJA_KAFKA") from error


@contextmanager
def consumer(bootstrap: str, group: str | None = None) -> Iterator[KafkaConsumer]:
    """A consumer that commits nothing by itself, reads only committed records and starts where it is told."""
    from kafka import KafkaConsumer

    with reachable(bootstrap):
        client = KafkaConsumer(
            bootstrap_servers=bootstrap, group_id=group, enable_auto_commit=False, auto_offset_reset="none",
            isolation_level="read_committed", bootstrap_timeout_ms=10_000, max_poll_records=5_000,
            max_partition_fetch_bytes=8 << 20,
        )  # fmt: skip
        try:
            yield client
        finally:
            client.close(autocommit=False)


@dataclass(frozen=True, kw_only=True)
class Topic:
    """A topic as the broker describes it. A topic that was deleted and made again has another id."""

    name: str
    id: str
    partitions: tuple[int, ...]


def describe(bootstrap: str, name: str) -> Topic | None:
    """The topic, None when the broker has none of that name."""
    with admin(bootstrap) as client:
        (answer,) = client.describe_topics([name])
    if answer["error_code"]:
        return None
    return Topic(name=name, id=str(answer["topic_id"]), partitions=tuple(sorted(p["partition_index"] for p in answer["partitions"])))


@contextmanager
def admin(bootstrap: str) -> Iterator[Any]:
    """An admin client."""
    from kafka import KafkaAdminClient

    with reachable(bootstrap):
        client = KafkaAdminClient(bootstrap_servers=bootstrap, bootstrap_timeout_ms=10_000)
        try:
            yield client
        finally:
            client.close()


def ensure_topic(bootstrap: str, source: Source) -> Topic:
    """The recipe's topic, created when it isn't there."""
    topic = describe(bootstrap, source.topic)
    if topic is None:
        from kafka.errors import TopicAlreadyExistsError

        with admin(bootstrap) as client, contextlib.suppress(TopicAlreadyExistsError):  # somebody else was faster
            wanted = {"num_partitions": source.partitions, "replication_factor": 1}
            client.create_topics({source.topic: wanted}, wait_for_metadata=True)
        topic = describe(bootstrap, source.topic)
    if topic is None:
        raise Unavailable(f"topic {source.topic} was created but isn't there yet", do="try again")
    return topic


def keys_in(bootstrap: str, topic: Topic) -> set[str]:
    """Keys of all records that the topic holds now."""
    found: set[str] = set()
    for records in read(bootstrap, topic):
        found.update(r.key.decode(errors="replace") for r in records if r.key)
    return found


def read(bootstrap: str, topic: Topic) -> Iterator[list[Any]]:
    """All records that the topic holds now, in batches."""
    from kafka import TopicPartition

    with consumer(bootstrap) as client:
        partitions = [TopicPartition(topic.name, p) for p in topic.partitions]
        client.assign(partitions)
        ends = client.end_offsets(partitions)
        client.seek_to_beginning(*partitions)
        while any(client.position(p) < ends[p] for p in partitions):
            yield from client.poll(timeout_ms=500).values()


def produce(bootstrap: str, source: Source, samples: Iterable[Sample]) -> tuple[int, int]:
    """Send samples that the topic doesn't have yet.

    Returns:
        How many were sent, and how many were skipped because the topic has their key.
    """
    from kafka import KafkaProducer

    topic = ensure_topic(bootstrap, source)
    known = keys_in(bootstrap, topic)
    sent = skipped = 0
    with reachable(bootstrap):
        producer = KafkaProducer(
            bootstrap_servers=bootstrap, acks="all", enable_idempotence=True, linger_ms=20, bootstrap_timeout_ms=10_000
        )
        try:
            futures = []
            for sample in samples:
                if sample.key in known:
                    skipped += 1
                    continue
                known.add(sample.key)
                headers = [(source.label_header, sample.label.encode())]
                futures.append(producer.send(source.topic, key=sample.key.encode(), value=sample.payload, headers=headers))
                sent += 1
            producer.flush(timeout=120)
            for future in futures:
                future.get(timeout=1)  # raises what the broker refused
        finally:
            producer.close(timeout=30)
    return sent, skipped


def require(bootstrap: str, source: Source, recipe: str) -> Topic:
    """The recipe's topic; BadInput when it isn't there."""
    topic = describe(bootstrap, source.topic)
    if topic is None:
        raise BadInput(f"Kafka topic of recipe {recipe}", value=source.topic, allowed="a topic that exists", do=f"./forja produce {recipe}")
    return topic
