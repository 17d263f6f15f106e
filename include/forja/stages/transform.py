"""transform: a version of the raw table into a checked dataset of training-ready shards.

What it does: drops bad events and counts them by reason, keeps the newest event of each key, dedupes by content, checks
the declared schema and ranges (tables) or decodes every image (DALI), splits by the hash of the key, measures the
training split, and packs shards.

When it fails: the message names the column, label or split. Bad events don't fail it unless nothing is left; the receipt
counts them by reason.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from forja import loading, shards, tables
from forja.errors import BadInput
from forja.lake import canonical, split_table_ref
from forja.recipes.base import Images, Recipe, Split, Table
from forja.stages.base import Inputs, Outcome, Plan, Stage, Work

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

STAGE = Stage(environment="ml", repeat="memoised", inputs=("raw",))
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What transform reads of a recipe."""

    dataset: Images | Table
    metric: str


def plan(recipe: Recipe, inputs: Inputs, variant: str = "") -> Plan[Parts]:
    """See ``forja.stages.base``."""
    return Plan(
        stage="transform", recipe=recipe.name, team=recipe.team, parts=Parts(dataset=recipe.dataset, metric=recipe.metric), inputs=inputs
    )


def run(plan: Plan[Parts], work: Work) -> Outcome:
    """Make the dataset.

    Raises:
        BadInput: a split has no sample left (the message counts the reasons), or none can be learnt from or measured.
    """
    import polars as pl

    dataset = plan.parts.dataset
    path, number = split_table_ref(plan.input("raw").ref)
    columns = ["key", "label", "payload", "sha256", "error", "partition", "offset", "time", "topic_id"]
    raw = pl.DataFrame(pl.from_arrow(work.lake.table(path, number).to_pyarrow_table(columns=columns)))
    work.say(f"{len(raw)} events in {path} version {number}")
    rejected: Counter[str] = Counter()
    good = select(raw, dataset.classes, rejected)
    good = good.with_columns(position=pl.Series([position(k) for k in good["key"]], dtype=pl.Float64)).sort("position")
    good = good.with_columns(split=pl.Series([side(p, dataset.split) for p in good["position"]], dtype=pl.String))
    work.say(f"{len(good)} events are usable and distinct")
    contents, statistics = _images(good, dataset, rejected) if isinstance(dataset, Images) else _tables(good, dataset, rejected)
    numbers = {label: i for i, label in enumerate(dataset.classes)}
    rows = [
        (k, s, numbers[label], c)
        for k, s, label, c in zip(good["key"], good["split"], good["label"], contents, strict=True)
        if c is not None
    ]
    counts = {name: Counter(label for _, s, label, _ in rows if s == name) for name in SPLITS}
    _check_splits(plan, counts, f"one or more of {len(raw)} events; rejected: {dict(rejected)}")
    outcome = Outcome(versions={"polars": version("polars"), "nvidia-dali-cuda120": version("nvidia-dali-cuda120")})
    for name in SPLITS:
        _pack(name, [(c, n) for _, s, n, c in rows if s == name], dataset, work, outcome)
    statistics["splits"] = {
        n: {"rows": counts[n].total(), "classes": {c: counts[n][i] for i, c in enumerate(dataset.classes)}} for n in SPLITS
    }
    statistics["rejected"] = dict(sorted(rejected.items()))
    outcome.outputs["statistics.json"] = work.save("statistics.json", canonical(statistics))
    outcome.outputs["keys.json"] = work.save("keys.json", canonical({n: [k for k, s, _, _ in rows if s == n] for n in SPLITS}))
    outcome.facts = statistics
    outcome.metrics = {"events": len(raw), "rejected": rejected.total(), **{f"{n}_rows": counts[n].total() for n in SPLITS}}
    outcome.report = [
        ", ".join(f"{counts[n].total()} {n}" for n in SPLITS) + f" of {len(raw)} events",
        *(f"rejected {n}: {reason}" for reason, n in rejected.most_common()),
    ]
    return outcome


def _check_splits(plan: Plan[Parts], counts: dict[str, Counter[int]], some: str) -> None:
    """BadInput for a split that nothing can be learnt from or measured on. A class may be missing where accuracy is measured."""
    classes = plan.parts.dataset.classes
    for name in SPLITS:
        present = {c: counts[name][i] for i, c in enumerate(classes)}
        allowed = ""
        if not counts[name]:
            raise BadInput(f"{name} split of {plan.recipe}", value="no samples", allowed=some)
        if name == "train" and len(counts[name]) < 2:
            allowed = "samples of two classes or more: one class alone teaches nothing"
        elif name != "train" and plan.parts.metric == "average_precision" and not counts[name][1]:
            allowed = f"one or more of class {classes[1]}: average precision is undefined without"
        if allowed:
            do = "ingest more events, or give the split a larger share in the recipe"
            raise BadInput(f"samples of each class in the {name} split of {plan.recipe}", value=present, allowed=allowed, do=do)


