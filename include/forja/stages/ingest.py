"""ingest: a bounded batch of events from Kafka into the raw Delta table, exactly once.

What it does: reads every partition from the offset that the table says to the end that the topic had when it started.
Each Delta commit carries, for every partition that it covers, an application transaction (id: topic id and partition,
version: next offset), so rows and offsets move together. Records that can't be used stay in the table with their error.

When it fails: nothing is lost and nothing is doubled; start it again. Kafka not answering: ``./forja status``. Lost offsets:
Kafka deleted records before they were read; raise the topic's retention, then set ``lost_offsets="accept"`` in the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forja import events, tables
from forja.errors import BadInput, Conflict
from forja.lake import Lake, sha256
from forja.recipes.base import Recipe, Source
from forja.stages.base import Inputs, Outcome, Plan, Stage, Work

if TYPE_CHECKING:
    import pyarrow as pa
    from deltalake import DeltaTable

STAGE = Stage(environment="ml", repeat="reconciled")
BATCH_RECORDS = 20_000
BATCH_BYTES = 64 << 20
LAST_MS = 253_402_300_799_999
"""End of the year 9999, in milliseconds since 1970: a producer may write any number as a record's time."""
IMAGE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What ingest reads of a recipe."""

    source: Source


def plan(recipe: Recipe, inputs: Inputs, variant: str = "") -> Plan[Parts]:
    """See ``forja.stages.base``."""
    return Plan(stage="ingest", recipe=recipe.name, team=recipe.team, parts=Parts(source=recipe.source), inputs=inputs)


def table_path(team: str, recipe: str) -> str:
    """Path of a recipe's raw table."""
    return f"{team}/{recipe}/raw"


def group(recipe: str) -> str:
    """Kafka consumer group whose offsets tell the doorbell and monitoring how far ingest is; they are advisory."""
    return f"forja-{recipe}"


def run(plan: Plan[Parts], work: Work) -> Outcome:
    """Read to the end that the topic has now.

    Raises:
        BadInput: no such topic, no record ever, records that Kafka deleted before they were read, or fewer than were read.
        Conflict: other writers were faster five times in a row.
        Unavailable: Kafka doesn't answer, at first or any more.
    """
    from kafka import TopicPartition

    source, bootstrap = plan.parts.source, work.settings.kafka
    topic = events.require(bootstrap, source, plan.recipe)
    path = table_path(plan.team, plan.recipe)
    rows = bad = failures = 0
    with events.consumer(bootstrap, group(plan.recipe)) as client:
        partitions = [TopicPartition(topic.name, p) for p in topic.partitions]
        client.assign(partitions)
        ends = client.end_offsets(partitions, timeout_ms=events.ASK_MS)
        table = open_table(work.lake, path)
        while rows < source.max_records:
            # What the table holds now, before the batch is read: the commit must find it unchanged.
            held = {p: table.transaction_version(app(topic, p.partition)) for p in partitions}
            starts = _starts(client, held, topic, source)
            if all(start >= ends[p] for p, start in starts.items()):
                break
            records, nexts = _read(client, starts, ends, source.max_records - rows, work)
            batch = to_rows(records, source, topic.id)
            versions = {app(topic, p.partition): n for p, n in nexts.items()}
            try:
                commit(table, batch, versions, {app(topic, p.partition): held[p] for p in nexts})
                failures = 0
                rows, bad = rows + batch.num_rows, bad + batch.num_rows - batch["error"].null_count
                work.say(f"{rows} records, {bad} of them bad")
            except Conflict:
                failures += 1
                if failures == 5:
                    raise
            table = open_table(work.lake, path)
        held = {p: table.transaction_version(app(topic, p.partition)) for p in partitions}
        offsets = _starts(client, held, topic, source)
        _tell_group(client, offsets)
    if table.version() == 0:
        raise BadInput(f"Kafka topic {topic.name} has no records", allowed="one record or more", do=f"./forja produce {plan.recipe}")
    return Outcome(
        metrics={"rows": rows, "bad": bad},
        facts={
            "raw": f"{path}@{table.version()}", "topic_id": topic.id, "offsets": {str(p.partition): o for p, o in offsets.items()},
        },
        report=[f"{rows} records from topic {topic.name}, {bad} of them bad, into {path} version {table.version()}"],
    )  # fmt: skip


def app(topic: events.Topic, partition: int) -> str:
    """Id of the application transaction that holds the next offset of a partition."""
    return f"{topic.id}-{partition}"


def open_table(lake: Lake, path: str) -> DeltaTable:
    """The raw table as it is now, created empty (version 0) when it isn't there."""
    import pyarrow as pa
    from deltalake import DeltaTable

    if not DeltaTable.is_deltatable(lake.uri(path), storage_options=lake.options or None):
        DeltaTable.create(
            lake.uri(path), schema=pa.schema(schema()), mode="ignore", storage_options=lake.options or None,
            description="Events as they came; a row with an error is kept and never used.",
        )  # fmt: skip
    return lake.table(path)


def schema() -> list[pa.Field[Any]]:
    """Columns of the raw table."""
    import pyarrow as pa

    return [
        pa.field("key", pa.string()),
        pa.field("label", pa.string()),
        pa.field("payload", pa.binary()),
        pa.field("sha256", pa.string()),
        pa.field("error", pa.string()),
        pa.field("topic_id", pa.string()),
        pa.field("partition", pa.int32()),
        pa.field("offset", pa.int64()),
        pa.field("time", pa.timestamp("us", tz="UTC")),
    ]


