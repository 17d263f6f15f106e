"""score: every event of a version of the raw table, answered by the variant that the gate chose, into the predictions table.

What it does: for each key it takes the newest event, labelled or not, prepares it as a client does and asks ONNX Runtime, with the file
and the options that Triton serves. Before anything is written, samples of the validation split must give their golden inputs and
answers. An event that can't be answered keeps its row, with its error. Rows are scored in chunks, which a killed run leaves for the
next, and come into the table in one commit.

When it fails: the table is as it was; start it again, and it goes on from the chunks that it finds. A Refused says that the gate chose
nothing, or which golden sample differs: then the recipe, or this machine's libraries, aren't what the gate judged.
"""

from __future__ import annotations

import datetime
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from forja import evaluation, predictions, scoring
from forja.lake import canonical, split_table_ref
from forja.recipes.base import Images, Recipe, Table
from forja.scoring import Model, Proof
from forja.stages.base import Inputs, Outcome, Plan, Stage, Work

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

STAGE = Stage(environment="ml", repeat="memoised", inputs=("raw", "gate"))
ROWS = 4096
"""Events in one chunk at most."""
WORKERS = 2
"""Chunks in work at once: one is decoded, by a process of its own, while another is answered."""
NO_LABEL = r"^(no header |label is no UTF-8$)"
"""Errors of ingest that are about the label alone: such an event can be answered."""
IDENTITY = ("topic_id", "partition", "offset", "key", "sha256", "label", "error")
"""What a row of predictions takes from its event, apart from the payload, which ``sha256`` stands for."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What score reads of a recipe."""

    dataset: Images | Table
    metric: str
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Events of one file of the raw table."""

    name: str
    file: int
    """Number of the file."""
    events: pl.DataFrame
    """``IDENTITY``, and ``row``: the event's row in the file."""


def plan(recipe: Recipe, inputs: Inputs, variant: str = "") -> Plan[Parts]:
    """See ``forja.stages.base``."""
    parts = Parts(dataset=recipe.dataset, metric=recipe.metric, tolerance=recipe.rollout.tolerance)
    return Plan(stage="score", recipe=recipe.name, team=recipe.team, parts=parts, inputs=inputs)


def run(plan: Plan[Parts], work: Work) -> Outcome:
    """Score what the predictions table doesn't have yet.

    Raises:
        BadInput: no such version of the raw table.
        Refused: the gate chose nothing, or the golden samples give other inputs, labels or answers.
        Conflict: other writers to the predictions table were faster many times.
    """
    model = scoring.load(work, work.receipt(plan.input("gate")))
    proof = scoring.prove(work, model, plan.parts.dataset, plan.parts.tolerance)
    work.say(f"{proof.samples} golden answers of {model.variant} differ by {proof.difference:.1e} at most")
    raw = plan.input("raw").ref
    files = scoring.raw_files(work.lake, raw)
    total, events = newest(files)
    work.say(f"{len(events)} events to answer of {total} in {raw}")
    path = predictions.table_path(plan.team, plan.recipe)
    table = predictions.open_table(work.lake, path)
    if not predictions.committed(table, work.key):
        parts = list(chunks(events, split_table_ref(raw)[1]))
        held = _fill(plan, work, model, files, parts)
        paths = [held[part.name] for part in parts]
        table = predictions.append(work.lake, path, work.key, lambda: predictions.chunk_rows(work.lake, paths), work.check)
    found = predictions.summary(table, work.key, plan.parts.dataset.classes)
    return _outcome(plan, work, model, proof, found, f"{path}@{table.version()}", (total, len(events)))


def newest(files: Sequence[Any]) -> tuple[int, pl.DataFrame]:
    """How many events there are, and the newest of each key by (time, partition, offset, topic id); one without a key stands for itself.

    What is wrong with a label alone is no error here, and such an event has no label. No payload is read.

    Args:
        files: fragments of the raw table.

    Returns:
        The number; and for each event that counts ``file`` and ``row``, its place, and ``IDENTITY``, ordered by place.
    """
    import polars as pl

    columns = [*IDENTITY, "time"]
    frames = [scoring.columns(f, columns).with_row_index("row").with_columns(file=pl.lit(i, pl.Int64)) for i, f in enumerate(files)]
    if not frames:
        return 0, pl.DataFrame()
    frame = pl.concat(frames).with_row_index("number")
    odd = pl.col("error").str.contains(NO_LABEL).fill_null(False)
    frame = frame.with_columns(
        label=pl.when(~odd).then("label"), error=pl.when(~odd).then("error"), alone=pl.when(pl.col("key") == "").then("number")
    )
    latest = frame.sort("time", "partition", "offset", "topic_id").unique(["key", "alone"], keep="last")
    return len(frame), latest.select("file", "row", *IDENTITY).sort("file", "row")


def chunks(events: pl.DataFrame, raw: int) -> Iterator[Chunk]:
    """Cut events into chunks of one file and ``ROWS`` at most.

    Args:
        events: as ``newest`` gives them.
        raw: version of the raw table.
    """
    if events.is_empty():
        return
    for number, group in events.group_by("file", maintain_order=True):
        for start in range(0, len(group), ROWS):
            part = group[start : start + ROWS]
            name = predictions.chunk_name([raw, part.select(IDENTITY).rows()])
            yield Chunk(name=name, file=int(number[0]), events=part)


