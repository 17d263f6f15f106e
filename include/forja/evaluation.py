"""Metrics of a classifier, over probabilities that some runtime has answered."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


BATCH = 256
"""Samples in one run of ``answers``; it bounds memory."""
BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017."""


def answers(model: bytes, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """What an ONNX model answers in ONNX Runtime on this CPU: float32 [N, *shape] to float32 [N, classes]."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(model, options(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    batches = [session.run(None, {name: inputs[i : i + BATCH]})[0] for i in range(0, len(inputs), BATCH)]
    return np.concatenate(batches) if batches else np.zeros((0, session.get_outputs()[0].shape[1]), np.float32)


def options() -> Any:
    """ONNX Runtime's session options wherever it answers for a variant."""
    import onnxruntime

    chosen = onnxruntime.SessionOptions()
    # A sum that is split over threads in another way could round in another way, and golden answers are compared.
    chosen.intra_op_num_threads = 1
    chosen.log_severity_level = 3
    # Without VNNI the kernels for int8 add up in 16 bits and saturate: up to 8 % of digits were answered differently.
    chosen.add_session_config_entry("session.x64quantprecision", "1")
    return chosen


def accuracy(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Share of samples whose largest probability is their label's: float32 [N, classes] and int64 [N]; NaN for N = 0."""
    return float((probabilities.argmax(axis=1) == labels).mean()) if len(labels) else math.nan


def average_precision(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Average precision of class 1 of two (scikit-learn's definition, no interpolation); NaN without a positive sample."""
    from sklearn.metrics import average_precision_score

    if not (labels == 1).any():
        return math.nan
    return float(average_precision_score(labels == 1, probabilities[:, 1]))


def agreement(probabilities: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Share of samples where two models answer the same class: float32 [N, classes] each; NaN for N = 0."""
    return float((probabilities.argmax(axis=1) == reference.argmax(axis=1)).mean()) if len(reference) else math.nan


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


def recalls(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Recall of each class: float32 [N, classes] and int64 [N] to float64 [classes]; NaN for a class without samples."""
    import numpy as np

    counts = np.bincount(labels, minlength=probabilities.shape[1])
    hits = np.bincount(labels[probabilities.argmax(axis=1) == labels], minlength=probabilities.shape[1])
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, hits / np.maximum(counts, 1), np.nan)


def calibration_error(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Expected calibration error with 15 bins of equal width: the mean gap between confidence and accuracy, weighted by samples.

    Guo et al. 2017, "On calibration of modern neural networks", equation 3. NaN for N = 0.
    """
    import numpy as np

    if not len(labels):
        return math.nan
    confidence = probabilities.max(axis=1).astype("float64")
    right = (probabilities.argmax(axis=1) == labels).astype("float64")
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(labels))


def quality(probabilities: NDArray[np.float32], labels: NDArray[np.int64], metric: str) -> dict[str, float]:
    """What a gate may judge of a variant's answers alone: ``measure``, worst class, calibration error, and how many aren't finite.

    Args:
        probabilities: float32 [N, classes].
        labels: int64 [N].
        metric: the recipe's.

    Returns:
        The numbers of ``recipes.base.QUALITY``; those that can't be measured are left out, but for ``nonfinite``.
    """
    import numpy as np

    found = {"nonfinite": float((~np.isfinite(probabilities)).sum())}
    if found["nonfinite"]:
        return found
    found |= measure(probabilities, labels, metric)
    found["calibration_error"] = calibration_error(probabilities, labels)
    present = recalls(probabilities, labels)
    present = present[np.isfinite(present)]
    found["class_recall"] = float(present.min()) if len(present) else math.nan
    return {name: value for name, value in found.items() if math.isfinite(value)}
