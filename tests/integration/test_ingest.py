"""Exactly-once ingest against the real Kafka and real Delta tables."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from integration.conftest import Stack

from forja import envs, events, recipes
from forja.errors import BadInput, Conflict, Unavailable
from forja.events import Sample
from forja.lake import Lake, table_digest
from forja.recipes.base import Recipe
from forja.settings import ROOT, Settings
from forja.stages import ingest
from forja.stages.base import Outcome, Work

PNG = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """A topic and a lake of one test's own."""

    settings: Settings
    recipe: Recipe

    @property
    def lake(self) -> Lake:
        return Lake(self.settings.lake)

    @property
    def path(self) -> str:
        return ingest.table_path(self.recipe.team, self.recipe.name)

    def ingest(self, check: Callable[[], None] = lambda: None, **source: object) -> Outcome:
        recipe = dataclasses.replace(self.recipe, source=dataclasses.replace(self.recipe.source, **source))  # type: ignore[arg-type]
        work = Work(settings=self.settings, lake=self.lake, folder="vision/x", key="0" * 32, scratch=Path(), check=check)
        return ingest.run(ingest.plan(recipe, {}), work)

    def produce(self, count: int, start: int = 0) -> None:
        events.produce(self.settings.kafka, self.recipe.source, (sample(i) for i in range(start, start + count)))

    def rows(self) -> list[tuple[str, int, int]]:
        table = self.lake.table(self.path).to_pyarrow_table(columns=["topic_id", "partition", "offset"])
        return sorted(zip(*(c.to_pylist() for c in table.columns), strict=True))


def sample(number: int) -> Sample:
    return Sample(key=f"s-{number}", label="1", payload=PNG + str(number).encode())


@pytest.fixture
def place(stack: Stack, tmp_path: Path) -> Place:
    stack.need("kafka")
    recipe = recipes.load("digits")
    recipe = dataclasses.replace(recipe, source=dataclasses.replace(recipe.source, topic=f"test.{uuid.uuid4().hex[:8]}"))
    return Place(settings=dataclasses.replace(stack.settings, lake=str(tmp_path / "lake")), recipe=recipe)


def test_every_record_once_and_then_nothing(place: Place) -> None:
    place.produce(500)
    first = place.ingest()
    assert first.metrics == {"rows": 500, "bad": 0}
    again = place.ingest()
    assert again.metrics["rows"] == 0
    assert again.facts == first.facts
    place.produce(510)  # 500 of them are known
    assert place.ingest().metrics["rows"] == 10
    assert len(set(place.rows())) == len(place.rows()) == 510


def test_a_bounded_batch_goes_on_where_it_ended(place: Place) -> None:
    place.produce(250)
    taken = [place.ingest(max_records=100).metrics["rows"] for _ in range(4)]
    assert taken == [100, 100, 50, 0]
    assert len(set(place.rows())) == len(place.rows()) == 250


def send(place: Place, records: Iterable[tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]]) -> None:
    from kafka import KafkaProducer

    events.ensure_topic(place.settings.kafka, place.recipe.source)
    producer = KafkaProducer(bootstrap_servers=place.settings.kafka)
    for key, value, headers in records:
        producer.send(place.recipe.source.topic, key=key, value=value, headers=headers)
    producer.flush()
    producer.close()


def test_bad_records_stay_with_their_error(place: Place) -> None:
    label = [("label", b"1")]
    send(place, [
        (b"good", PNG + b"x", label), (None, PNG, label), (b"a", PNG, []), (b"b", None, label), (b"c", b"hello", label),
        (b"d", b"\xff\xd8\xff..", label),
    ])  # fmt: skip
    assert place.ingest().metrics == {"rows": 6, "bad": 4}
    table = place.lake.table(place.path).to_pyarrow_table()
    found = dict(zip(table["key"].to_pylist(), table["error"].to_pylist(), strict=True))
    assert found == {"good": None, "d": None, "": "no key", "a": "no header label", "b": "no value", "c": "neither PNG nor JPEG"}


def test_a_binary_key_is_a_row_error_and_is_known_again(place: Place) -> None:
    label = [("label", b"1")]
    send(place, [(b"\xff", PNG, label), (b"\xfe", PNG, label), (b"", PNG, label)])
    assert place.ingest().metrics == {"rows": 3, "bad": 3}
    topic = events.require(place.settings.kafka, place.recipe.source, "digits")
    assert events.keys_in(place.settings.kafka, topic) == {b"\xff", b"\xfe", b""}