def _fill(plan: Plan[Parts], work: Work, model: Model, files: Sequence[Any], parts: Sequence[Chunk]) -> Mapping[str, str]:
    """Score the chunks that aren't in the lake, ``WORKERS`` at once; paths of all. An error or a signal ends them at their next batch."""
    held = predictions.chunks(work.lake, work.folder)
    todo = [part for part in parts if part.name not in held]
    total, left = (sum(len(part.events) for part in some) for some in (parts, todo))
    if total > left:
        work.say(f"{total - left} of {total} events were scored before")
    stop, pending = threading.Event(), dict[Future[str], Chunk]()

    def check() -> None:
        work.check()
        if stop.is_set():
            raise CancelledError

    def settle() -> int:
        finished = wait(pending, return_when=FIRST_COMPLETED).done
        done = [(pending.pop(future), future.result()) for future in finished]
        held.update({part.name: path for part, path in done})
        return sum(len(part.events) for part, _ in done)

    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="score")
    try:
        for number, group in itertools.groupby(todo, key=lambda part: part.file):
            payloads = scoring.payloads(files[number])
            for part in group:
                while len(pending) == WORKERS:
                    left -= settle()
                    work.say(f"{total - left} of {total} events scored")
                pending[pool.submit(_score, plan, work, model, part, scoring.rows(payloads, part.events["row"]), check)] = part
        while pending:
            left -= settle()
            work.say(f"{total - left} of {total} events scored")
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    return held


def _score(plan: Plan[Parts], work: Work, model: Model, part: Chunk, payloads: list[bytes], check: Callable[[], None]) -> str:
    """Score one chunk and keep it; its path."""
    import polars as pl

    good = part.events["error"].is_null()
    probabilities, problems = scoring.answers(model, plan.parts.dataset, list(itertools.compress(payloads, good)), check)
    answered, classes = zip(probabilities, problems, strict=True), plan.parts.dataset.classes
    scored: list[dict[str, Any]] = []
    for error in part.events["error"]:
        values, problem = next(answered) if error is None else (None, error)
        scored.append({"error": problem} if values is None or problem else {
            "answer": classes[int(values.argmax())], "probability": float(values.max()), "probabilities": values.tolist(),
        })  # fmt: skip
    events = part.events.drop("error").hstack(pl.DataFrame(scored, schema=_scored()))
    data = predictions.chunk_bytes(_table(events, model, split_table_ref(plan.input("raw").ref)[1], work.key))
    check()
    return work.save(f"chunk-{part.name}.parquet", data).path


def _scored() -> dict[str, Any]:
    import polars as pl

    return {"answer": pl.String, "probability": pl.Float32, "probabilities": pl.List(pl.Float32), "error": pl.String}


def _table(events: pl.DataFrame, model: Model, raw: int, run: str) -> pa.Table:
    import polars as pl

    schema = predictions.schema()
    same = {
        "model_version": model.version, "model_sha256": model.sha256, "variant": model.variant, "raw_version": raw, "run": run,
        "scored_at": datetime.datetime.now(datetime.UTC),
    }  # fmt: skip
    frame = events.with_columns(**{name: pl.lit(value) for name, value in same.items()})
    return frame.select(schema.names).to_arrow().cast(schema)


def _outcome(
    plan: Plan[Parts], work: Work, model: Model, proof: Proof, found: predictions.Summary, table: str, counts: tuple[int, int]
) -> Outcome:  # fmt: skip
    total, events = counts
    failed = found.errors.total()
    own = {f"labelled_{k}": v for k, v in evaluation.measure(found.probabilities, found.labels, plan.parts.metric).items()}
    metrics = {
        "events": total, "superseded": total - events, "rows": found.rows, "scored": found.rows - failed, "failed": failed,
        "labelled": len(found.labels), "golden_difference": proof.difference, **own,
    }  # fmt: skip
    facts: dict[str, Any] = {
        "predictions": table, "run": work.key, "raw": plan.input("raw").ref, "model": plan.recipe, "version": model.version,
        "variant": model.variant, "classes": list(plan.parts.dataset.classes), "answers": dict(sorted(found.answers.items())),
        "errors": dict(sorted(found.errors.items())), "golden": {"samples": proof.samples, "prepared": proof.prepared},
        "labelled": "all labelled events, those that the model was trained on among them: no evaluation",
    }  # fmt: skip
    if "emulated" in model.optimize.facts:
        facts["emulated"] = model.optimize.facts["emulated"]
    report = [
        f"{found.rows - failed} of {found.rows} events answered by version {model.version} ({model.variant}), into {table}",
        *(f"no answer {count}: {reason}" for reason, count in found.errors.most_common()),
    ]
    if found.rows != events:
        report.append(f"{events - found.rows} rows of this run were deleted from the table since")
    if own:
        numbers = "  ".join(f"{name.removeprefix('labelled_')} {value:.4f}" for name, value in own.items())
        report.append(f"{len(found.labels)} labelled events: {numbers} (training events among them: no evaluation)")
    versions = {name: version(name) for name in ("onnxruntime", "polars", "deltalake")}
    outputs = {"predictions.json": work.save("predictions.json", canonical({**facts, "metrics": metrics}))}
    return Outcome(
        outputs=outputs, metrics=metrics, facts=facts, report=report, versions=versions,
        obsolete=predictions.chunk_paths(work.lake, work.folder),
    )  # fmt: skip
