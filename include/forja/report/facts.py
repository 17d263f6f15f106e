"""What the report of a run shows, gathered from the receipts behind its gate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from forja.gates import Decision
from forja.receipts import Receipt
from forja.recipes.base import QUALITY, SPEED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from forja.stages.base import Work


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line over the epochs."""

    name: str
    points: tuple[tuple[float, float], ...]
    """Epoch and value."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything on the page."""

    recipe: str
    description: str
    chosen: str
    reason: str
    dataset: Mapping[str, Any]
    """statistics.json of the dataset: rows and classes of each split, rejected events, mean and std."""
    curves: tuple[Curve, ...]
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Samples of the validation split by true class and by answer of ``shown``."""
    shown: str
    """The variant whose answers the confusion matrix counts."""
    variants: Mapping[str, Mapping[str, float | None]]
    """Numbers of each variant by name."""
    verdicts: tuple[Mapping[str, Any], ...]
    stages: tuple[tuple[str, float], ...]
    """Name and seconds of each stage behind the gate."""
    test: Mapping[str, float]
    """Numbers of the chosen variant on the test split."""
    notes: tuple[str, ...]
    """What was measured how, and what wasn't."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the numbers that any variant has, in the order of the catalogue."""
        known = {name for numbers in self.variants.values() for name, value in numbers.items() if value is not None}
        return tuple(name for name in (*QUALITY, *SPEED) if name in known)


def confusion(answers: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
    """Counts by true class (rows) and answered class: float32 [N, classes] and int64 [N]."""
    import numpy

    count = answers.shape[1]
    cells = numpy.bincount(labels * count + answers.argmax(axis=1), minlength=count * count)
    return tuple(tuple(int(x) for x in row) for row in cells.reshape(count, count))


def gather(
    work: Work, recipe: str, classes: tuple[str, ...], decision: Decision, optimized: Mapping[str, Receipt],
    answers: Mapping[str, NDArray[np.float32]], labels: NDArray[np.int64], variants: Mapping[str, Mapping[str, float | None]],
    test: Mapping[str, float],
) -> Facts:  # fmt: skip
    """Follow the receipts; a part that one of them lacks is left out.

    Args:
        optimized: optimize receipts by variant.
        answers: probabilities on the validation split by variant, float32 [N, classes].
        labels: int64 [N].
        variants: numbers of each variant.
        test: numbers on the test split.
    """
    one = next(iter(optimized.values()))
    dataset, model = work.receipt(one.inputs["dataset"][0]), work.receipt(one.inputs["model"][0])
    training = [work.receipt(item) for item in model.inputs.get("training", [])]
    stages = [("transform", dataset.seconds), *(("train", r.seconds) for r in training), ("register", model.seconds)]
    stages += [(f"optimize {variant}", receipt.seconds) for variant, receipt in optimized.items()]
    shown = decision.chosen or next(iter(answers))
    has = "statistics.json" in dataset.outputs
    return Facts(
        recipe=recipe, description=f"model version {model.facts.get('version', '')}", chosen=decision.chosen, reason=decision.reason,
        dataset=json.loads(work.load(dataset, "statistics.json")) if has else {},
        curves=_curves(work, training[0]) if training else (), classes=classes, confusion=confusion(answers[shown], labels), shown=shown,
        variants=variants, verdicts=tuple(asdict(v) for v in decision.verdicts), stages=tuple(stages), test=test,
        notes=tuple(_notes(optimized)),
    )  # fmt: skip


def _curves(work: Work, training: Receipt) -> tuple[Curve, ...]:
    series: dict[str, list[tuple[float, float]]] = {}
    for line in work.load(training, "history.jsonl").splitlines():
        point = json.loads(line)
        for name, value in point["metrics"].items():
            series.setdefault(name, []).append((float(point["step"]), float(value)))
    return tuple(Curve(name=name, points=tuple(points)) for name, points in sorted(series.items()) if name != "epoch_s")


def _notes(optimized: Mapping[str, Receipt]) -> list[str]:
    notes = []
    for variant, receipt in optimized.items():
        facts = receipt.facts
        engine = facts["engine"]
        notes.append(
            f"{variant}: engine by {engine['backend']} {engine['version']} for {engine['compute_capability']}, deserialised: "
            f"{engine['deserialised']}. {engine['reason']}"
        )
        if "emulated" in facts:
            notes.append(f"{variant}: {facts['emulated']}.")
        if facts.get("float32_layers"):
            notes.append(f"{variant}: stays float32, since float16 could overflow: {', '.join(facts['float32_layers'])}.")
    protocols = {r.facts["served"]["protocol"] for r in optimized.values() if "served" in r.facts}
    return [*notes, *(f"Answers are those of {p}." for p in sorted(protocols))]
