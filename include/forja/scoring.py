"""Answers without a server: the variant that a gate chose, in ONNX Runtime here, with the file and the options that Triton serves.

Nothing that it answers counts before ``prove`` has shown that this recipe, on this machine, repeats the golden samples of the variant:
the whole way, from the events of the raw table to the probabilities.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forja import evaluation, loading, tables
from forja.errors import Damaged, Refused
from forja.lake import Lake, split_table_ref
from forja.receipts import Receipt
from forja.recipes.base import Images, Table

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    import pyarrow as pa
    from numpy.typing import NDArray

    from forja.stages.base import Work

BATCH_BYTES = 64 << 20
"""Inputs of one run of the model at most; ``evaluation.BATCH`` samples where they are smaller."""
PIXEL = 1e-2
"""Grey levels by which another processor may resize an image differently; a table's features are compared exactly."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The chosen variant, ready to answer."""

    session: Any
    """ONNX Runtime's, which several threads may use at once."""
    version: str
    """MLflow's number of the model that the variant was made of."""
    variant: str
    sha256: str
    """SHA-256 of the ONNX file that answers, in hex."""
    optimize: Receipt


@dataclass(frozen=True, kw_only=True)
class Proof:
    """How the golden samples were repeated."""

    samples: int
    """Samples that have their golden answer."""
    prepared: int
    """Those of them whose event is in the raw table that the dataset was made of, and gives the golden input and label."""
    difference: float
    """Largest difference of a probability."""


def load(work: Work, gate: Receipt) -> Model:
    """The variant that a gate chose.

    Raises:
        Refused: it chose none.
        Damaged: its receipt, or a file that it leads to, isn't what it was.
    """
    import onnxruntime

    chosen = gate.facts.get("chosen")
    if not chosen:
        raise Refused("gate chose no variant", value=gate.facts.get("reason"), do=f"see ./forja show {gate.path}")
    optimize = next((r for r in map(work.receipt, gate.inputs["optimize"]) if r.variant == chosen), None)
    if optimize is None:
        raise Damaged(f"gate receipt {gate.path}: inputs have no variant", value=chosen)
    # Of bfloat16, which ONNX Runtime can only imitate on a CPU, the imitation was judged.
    name = "emulated.onnx" if "emulated.onnx" in optimize.outputs else "model.onnx"
    session = onnxruntime.InferenceSession(work.load(optimize, name), evaluation.options(), providers=["CPUExecutionProvider"])
    registered = work.receipt(optimize.inputs["model"][0])
    return Model(
        session=session, version=str(registered.facts["version"]), variant=chosen, sha256=optimize.output(name).sha256, optimize=optimize
    )


def prove(work: Work, model: Model, dataset: Images | Table, tolerance: float) -> Proof:
    """That the golden samples are prepared and answered as they were when the variant was judged.

    Args:
        dataset: the recipe's, which may have changed since.
        tolerance: largest difference of a probability that passes.

    Raises:
        Refused: the recipe's inputs or classes aren't the model's, an event gives another input or label, or an answer differs.
    """
    import numpy as np

    with np.load(io.BytesIO(work.load(model.optimize, "golden.npz")), allow_pickle=False) as golden:
        inputs, expected, labels = golden["inputs"], golden["probabilities"], golden["labels"]
    do = f"put the recipe back, or run its stages from transform on; the variant is that of {model.optimize.path}"
    if inputs.shape[1:] != dataset.shape or expected.shape[1] != len(dataset.classes):
        value = f"inputs of shape {dataset.shape}, {len(dataset.classes)} classes"
        allowed = f"{inputs.shape[1:]} and {expected.shape[1]}, as the model has"
        raise Refused("the recipe's dataset isn't what the gate judged", value=value, allowed=allowed, do=do)
    source = work.receipt(model.optimize.inputs["dataset"][0])
    keys = sorted(json.loads(work.load(source, "keys.json"))["validation"])[: len(inputs)]
    raw = source.inputs["raw"][0].ref
    events = _events(work.lake, raw, keys)
    found = _prepared(events, dataset)
    for key, wanted, label in zip(keys, inputs, labels, strict=True):
        name = dataset.classes[label]
        if key in found and not any(own == name and _same(sample, wanted, dataset) for own, sample in found[key]):
            what = f"golden sample {key}: its event in {raw} gives another input or label than when the gate judged"
            raise Refused(what, allowed=f"the golden input, labelled {name}", do=do)
    gaps = np.abs(run(model, inputs) - expected).max(axis=1)
    if not gaps.max() <= tolerance:  # NaN fails too
        what = f"golden answers of {model.variant}: sample {keys[int(gaps.argmax())]} differs"
        do = f"run optimize again with the libraries of this machine: {model.optimize.command}"
        raise Refused(what, value=float(gaps.max()), allowed=f"{tolerance:g} at most", do=do)
    return Proof(samples=len(keys), prepared=len(events), difference=float(gaps.max()))


