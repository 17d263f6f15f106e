"""Metrics of a classifier, over probabilities that some runtime has answered."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


BATCH = 256
"""Samples in one run of ``answers``; it bounds memory."""


def answers(model: bytes, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """What an ONNX model answers in ONNX Runtime on this CPU: float32 [N, *shape] to float32 [N, classes]."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # A sum that is split over threads in another way could round in another way, and golden answers are compared.
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Without VNNI the kernels for int8 add up in 16 bits and saturate: up to 8 % of digits were answered differently.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    batches = [session.run(None, {name: inputs[i : i + BATCH]})[0] for i in range(0, len(inputs), BATCH)]
    return np.concatenate(batches) if batches else np.zeros((0, session.get_outputs()[0].shape[1]), np.float32)


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
