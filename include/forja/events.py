"""Events in Kafka: topics, offsets and the producer's side. Offsets that count are in the lake, not in Kafka."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forja.errors import BadInput, Unavailable
from forja.recipes.base import Source

if TYPE_CHECKING:
    from kafka import KafkaConsumer

STILL_S = 30.0
"""Seconds without a new record after which a reader that waits for one gives Kafka up; its client would wait for ever."""
ASK_MS = 30_000
"""Milliseconds that Kafka has to answer a question about offsets."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One event: what a producer in a plant sends."""

    key: str
    label: str
    payload: bytes


@contextmanager
def reachable(bootstrap: str) -> Iterator[None]:
    """Turn the errors of Kafka's client into ours: BadInput for what trying again can't help, else Unavailable."""
    from kafka import errors

    useless = (
        errors.UnsupportedCodecError, errors.AuthorizationError, errors.SaslAuthenticationFailedError, errors.InvalidTopicError,
        errors.MessageSizeTooLargeError, errors.RecordListTooLargeError, errors.PolicyViolationError, errors.InvalidPartitionsError,
        errors.InvalidReplicationFactorError, errors.InvalidConfigurationError, errors.UnsupportedVersionError,
    )  # fmt: skip
    try:
        yield
    except errors.OffsetOutOfRangeError as error:
        raise Unavailable("Kafka deleted records while they were read", value=str(error), do="start it again") from error
    except useless as error:
        raise BadInput(
            f"Kafka at {bootstrap} refuses, or its records can't be read", value=str(error), do="see the error's name"
        ) from error
    except errors.KafkaError as error:
        do = "./forja status, then ./forja up; or set FORJA_KAFKA"
        raise Unavailable(f"Kafka doesn't answer ({error})", value=bootstrap, do=do) from error


def watch(bootstrap: str) -> Callable[[object], None]:
    """A function to call with the position of a reader, again and again.

    It raises Unavailable when that has been the same for ``STILL_S``: Kafka's client says nothing when brokers go away.
    """
    last: object = None
    since = time.monotonic()

    def moved(position: object) -> None:
        nonlocal last, since
        now = time.monotonic()
        if position != last:
            last, since = position, now
        elif now - since > STILL_S:
            do = "./forja status, then ./forja up; or set FORJA_KAFKA"
            raise Unavailable(f"Kafka sent nothing for {STILL_S:g} s, and has more records", value=bootstrap, do=do)

    return moved


def poll(client: KafkaConsumer, timeout_ms: int, max_records: int | None = None) -> dict[Any, list[Any]]:
    """The next records by partition; none when Kafka has sent none in time.

    Raises:
        BadInput: the name of a record's header is no UTF-8, which Kafka's client can't read past.
    """
    try:
        return dict(client.poll(timeout_ms=timeout_ms, max_records=max_records))
    except UnicodeDecodeError as error:
        do = "correct the producer, delete the topic's records up to there (kafka-delete-records), and see the recipe's lost_offsets"
        raise BadInput("a record has a header whose name is no UTF-8", value=error.object[:40], allowed="UTF-8", do=do) from error


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
            client.close(autocommit=False, timeout_ms=5_000)


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


def keys_in(bootstrap: str, topic: Topic) -> set[bytes]:
    """Keys of all records that the topic holds now, as they are: producers needn't write text."""
    found: set[bytes] = set()
    for records in read(bootstrap, topic):
        found.update(r.key for r in records if r.key is not None)
    return found


def read(bootstrap: str, topic: Topic) -> Iterator[list[Any]]:
    """All records that the topic holds now, in batches.

    Raises:
        Unavailable: Kafka doesn't answer, at first or any more.
    """
    from kafka import TopicPartition

    with consumer(bootstrap) as client:
        partitions = [TopicPartition(topic.name, p) for p in topic.partitions]
        client.assign(partitions)
        ends = client.end_offsets(partitions, timeout_ms=ASK_MS)
        for partition, begin in client.beginning_offsets(partitions, timeout_ms=ASK_MS).items():
            client.seek(partition, begin)
        moved = watch(bootstrap)
        while any(client.position(p) < ends[p] for p in partitions):
            yield from poll(client, timeout_ms=500).values()
            moved([client.position(p) for p in partitions])


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
                key = sample.key.encode()
                if key in known:
                    skipped += 1
                    continue
                known.add(key)
                headers = [(source.label_header, sample.label.encode())]
                futures.append(producer.send(source.topic, key=key, value=sample.payload, headers=headers))
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