def _events(lake: Lake, raw: str, keys: Sequence[str]) -> dict[str, list[tuple[str, bytes]]]:
    """Label and payload of the good events of some keys, by key."""
    import polars as pl

    found: dict[str, list[tuple[str, bytes]]] = {}
    for file in raw_files(lake, raw):
        hits = columns(file, ["key", "label", "error"]).with_row_index("row")
        hits = hits.filter(pl.col("key").is_in(list(keys)) & pl.col("error").is_null())
        if not hits.is_empty():
            taken = rows(payloads(file), hits["row"])
            for (key, label), payload in zip(hits.select("key", "label").iter_rows(), taken, strict=True):
                found.setdefault(key, []).append((label, payload))
    return found


def _prepared(
    events: Mapping[str, list[tuple[str, bytes]]], dataset: Images | Table
) -> dict[str, list[tuple[str, NDArray[np.float32] | str]]]:  # fmt: skip
    """Label and sample of each event, by key: all in one go, since a process that decodes takes a second to start."""
    sample = samples([payload for found in events.values() for _, payload in found], dataset)
    return {key: [(label, next(sample)) for label, _ in found] for key, found in events.items()}


def _same(sample: NDArray[np.float32] | str, wanted: NDArray[np.float32], dataset: Images | Table) -> bool:
    import numpy as np

    return not isinstance(sample, str) and np.allclose(sample, wanted, rtol=0, atol=PIXEL if isinstance(dataset, Images) else 0)


def raw_files(lake: Lake, ref: str) -> list[Any]:
    """Parquet files of a version of a raw table, as pyarrow's fragments, in an order that stays.

    Raises:
        BadInput: no such table or version.
    """
    return sorted(lake.table(*split_table_ref(ref)).to_pyarrow_dataset().get_fragments(), key=lambda file: file.path)


def columns(file: Any, names: Sequence[str]) -> pl.DataFrame:
    """Some columns of a file, in the order of its rows."""
    import polars as pl

    return pl.DataFrame(pl.from_arrow(file.to_table(columns=list(names), use_threads=False)))


def payloads(file: Any) -> pa.ChunkedArray[Any]:
    """All payloads of a file. Ingest writes none larger than 64 MiB and one poll, so they fit into memory."""
    return file.to_table(columns=["payload"], use_threads=False)["payload"]


def rows(values: pa.ChunkedArray[Any], numbers: pl.Series) -> list[bytes]:
    """Payloads of some rows."""
    return [payload or b"" for payload in values.take(numbers.to_arrow()).to_pylist()]


def answers(
    model: Model, dataset: Images | Table, payloads: Sequence[bytes], check: Callable[[], None]
) -> tuple[NDArray[np.float32], list[str | None]]:  # fmt: skip
    """What the model answers to some events, and why it doesn't where it can't.

    Args:
        payloads: N of them, as they came.
        check: is called before each batch, and raises to end it.

    Returns:
        float32 [N, classes], NaN where there is no answer; and N problems, None for an answer.
    """
    import numpy as np

    found = np.full((len(payloads), len(dataset.classes)), np.nan, np.float32)
    problems: list[str | None] = ["the model's answer isn't finite"] * len(payloads)
    size = max(1, min(evaluation.BATCH, BATCH_BYTES // (4 * int(np.prod(dataset.shape)))))
    numbered = enumerate(samples(payloads, dataset))
    while batch := list(itertools.islice(numbered, size)):
        check()
        problems_here = {i: sample for i, sample in batch if isinstance(sample, str)}
        good = {i: sample for i, sample in batch if not isinstance(sample, str)}
        if good:
            found[list(good)] = run(model, np.stack(list(good.values())))
        for i, problem in problems_here.items():
            problems[i] = problem
    for i in np.flatnonzero(np.isfinite(found).all(axis=1)).tolist():
        problems[i] = None
    return found, problems


def run(model: Model, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities of one batch: float32 [N, *shape] to float32 [N, classes]."""
    answered: NDArray[np.float32] = model.session.run(None, {model.session.get_inputs()[0].name: inputs})[0]
    return answered


def samples(payloads: Sequence[bytes], dataset: Images | Table) -> Iterator[NDArray[np.float32] | str]:
    """Each payload as the model's input, float32 [*shape], as ``forja.client.inputs`` makes it; or what is wrong with it."""
    if isinstance(dataset, Images):
        for payload, image in zip(payloads, loading.decode(payloads, dataset), strict=True):
            yield image if image is not None else "image doesn't decode" if payload else "no value"
        return
    frame = tables.features(tables.parse(payloads, dataset), dataset)
    matrix = frame.select(dataset.features).to_numpy().astype("float32")
    for payload, problem, row in zip(payloads, frame["problem"], matrix, strict=True):
        if problem is None:
            yield row
        else:
            yield "no value" if not payload else tables.json_object(payload)[1] or problem
