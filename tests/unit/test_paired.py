"""Metrics of answers, and what a variant loses on the same samples, against figures worked out by hand and by brute force."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from forja import evaluation, paired

pytestmark = pytest.mark.ml


def answers(classes: Any, count: int = 2, confidence: float = 0.9) -> Any:
    """Probabilities whose largest is that of each class named."""
    found = np.full((len(classes), count), (1 - confidence) / (count - 1), "float32")
    found[np.arange(len(classes)), classes] = confidence
    return found


def test_metrics_leave_out_what_cannot_be_measured() -> None:
    good = np.array([[0.9, 0.1], [0.2, 0.8]], "float32")
    assert evaluation.measure(good, np.array([0, 1]), "average_precision") == {"accuracy": 1.0, "average_precision": 1.0}
    assert evaluation.measure(good, np.array([0, 0]), "average_precision") == {"accuracy": 0.5}  # no positive sample
    assert evaluation.measure(good * np.nan, np.array([0, 1]), "accuracy") == {}
    assert evaluation.measure(good[:0], np.array([], int), "accuracy") == {}


def test_quality_counts_what_is_not_finite_and_says_nothing_else_then() -> None:
    labels = np.array([0, 1, 1])
    assert evaluation.quality(answers([0, 1, 0]), labels, "accuracy") == {
        "nonfinite": 0.0, "accuracy": pytest.approx(2 / 3), "class_recall": 0.5, "calibration_error": pytest.approx(0.9 - 2 / 3),
    }  # fmt: skip
    broken = answers([0, 1, 0])
    broken[1, 0], broken[2, 1] = np.nan, np.inf
    assert evaluation.quality(broken, labels, "accuracy") == {"nonfinite": 2.0}


def test_calibration_error_by_hand() -> None:
    """Ten answers at 0.95 of which nine are right, ten at 0.65 of which three are right: (0.05 + 0.35) / 2."""
    sure, unsure = answers([0] * 10, confidence=0.95), answers([0] * 10, confidence=0.65)
    labels = np.array([0] * 9 + [1] + [0] * 3 + [1] * 7)
    assert evaluation.calibration_error(np.concatenate([sure, unsure]), labels) == pytest.approx(0.2, abs=1e-6)
    assert math.isnan(evaluation.calibration_error(sure[:0], labels[:0]))


def test_the_worst_class_is_told_although_the_mean_holds() -> None:
    labels = np.array([0] * 95 + [1] * 5)
    reference, collapsed = answers(labels), answers([0] * 100)
    drops = paired.class_recall(reference, collapsed, labels)
    assert paired.accuracy(reference, collapsed, labels).value == pytest.approx(0.05)
    assert (drops[0].value, drops[1].value) == (0.0, 1.0)
    assert list(paired.class_recall(reference, collapsed, np.zeros(100, int))) == [0]  # a class without samples has no recall


def test_the_worst_class_is_sure_when_every_class_is() -> None:
    """The class that loses most has many samples; a rare one, which loses nothing, has the wider interval."""
    labels = np.array([0] * 2000 + [1] * 20)
    changed = labels.copy()
    changed[:20] = 1
    drops = paired.class_recall(answers(labels), answers(changed), labels)
    assert drops[0].value > drops[1].value
    assert drops[1].high > drops[0].high
    worst = paired.worst_class(answers(labels), answers(changed), labels)
    assert (worst.value, worst.high) == (drops[0].value, drops[1].high)


CASES = {
    "equal answers": (1000, 0, 0, 0.0),
    "ten lost": (1000, 10, 0, 0.01),
    "as many won as lost": (1000, 20, 20, 0.0),
    "few samples": (20, 2, 0, 0.1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_interval_of_accuracy_holds_the_loss_and_knows_the_pairs(name: str) -> None:
    count, lost, won, value = CASES[name]
    labels = np.zeros(count, int)
    reference, changed = np.zeros(count, int), np.zeros(count, int)
    changed[:lost] = 1
    reference[lost : lost + won] = 1
    drop = paired.accuracy(answers(reference), answers(changed), labels)
    assert drop.value == pytest.approx(value)
    assert drop.low < drop.value < drop.high or lost + won == 0
    assert drop.low <= drop.value <= drop.high
    # Agresti and Min 2005, equation 6, for a 95 % interval.
    b, c, n = lost + 0.5, won + 0.5, count + 2
    assert drop.high - drop.low == pytest.approx(2 * 1.959964 * math.sqrt(b + c - (b - c) ** 2 / n) / n, rel=1e-5)


def test_the_interval_covers_the_truth_in_95_of_100_draws() -> None:
    """1,000 draws of 300 pairs that differ at random: between 93 and 98 % of intervals hold the true loss of 0.02."""
    draw, held = np.random.default_rng(0), 0
    labels = np.zeros(300, int)
    for _ in range(1000):
        kind = draw.choice(3, 300, p=[0.94, 0.04, 0.02])
        drop = paired.accuracy(answers((kind == 2).astype(int)), answers((kind == 1).astype(int)), labels)
        held += drop.low <= 0.02 <= drop.high
    assert 930 <= held <= 980


def test_average_precision_is_compared_on_the_same_draws() -> None:
    rng = np.random.default_rng(1)
    labels = (rng.random(400) < 0.2).astype(int)
    score = np.clip(labels * 0.3 + rng.random(400) * 0.7, 0, 1).astype("float32")
    reference = np.stack([1 - score, score], axis=1)
    same = paired.average_precision(reference, reference, labels)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    worse = np.stack([1 - rng.random(400), rng.random(400)], axis=1).astype("float32")
    drop = paired.average_precision(reference, worse, labels)
    assert 0 < drop.low < drop.value < drop.high
    assert paired.average_precision(reference, worse, labels) == drop