def commit(table: DeltaTable, rows: pa.Table, versions: Mapping[str, int], expected: Mapping[str, int | None]) -> None:
    """Append rows and move the offsets in one commit, on the very table object that was read.

    Delta checks only commits made since that object was loaded, so it must never be refreshed in between, and the
    versions that the rows start from must be the ones that it holds.

    Args:
        versions: next offset of each application transaction after this batch.
        expected: offset at which the batch begins, None when the table has none yet.

    Raises:
        Conflict: another writer committed first; load the table again and read again.
    """
    from deltalake import CommitProperties, Transaction, write_deltalake
    from deltalake.exceptions import CommitFailedError

    for app, first in expected.items():
        if table.transaction_version(app) != first:
            raise Conflict(f"offsets of {app} moved", value=table.transaction_version(app), allowed=str(first))
    transactions = [Transaction(app, version) for app, version in versions.items()]
    try:
        # No retries inside Delta: it would retry on top of the other writer's commit.
        write_deltalake(table, rows, mode="append", commit_properties=CommitProperties(app_transactions=transactions, max_commit_retries=0))
    except CommitFailedError as error:
        raise Conflict("another writer committed to the raw table first", value=str(error)) from error


def _starts(client: Any, held: Mapping[Any, int | None], topic: events.Topic, source: Source) -> dict[Any, int]:
    """Offset at which each partition goes on, from what the table holds and what Kafka has now."""
    begins = client.beginning_offsets(list(held), timeout_ms=events.ASK_MS)
    # Asked each time: another ingest may have read beyond the end that this one began with.
    ends = client.end_offsets(list(held), timeout_ms=events.ASK_MS)
    return {p: _start(known, begins[p], ends[p], app(topic, p.partition), source) for p, known in held.items()}


def _start(known: int | None, begin: int, end: int, app: str, source: Source) -> int:
    if known is None:
        return begin
    if begin > known and source.lost_offsets == "refuse":
        raise BadInput(
            f"topic {source.topic}: Kafka deleted records before they were read", value=f"offsets {known} to {begin - 1} of {app}",
            do='raise the retention of the topic, then set lost_offsets="accept" in the recipe to go on without them',
        )  # fmt: skip
    if known > end:
        raise BadInput(
            f"topic {source.topic}: Kafka lost records that were read, and gives their offsets to others",
            value=f"the table goes on at offset {known} of {app}, Kafka ends at {end}",
            do="delete the topic, make it again and produce again: it gets another id, and is read from its beginning",
        )  # fmt: skip
    return max(known, begin)


def _read(client: Any, starts: Mapping[Any, int], ends: Mapping[Any, int], most: int, work: Work) -> tuple[list[Any], dict[Any, int]]:
    """Up to one batch of records below ``ends``, and the next offset of each partition that was read."""
    due = {p: start for p, start in starts.items() if start < ends[p]}
    client.pause(*starts)
    client.resume(*due)
    for partition, offset in starts.items():  # of all: the client refuses to poll while one has no position
        client.seek(partition, offset)
    records: list[Any] = []
    size, limit, nexts = 0, min(BATCH_RECORDS, most), due
    moved = events.watch(work.settings.kafka)
    while len(records) < limit and size < BATCH_BYTES and any(nexts[p] < ends[p] for p in due):
        work.check()
        for partition, polled in events.poll(client, timeout_ms=1000, max_records=limit - len(records)).items():
            fresh = [r for r in polled if r.offset < ends[partition]]
            records += fresh
            size += sum(len(r.value or b"") for r in fresh)
        # Compacted and transactional topics have gaps: the position, not the last record, says where to go on.
        nexts = {p: min(client.position(p), ends[p]) for p in due}
        moved(nexts)
    return records, {p: n for p, n in nexts.items() if n > due[p]}


def to_rows(records: list[Any], source: Source, topic_id: str) -> pa.Table:
    """Kafka records as rows of the raw table; whatever a record holds, it gives a row."""
    import pyarrow as pa

    rows = []
    for record in records:
        key, key_problem = _text(record.key or b"", "key")
        labels = [value for name, value in record.headers or [] if name == source.label_header]
        label, label_problem = _text(labels[0], "label") if labels and labels[0] is not None else (None, None)
        payload = record.value or b""
        rows.append({
            "key": key, "label": label, "payload": payload, "sha256": sha256(payload),
            "error": key_problem or label_problem or problem(key, label, payload, source), "topic_id": topic_id,
            "partition": record.partition, "offset": record.offset, "time": min(max(record.timestamp or 0, 0), LAST_MS) * 1000,
        })  # fmt: skip
    return pa.Table.from_pylist(rows, schema=pa.schema(schema()))


def _text(data: bytes, name: str) -> tuple[str, str | None]:
    """UTF-8 as text, and None; for other bytes an escaped form, and the problem."""
    try:
        return data.decode(), None
    except UnicodeDecodeError:
        return data.decode(errors="backslashreplace"), f"{name} is no UTF-8"


def problem(key: str, label: str | None, payload: bytes, source: Source) -> str | None:
    """Why a record can't be used, None when it can; never raises. Whether an image decodes is transform's question."""
    if not key:
        return "no key"
    if label is None:
        return f"no header {source.label_header}"
    if not payload:
        return "no value"
    if source.payload == "image":
        return None if payload.startswith(IMAGE_MAGIC) else "neither PNG nor JPEG"
    return tables.json_object(payload)[1]


def _tell_group(client: Any, offsets: Mapping[Any, int]) -> None:
    from kafka.errors import KafkaError
    from kafka.structs import OffsetAndMetadata

    try:
        client.commit({tp: OffsetAndMetadata(offset, "", -1) for tp, offset in offsets.items()})
    except KafkaError as error:
        # Advisory: the doorbell rings once more, the next ingest finds nothing and tells the group again.
        print(f"the consumer group's offsets were not updated: {error}")