def test_missing_and_empty_topics_are_named(place: Place) -> None:
    with pytest.raises(BadInput, match=rf"topic of recipe digits: got '{place.recipe.source.topic}'.*forja produce digits"):
        place.ingest()
    events.ensure_topic(place.settings.kafka, place.recipe.source)
    with pytest.raises(BadInput, match="has no records"):
        place.ingest()


def test_kafka_away_is_unavailable(place: Place) -> None:
    away = dataclasses.replace(place, settings=dataclasses.replace(place.settings, kafka="127.0.0.1:1"))
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        away.ingest()


@contextlib.contextmanager
def stopped(stack: Stack) -> Iterator[None]:
    """Kafka stands still, its connections open: what a client sees of a broker that is gone."""
    pid = int(stack.status()["kafka"]["pid"])
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_kafka_going_away_in_mid_batch_is_unavailable(stack: Stack, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.produce(300)
    monkeypatch.setattr(events, "STILL_S", 3.0)
    with contextlib.ExitStack() as away:

        def check() -> None:
            if not away_now:
                away_now.append(True)
                away.enter_context(stopped(stack))

        away_now: list[bool] = []
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"sent nothing for 3 s"):
            place.ingest(check=check)
        assert time.monotonic() - began < 30
    assert place.ingest().metrics["rows"] == 300


