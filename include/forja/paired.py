"""What a variant loses against fp32 on the very same samples, with a 95 % interval that knows they are the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forja import evaluation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONFIDENCE = 0.95
DRAWS = 1000
"""Bootstrap draws of an interval."""


@dataclass(frozen=True, kw_only=True)
class Drop:
    """A loss: the reference's number minus the variant's."""

    value: float
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""


def accuracy(reference: NDArray[np.float32], answers: NDArray[np.float32], labels: NDArray[np.int64], tests: int = 1) -> Drop:
    """Loss of accuracy, with the interval for matched proportions of Agresti and Min (2005), which adds half a sample to each cell.

    Only the samples that exactly one of both gets right count, as in McNemar's test.

    Args:
        reference: probabilities of fp32, float32 [N, classes].
        answers: those of the variant, float32 [N, classes].
        labels: int64 [N]; one sample or more.
        tests: intervals that are looked at together: each is as wide as it takes for all to hold at once (Bonferroni).
    """
    from scipy.stats import norm

    before, after = (a.argmax(axis=1) == labels for a in (reference, answers))
    lost, won, count = int((before & ~after).sum()), int((~before & after).sum()), len(labels)
    b, c, n = lost + 0.5, won + 0.5, count + 2
    middle, spread = (b - c) / n, math.sqrt(b + c - (b - c) ** 2 / n) / n
    half = float(norm.ppf(1 - (1 - CONFIDENCE) / 2 / tests)) * spread
    return Drop(value=(lost - won) / count, low=middle - half, high=middle + half)


def class_recall(reference: NDArray[np.float32], answers: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[int, Drop]:
    """Loss of recall of each class that has samples: shapes as for ``accuracy``; the intervals hold together."""
    import numpy as np

    present = [int(c) for c in np.unique(labels)]
    return {c: accuracy(reference[labels == c], answers[labels == c], labels[labels == c], tests=len(present)) for c in present}


def worst_class(reference: NDArray[np.float32], answers: NDArray[np.float32], labels: NDArray[np.int64]) -> Drop:
    """The largest loss of recall of any class, and the largest upper end of any class's interval, which may be another's.

    Shapes as for ``accuracy``; one sample or more.
    """
    drops = class_recall(reference, answers, labels).values()
    worst = max(drops, key=lambda drop: (drop.value, drop.high))
    return Drop(value=worst.value, low=worst.low, high=max(drop.high for drop in drops))


def average_precision(reference: NDArray[np.float32], answers: NDArray[np.float32], labels: NDArray[np.int64]) -> Drop:
    """Loss of average precision of class 1 of two, with a percentile bootstrap over samples; shapes as for ``accuracy``.

    The draws are of both answers to the same samples, and always the same draws. Draws without a positive sample are left out.
    """
    import numpy as np

    def loss(rows: NDArray[np.int64]) -> float:
        chosen = labels[rows]
        return evaluation.average_precision(reference[rows], chosen) - evaluation.average_precision(answers[rows], chosen)

    everything, draw = np.arange(len(labels)), np.random.default_rng(0)
    losses = [loss(draw.choice(everything, len(everything))) for _ in range(DRAWS)]
    low, high = np.nanpercentile(losses, [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2])
    return Drop(value=loss(everything), low=float(low), high=float(high))
