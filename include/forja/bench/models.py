"""Accuracy of the recipes on data that they never saw: ``python -m forja.bench.models digits|ai4i [DATA]`` in the ml environment.

It runs the very stages transform and train on a lake of its own, with the split turned (and the seed changed) for each
fold, and what register and optimize use to export, quantise and answer. No service is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forja import evaluation, loading, recipes, samples
from forja.lake import Lake, sha256
from forja.precision import calibration, int8
from forja.receipts import Receipt
from forja.recipes.base import Recipe, Table
from forja.settings import Settings
from forja.stages import harness, ingest, register
from forja.stages.base import Work

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FOLDS = 5
DRAWS = 1000
"""Bootstrap draws of the interval."""


def digits() -> dict[str, Any]:
    """Five folds: accuracy of fp32 on held-out samples, and the share of them that int8 answers differently."""
    recipe = recipes.load("digits")
    accuracy, disagree, counts = [], [], []
    with lake(recipe, None) as (settings, raw):
        for fold in range(FOLDS):
            turned = _turned(recipe, fold)
            work, dataset, onnx = trained(settings, turned, raw)
            held = loading.arrays(work, dataset, turned.dataset, "test")
            answers = evaluation.answers(onnx, held.inputs)
            train = loading.arrays(work, dataset, turned.dataset, "train")
            chosen = calibration.balanced(train.labels.tolist(), train.keys, recipe.optimize.calibration_samples)
            quantized = int8.int8(onnx, train.inputs[chosen], work.scratch)
            accuracy.append(evaluation.accuracy(answers, held.labels))
            disagree.append(1 - evaluation.agreement(evaluation.answers(quantized, held.inputs), answers))
            counts.append(len(held.labels))
    share = sum(d * n for d, n in zip(disagree, counts, strict=True)) / sum(counts)
    return {
        "digits_accuracy": sum(accuracy) / FOLDS, "digits_int8_disagree": share,
        "digits_folds": [{"n": n, "accuracy": a, "int8_disagree": d} for n, a, d in zip(counts, accuracy, disagree, strict=True)],
    }  # fmt: skip


def ai4i(data: Path) -> dict[str, Any]:
    """Five seeds: average precision on held-out rows minus HistGradientBoostingClassifier's, with raw and with engineered features.

    The peer learns from training and validation rows; the network from training rows. The interval resamples the
    held-out rows of every seed together for both, and takes the mean difference over seeds.
    """
    recipe = recipes.load("ai4i")
    assert isinstance(recipe.dataset, Table)  # noqa: S101 - our own recipe
    kinds = {"raw": dataclasses.replace(recipe, dataset=dataclasses.replace(recipe.dataset, derived=())), "engineered": recipe}
    found = {}
    with lake(recipe, data) as (settings, raw):
        for name, kind in kinds.items():
            found[name] = _difference([_against_peer(settings, _turned(kind, fold), raw, fold) for fold in range(FOLDS)])
    return {"ai4i_ap_delta": min(f["low"] for f in found.values()), "ai4i": found}


def _turned(recipe: Recipe, fold: int) -> Recipe:
    """The recipe with another fold held out, and another seed."""
    split = dataclasses.replace(recipe.dataset.split, test=1 / FOLDS, rotate=fold / FOLDS)
    return dataclasses.replace(
        recipe, dataset=dataclasses.replace(recipe.dataset, split=split), training=dataclasses.replace(recipe.training, seed=fold)
    )


@contextlib.contextmanager
def lake(recipe: Recipe, data: Path | None) -> Any:
    """A lake whose raw table holds the recipe's samples; no MLflow, no Kafka."""
    import pyarrow as pa

    cache = str(Settings.from_env().cache)
    with tempfile.TemporaryDirectory(prefix="forja-bench-") as folder:
        settings = Settings.from_env({"FORJA_STATE": folder, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "FORJA_CACHE": cache})
        place, path = Lake(settings.lake), ingest.table_path(recipe.team, recipe.name)
        rows = [
            {
                "key": s.key, "label": s.label, "payload": s.payload, "sha256": sha256(s.payload), "error": None, "topic_id": "bench",
                "partition": 0, "offset": offset, "time": 0,
            } for offset, s in enumerate(samples.samples(recipe, data))
        ]  # fmt: skip
        table = ingest.open_table(place, path)
        ingest.commit(table, pa.Table.from_pylist(rows, schema=pa.schema(ingest.schema())), {"bench-0": len(rows)}, {"bench-0": None})
        yield settings, f"{path}@1"


def trained(settings: Settings, recipe: Recipe, raw: str) -> tuple[Work, Receipt, bytes]:
    """Dataset and exported network of a recipe."""
    dataset, _ = harness.execute(settings, "transform", recipe, {"raw": [raw]})
    training, _ = harness.execute(settings, "train", recipe, {"dataset": [dataset.path]})
    scratch = Path(tempfile.mkdtemp(dir=settings.state))
    lake = Lake(settings.lake)
    work = Work(settings=settings, lake=lake, folder="bench/bench", key="", scratch=scratch, check=lambda: None)
    return (
        work,
        dataset,
        register.export(register.network(recipe.dataset, recipe.model, work.load(training, "model.pt")), recipe.dataset.shape),
    )


def _against_peer(settings: Settings, recipe: Recipe, raw: str, seed: int) -> dict[str, NDArray[Any]]:
    """Scores of the positive class by both models on the held-out rows, and the labels."""
    import numpy as np
    from sklearn.ensemble import HistGradientBoostingClassifier

    work, dataset, onnx = trained(settings, recipe, raw)
    train, validation, test = (loading.arrays(work, dataset, recipe.dataset, split) for split in ("train", "validation", "test"))
    peer = HistGradientBoostingClassifier(random_state=seed)
    peer.fit(np.concatenate([train.inputs, validation.inputs]), np.concatenate([train.labels, validation.labels]))
    return {"labels": test.labels, "ours": evaluation.answers(onnx, test.inputs)[:, 1], "peer": peer.predict_proba(test.inputs)[:, 1]}


def _difference(seeds: list[dict[str, NDArray[Any]]]) -> dict[str, Any]:
    """Mean difference of average precision over seeds, with its 95 % bootstrap interval over rows."""
    import numpy as np
    from sklearn.metrics import average_precision_score

    def mean(rows: list[NDArray[np.int64]]) -> float:
        return float(np.mean([
            average_precision_score(s["labels"][r], s["ours"][r]) - average_precision_score(s["labels"][r], s["peer"][r])
            for s, r in zip(seeds, rows, strict=True)
        ]))  # fmt: skip

    everything = [np.arange(len(s["labels"])) for s in seeds]
    draw = np.random.default_rng(0)
    means = [mean([draw.choice(rows, len(rows)) for rows in everything]) for _ in range(DRAWS)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {
        "delta": mean(everything), "low": float(low), "high": float(high),
        "ours": [float(average_precision_score(s["labels"], s["ours"])) for s in seeds],
        "peer": [float(average_precision_score(s["labels"], s["peer"])) for s in seeds],
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(digits() if sys.argv[1] == "digits" else ai4i(Path(sys.argv[2]))))