def test_reading_a_topic_notices_it_too(stack: Stack, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.produce(300)
    topic = events.require(place.settings.kafka, place.recipe.source, "digits")
    monkeypatch.setattr(events, "STILL_S", 3.0)
    watch = events.watch
    with contextlib.ExitStack() as away:

        def stop(bootstrap: str) -> Callable[[object], None]:
            away.enter_context(stopped(stack))
            return watch(bootstrap)

        monkeypatch.setattr(events, "watch", stop)
        with pytest.raises(Unavailable, match=r"sent nothing for 3 s"):
            list(events.read(place.settings.kafka, topic))


def test_a_partition_that_is_read_already_stops_no_other(place: Place) -> None:
    from kafka import TopicPartition

    place.produce(200)
    topic = events.require(place.settings.kafka, place.recipe.source, "digits")
    with events.consumer(place.settings.kafka) as client:
        (end,) = client.end_offsets([TopicPartition(topic.name, 0)]).values()
    table = ingest.open_table(place.lake, place.path)
    ingest.commit(table, ingest.to_rows([], place.recipe.source, topic.id), {f"{topic.id}-0": end}, {f"{topic.id}-0": None})
    assert place.ingest().metrics["rows"] == 200 - end


def test_a_lost_claim_stops_the_reading(place: Place) -> None:
    def check() -> None:
        raise Conflict("another run took this work over")

    place.produce(10)
    with pytest.raises(Conflict, match="took this work over"):
        place.ingest(check=check)


ERRORS = {
    "OffsetOutOfRangeError": Unavailable, "KafkaTimeoutError": Unavailable, "NotLeaderForPartitionError": Unavailable,
    "CorruptRecordError": Unavailable, "UnsupportedCodecError": BadInput, "TopicAuthorizationFailedError": BadInput,
    "MessageSizeTooLargeError": BadInput,
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_kafkas_client_are_ours(name: str) -> None:
    from kafka import errors

    with pytest.raises(ERRORS[name]), events.reachable("127.0.0.1:1"):
        raise getattr(errors, name)("x")


def test_offsets_that_moved_while_the_batch_was_read_are_found(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even on a table object that was refreshed meanwhile, and hides the other's commit from Delta's own check."""
    place.produce(100)
    opened, really = [], ingest.open_table
    monkeypatch.setattr(ingest, "open_table", lambda *a: opened.append(really(*a)) or opened[-1])

    def check() -> None:
        if len(opened) == 1:
            place.ingest()
            opened[0].update_incremental()

    assert place.ingest(check=check).metrics["rows"] == 0
    assert len(set(place.rows())) == len(place.rows()) == 100


def test_a_table_that_is_ahead_of_kafka_is_named(place: Place) -> None:
    """Kafka lost its data and kept the topic's id: what it has next would come under offsets that the table knows."""
    place.produce(20)
    place.ingest()
    topic = events.require(place.settings.kafka, place.recipe.source, "digits")
    table, app = ingest.open_table(place.lake, place.path), f"{topic.id}-0"
    ingest.commit(table, ingest.to_rows([], place.recipe.source, topic.id), {app: 5000}, {app: table.transaction_version(app)})
    for lost_offsets in ("refuse", "accept"):
        with pytest.raises(BadInput, match=r"Kafka lost records.*goes on at offset 5000.*Kafka ends at \d+"):
            place.ingest(lost_offsets=lost_offsets)


def test_a_stopped_writer_that_wakes_up_writes_nothing(place: Place) -> None:
    """It read its batch, stood still, its replacement committed the same records, and then it goes on."""
    place.produce(100)
    table = ingest.open_table(place.lake, place.path)
    topic = events.require(place.settings.kafka, place.recipe.source, "digits")
    app = f"{topic.id}-0"
    records = [r for batch in events.read(place.settings.kafka, topic) for r in batch if r.partition == 0]
    rows = ingest.to_rows(records, place.recipe.source, topic.id)
    place.ingest()
    before = place.rows()
    with pytest.raises(Conflict, match="first"):
        ingest.commit(table, rows, {app: len(records)}, {app: None})
    assert place.rows() == before


def test_a_writer_that_looked_again_is_refused_too(place: Place) -> None:
    """A table loaded after the other's commit hides that commit from Delta's own check: the expected offset finds it."""
    place.produce(100)
    topic = events.require(place.settings.kafka, place.recipe.source, "digits")
    place.ingest()
    app, before = f"{topic.id}-0", place.rows()
    rows = place.lake.table(place.path).to_pyarrow_table().slice(0, 5)
    with pytest.raises(Conflict, match="moved"):
        ingest.commit(place.lake.table(place.path), rows, {app: 5}, {app: None})
    assert place.rows() == before


def test_records_that_kafka_deleted_are_missed(place: Place) -> None:
    from kafka import TopicPartition

    place.produce(40)
    place.ingest()
    place.produce(200, start=1000)
    topic = events.require(place.settings.kafka, place.recipe.source, "digits")
    with events.admin(place.settings.kafka) as admin, events.consumer(place.settings.kafka) as client:
        ends = client.end_offsets([TopicPartition(topic.name, p) for p in topic.partitions])
        admin.delete_records({tp: end - 1 for tp, end in ends.items()})
    with pytest.raises(BadInput, match="deleted records before they were read"):
        place.ingest()
    assert place.ingest(lost_offsets="accept").metrics["rows"] == len(topic.partitions)


def test_a_topic_made_again_is_read_from_its_beginning(place: Place) -> None:
    place.produce(50)
    place.ingest()
    with events.admin(place.settings.kafka) as admin:
        admin.delete_topics([place.recipe.source.topic])
    deadline = time.monotonic() + 20
    while events.describe(place.settings.kafka, place.recipe.source.topic) and time.monotonic() < deadline:
        time.sleep(0.2)
    place.produce(30, start=100)
    assert place.ingest().metrics["rows"] == 30
    assert len(set(place.rows())) == len(place.rows()) == 80


def test_table_digest_is_of_content_not_of_order(place: Place, tmp_path: Path) -> None:
    place.produce(60)
    place.ingest()
    other = dataclasses.replace(place, settings=dataclasses.replace(place.settings, lake=str(tmp_path / "other")))
    for _ in range(6):
        other.ingest(max_records=10)
    digests = [table_digest(p.lake, f"{p.path}@{p.lake.table(p.path).version()}") for p in (place, other)]
    assert digests[0] == digests[1]
    assert digests[0] != table_digest(other.lake, f"{other.path}@3")


def process(stack: Stack, lake: Path) -> subprocess.Popen[str]:
    python = envs.python("control-dev", stack.settings)
    env = {**stack.env, "FORJA_LAKE": str(lake), "FORJA_KAFKA": stack.settings.kafka, "PYTHONPATH": str(ROOT / "include")}
    command = [str(python), "-m", "forja.stages", "ingest", "--recipe", "digits"]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


@pytest.fixture
def big_topic(stack: Stack, place: Place) -> Place:
    """60,000 records in the topic of the recipe digits."""
    there = dataclasses.replace(place, recipe=recipes.load("digits"))
    there.produce(60_000)
    return there


def test_killed_and_doubled_ingests_lose_nothing_and_double_nothing(stack: Stack, big_topic: Place, tmp_path: Path) -> None:
    lake, left = tmp_path / "lake", []
    for _ in range(3):
        killed = process(stack, lake)
        assert killed.stdout is not None
        next((line for line in killed.stdout if " records, " in line), None)  # its first batch is committed, the next is not
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()
        left.append(len(big_topic.rows()))
    assert any(0 < rows < 60_000 for rows in left), left
    pair = [process(stack, lake) for _ in range(2)]
    outputs = [p.communicate(timeout=120)[0] for p in pair]
    assert [p.returncode for p in pair] == [0, 0], outputs
    rows = big_topic.rows()
    assert len(set(rows)) == len(rows) == 60_000
