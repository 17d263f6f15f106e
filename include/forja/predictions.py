"""The predictions table of a recipe: what ``score`` answered to each event, and why not where it could not.

Rows of one run carry ``run``, the key of its work, and come in one commit: all of them are there or none is. The commit's application
transaction has that key as its id, so a run that is killed and repeated, or done twice at once, adds its rows once.

Until that commit the rows lie in chunks beside the receipt, ``<sha256>-chunk-<name>.parquet``: each is named by the events that it
answers and by its content, and a run that goes on where another was killed takes those that it finds.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from forja.errors import Conflict, ForjaError
from forja.lake import Lake, canonical, sha256

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from deltalake import DeltaTable
    from numpy.typing import NDArray

TRIES = 10
"""Commits that other writers may overtake."""
CHUNK = re.compile(r"[0-9a-f]{12}-chunk-[0-9a-f]{32}\.parquet")


@dataclass(kw_only=True)
class Summary:
    """What the table holds of one run."""

    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Rows without an answer, by reason."""
    answers: Counter[str] = field(default_factory=Counter)
    """Rows with an answer, by class name."""
    labels: NDArray[np.int64]
    """int64 [L], class numbers of the answered rows whose label is one of the classes."""
    probabilities: NDArray[np.float32]
    """float32 [L, classes], the answers to those rows."""


def table_path(team: str, recipe: str) -> str:
    """Path of a recipe's predictions, beside its raw table."""
    return f"{team}/{recipe}/predictions"


def schema() -> pa.Schema:
    """Columns of the table."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("key", pa.string()),
            pa.field("sha256", pa.string()),  # of the payload
            pa.field("label", pa.string()),  # as it came; null for none
            pa.field("answer", pa.string()),  # name of the most probable class; null where there is an error
            pa.field("probability", pa.float32()),  # of that class
            pa.field("probabilities", pa.list_(pa.float32())),  # of all classes, in the recipe's order
            pa.field("error", pa.string()),  # why there is no answer
            pa.field("model_version", pa.string()),
            pa.field("model_sha256", pa.string()),  # of the ONNX file that answered
            pa.field("variant", pa.string()),
            pa.field("raw_version", pa.int64()),
            pa.field("topic_id", pa.string()),
            pa.field("partition", pa.int32()),
            pa.field("offset", pa.int64()),
            pa.field("scored_at", pa.timestamp("us", tz="UTC")),
            pa.field("run", pa.string()),
        ]
    )


def open_table(lake: Lake, path: str) -> DeltaTable:
    """The table as it is now, created empty (version 0) when it isn't there."""
    from deltalake import DeltaTable

    if not DeltaTable.is_deltatable(lake.uri(path), storage_options=lake.options or None):
        DeltaTable.create(
            lake.uri(path), schema=schema(), mode="ignore", storage_options=lake.options or None,
            description="Answers to events in batch. Rows of one run come together; run is the key of its receipt.",
        )  # fmt: skip
    return lake.table(path)


def committed(table: DeltaTable, run: str) -> bool:
    """Whether the table has the rows of a run."""
    return table.transaction_version(run) is not None


def append(lake: Lake, path: str, run: str, batches: Callable[[], Iterator[pa.RecordBatch]], check: Callable[[], None]) -> DeltaTable:
    """Put the rows of a run into the table in one commit, unless they are there; the table as it is then.

    Args:
        run: id of the application transaction. Delta checks it only against commits since the table was loaded, so it is looked up in
            the very object that is written to, and every try loads the table again.
        batches: gives the rows, from their beginning, each time it is called.
        check: is called before each try, and raises when this run shall not go on.

    Raises:
        Conflict: other writers were faster ``TRIES`` times.
        ForjaError: what ``batches`` raised.
    """
    import pyarrow as pa
    from deltalake import CommitProperties, Transaction, write_deltalake
    from deltalake.exceptions import CommitFailedError, DeltaError

    raised: list[ForjaError] = []

    def kept() -> Iterator[pa.RecordBatch]:
        try:
            yield from batches()
        except ForjaError as error:
            raised.append(error)  # Arrow would pass on its text alone
            raise

    for _ in range(TRIES):
        check()
        table = open_table(lake, path)
        if committed(table, run):
            return table
        # No retries inside Delta, as for raw: a lost race is looked at here.
        once = CommitProperties(app_transactions=[Transaction(run, 1)], max_commit_retries=0)
        try:
            write_deltalake(table, pa.RecordBatchReader.from_batches(schema(), kept()), mode="append", commit_properties=once)
        except CommitFailedError:
            continue
        except DeltaError:
            if raised:
                raise raised[0] from None
            raise
        return lake.table(path)
    raise Conflict(f"others committed to {path} first", value=f"{TRIES} times", do="run it again: what was scored is kept")


def summary(table: DeltaTable, run: str, classes: Sequence[str]) -> Summary:
    """Read what the table holds of a run, in batches; only labelled answers are kept."""
    import numpy as np
    import pyarrow.compute as pc

    numbers = {name: i for i, name in enumerate(classes)}
    labels: list[int] = []
    answers = [np.zeros((0, len(classes)), np.float32)]
    found = Summary(labels=np.zeros(0, np.int64), probabilities=answers[0])
    scanner = table.to_pyarrow_dataset().scanner(columns=["label", "answer", "probabilities", "error"], filter=pc.field("run") == run)
    for batch in scanner.to_batches():
        found.rows += batch.num_rows
        found.errors.update(e for e in batch["error"].to_pylist() if e is not None)
        found.answers.update(a for a in batch["answer"].to_pylist() if a is not None)
        known = pc.and_(batch["probabilities"].is_valid(), pc.is_in(batch["label"], _strings(classes)))
        part = batch.filter(known)
        labels += [numbers[name] for name in part["label"].to_pylist()]
        answers.append(part["probabilities"].flatten().to_numpy(zero_copy_only=False).reshape(-1, len(classes)))
    found.labels, found.probabilities = np.array(labels, np.int64), np.concatenate(answers)
    return found


def _strings(values: Sequence[str]) -> pa.Array[Any]:
    import pyarrow as pa

    return pa.array(list(values), pa.string())


def chunk_name(events: object) -> str:
    """Name of the chunk that answers these events, 32 hex digits: a digest of all that its rows take from the raw table."""
    return sha256(canonical(events))[:32]


def chunk_bytes(rows: pa.Table) -> bytes:
    """Content of a chunk."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="zstd")
    return buffer.getvalue()


def chunk_paths(lake: Lake, folder: str) -> list[str]:
    """Paths of all chunks in a folder."""
    return [path for path in lake.list(folder) if CHUNK.fullmatch(path.rpartition("/")[2])]


def chunks(lake: Lake, folder: str) -> dict[str, str]:
    """Path of each chunk in a folder, by its name; one whose content isn't what its path says is removed."""
    found: dict[str, str] = {}
    for path in chunk_paths(lake, folder):
        digest, name = path.rpartition("/")[2].removesuffix(".parquet").split("-chunk-")
        if sha256(lake.get(path)).startswith(digest):
            found[name] = path  # two tries may have written one each: either will do
        else:
            lake.delete(path)
    return found


def chunk_rows(lake: Lake, paths: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Rows of chunks, one chunk in memory at a time; Damaged when one is gone."""
    import pyarrow.parquet as pq

    for path in paths:
        yield from pq.read_table(io.BytesIO(lake.get(path)), schema=schema()).to_batches()