def select(raw: pl.DataFrame, classes: tuple[str, ...], rejected: Counter[str]) -> pl.DataFrame:
    """Events that ingest found good, with a known label, the newest of each key, each content once, sorted by key.

    Equal content under different labels teaches nothing: all of it is rejected.
    """
    import polars as pl

    for reason, count in raw.filter(pl.col("error").is_not_null()).group_by("error").len().iter_rows():
        rejected[f"ingest: {reason}"] += count
    steps: tuple[tuple[str, Callable[[pl.DataFrame], pl.DataFrame]], ...] = (
        ("label not in classes", lambda f: f.filter(pl.col("label").is_in(list(classes)))),
        (
            "superseded by a newer event of its key",
            lambda f: f.sort("time", "partition", "offset", "topic_id").unique("key", keep="last", maintain_order=True),
        ),
        ("equal content under different labels", lambda f: f.filter(pl.col("label").n_unique().over("sha256") == 1)),
        ("duplicate content", lambda f: f.sort("key").unique("sha256", keep="first", maintain_order=True)),
    )
    frame = raw.filter(pl.col("error").is_null())
    for reason, step in steps:
        before = len(frame)
        frame = step(frame)
        if before > len(frame):
            rejected[reason] += before - len(frame)
    return frame


def position(key: str) -> float:
    """Place of a key on the circle of hashes, from 0 to below 1: the first 53 bits of its SHA-256."""
    return (int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 11) / 2**53


def side(position: float, split: Split) -> str:
    """Split of a key: test first on the circle turned by ``split.rotate``, then validation, then train."""
    turned = (position - split.rotate) % 1.0
    if turned < split.test:
        return "test"
    return "validation" if turned < split.test + split.validation else "train"


def _images(good: pl.DataFrame, dataset: Images, rejected: Counter[str]) -> tuple[list[bytes | None], dict[str, Any]]:
    """Payloads, None for one that doesn't decode, and channel statistics of the training split."""
    import numpy as np

    contents: list[bytes | None] = []
    pixels, total, squares = 0, np.zeros(dataset.channels), np.zeros(dataset.channels)
    payloads = good["payload"].to_list()
    for payload, split, image in zip(payloads, good["split"], loading.decode(payloads, dataset), strict=True):
        contents.append(payload if image is not None else None)
        if image is None:
            rejected["image doesn't decode"] += 1
        elif split == "train":
            pixels += dataset.height * dataset.width
            total += image.sum(axis=(1, 2), dtype="float64")
            squares += np.square(image, dtype="float64").sum(axis=(1, 2))
    mean = total / max(pixels, 1)
    std = np.sqrt(np.maximum(squares / max(pixels, 1) - mean**2, 0))
    return contents, {"mean": mean.tolist(), "std": std.tolist()}


def _tables(good: pl.DataFrame, dataset: Table, rejected: Counter[str]) -> tuple[list[bytes | None], dict[str, Any]]:
    """Features as float32 bytes, None for a row out of schema or range, and statistics of the training split."""
    import polars as pl

    frame = tables.features(tables.parse(good["payload"].to_list(), dataset), dataset)
    rejected.update(frame["problem"].drop_nulls().to_list())
    matrix: np.ndarray[Any, Any] = frame.select(dataset.features).to_numpy().astype("<f4")
    fine = frame["problem"].is_null()
    contents = [row.tobytes() if ok else None for row, ok in zip(matrix, fine, strict=True)]
    train = frame.filter(fine & (good["split"] == "train")).select(pl.col(dataset.features).cast(pl.Float64))
    return contents, {"mean": list(train.mean().row(0)), "std": list(train.std(ddof=0).row(0))}


def _pack(name: str, samples: list[tuple[bytes, int]], dataset: Images | Table, work: Work, outcome: Outcome) -> None:
    for number, chunk in enumerate(_chunks(samples, dataset.shard_samples)):
        tar, index = shards.pack(chunk, shards.extension(dataset))
        for ending, data in (("tar", tar), ("idx", index)):
            shard = f"{name}-{number:03d}.{ending}"
            outcome.outputs[shard] = work.save(shard, data)
    work.say(f"{name}: {len(samples)} samples packed")


def _chunks(samples: list[tuple[bytes, int]], size: int) -> Iterator[list[tuple[bytes, int]]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
