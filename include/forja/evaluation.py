"""Metrics of a classifier, over probabilities that some runtime has answered."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def accuracy(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Share of samples whose largest probability is their label's: float32 [N, classes] and int64 [N]; NaN for N = 0."""
    return float((probabilities.argmax(axis=1) == labels).mean()) if len(labels) else math.nan


def average_precision(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Average precision of class 1 of two (scikit-learn's definition, no interpolation); NaN without a positive sample."""
    from sklearn.metrics import average_precision_score

    if not (labels == 1).any():
        return math.nan
    return float(average_precision_score(labels == 1, probabilities[:, 1]))


def disagreement(probabilities: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Share of samples where two models answer different classes: float32 [N, classes] each; NaN for N = 0."""
    return float((probabilities.argmax(axis=1) != reference.argmax(axis=1)).mean()) if len(reference) else math.nan


def measure(probabilities: NDArray[np.float32], labels: NDArray[np.int64], metric: str) -> dict[str, float]:
    """Accuracy, and average precision when the recipe's ``metric`` is that.

    A number that can't be measured is left out, and so are all of them when a probability isn't finite: a gate fails on
    what is missing, and argmax over NaN would look like an answer.
    """
    import numpy as np

    if not np.isfinite(probabilities).all():
        return {}
    found = {"accuracy": accuracy(probabilities, labels)}
    if metric == "average_precision":
        found["average_precision"] = average_precision(probabilities, labels)
    return {name: value for name, value in found.items() if math.isfinite(value)}
