"""Calibration: which training samples set the ranges of int8, and the ranges that they set.

All samples count, whatever the batches that they come in, and they come in the model's own shape: a range from the last batch alone,
or from images of another size, is what makes int8 collapse.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forja.errors import BadInput, Refused

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnx import ModelProto

BATCH = 32
"""Samples in one calibration run; it bounds memory and changes nothing else."""
OPTIONS: dict[str, dict[str, Any]] = {
    "minmax": {"symmetric": True},
    # With 512 bins and more the search cuts deep into activations behind a ReLU, whose zeros fill one bin: a residual network on
    # CIFAR-10 answered 6 % of images otherwise than in float32, against 1 % with 128.
    "entropy": {"symmetric": True, "num_bins": 128},
    "percentile": {"symmetric": True, "num_bins": 2048},
}
"""Ways to find the range of an activation, and what onnxruntime's calibrators are told."""


def balanced(labels: Sequence[int], keys: Sequence[str], count: int) -> list[int]:
    """Indices of up to ``count`` samples, taken from the classes in turn, in key order within each class.

    The same samples whatever the order in which they are stored; a class that runs out leaves its turn to the others.
    """
    if not len(keys):
        raise BadInput("calibration samples", value=0, allowed="one or more", do="give the training split some samples")
    turns: Counter[int] = Counter()
    ranked = []
    for index in sorted(range(len(keys)), key=lambda i: keys[i]):
        label = int(labels[index])
        ranked.append((turns[label], label, index))
        turns[label] += 1
    return [index for _, _, index in sorted(ranked)[:count]]


def ranges(
    model: ModelProto, samples: NDArray[np.float32], scratch: Path, *, method: str = "minmax", percentile: float = 99.99,
    operators: Sequence[str] = (),
) -> Any:  # fmt: skip
    """Range of every float activation over all samples: onnxruntime's ``TensorsData``.

    Args:
        model: float32 ONNX with one input and inferred shapes.
        samples: float32 [N, *shape] of raw inputs.
        scratch: a folder for temporary files.
        method: ``minmax``, ``entropy`` (the range whose 8-bit histogram differs least from the full one, Kullback-Leibler) or
            ``percentile``.
        percentile: percentage of values within the range, for that method.
        operators: only activations beside these operators; all when empty.

    Raises:
        BadInput: samples of another shape than the model's input, or no such method.
        Refused: a sample, or an activation that it leads to, isn't finite.
    """
    import numpy
    import onnx
    from onnxruntime.quantization import CalibrationMethod, calibrate

    if method not in OPTIONS:
        raise BadInput("calibration method", value=method, allowed=", ".join(OPTIONS))
    _check(model, samples)
    methods = {"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy, "percentile": CalibrationMethod.Percentile}
    options = OPTIONS[method] | ({"percentile": percentile} if method == "percentile" else {})
    source = scratch / "calibrated.onnx"
    onnx.save(model, source)
    calibrator = calibrate.create_calibrator(
        source, list(operators), str(scratch / "augmented.onnx"), methods[method], extra_options=options,
    )  # fmt: skip
    # Batch by batch: the calibrators keep every activation of what they are given at once.
    with contextlib.redirect_stdout(io.StringIO()):
        for start in range(0, len(samples), BATCH):
            calibrator.collect_data(Reader(model.graph.input[0].name, samples[start : start + BATCH]))
        found = calibrator.compute_data()
    broken = [name for name, item in found.data.items() if not numpy.isfinite([item.lowest, item.highest]).all()]
    if broken:
        raise Refused("calibration: activations aren't finite", value=broken[:5], do="look for broken samples, or lower the learning rate")
    return found


def peaks(model: ModelProto, samples: NDArray[np.float32], scratch: Path) -> dict[str, float]:
    """Largest absolute value of every float activation over all samples; errors as for ``ranges``."""
    import numpy

    found = ranges(model, samples, scratch)
    return {name: float(numpy.abs([item.lowest, item.highest]).max()) for name, item in found.data.items()}


def _check(model: ModelProto, samples: NDArray[np.float32]) -> None:
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    if list(samples.shape[1:]) != dims or not len(samples):
        raise BadInput("calibration samples: shape", value=list(samples.shape), allowed=f"[1 or more, {', '.join(map(str, dims))}]")


class Reader:
    """Samples as the one batch that onnxruntime's tools read."""

    def __init__(self, name: str, samples: NDArray[np.float32]) -> None:
        self._batches: Iterator[dict[str, Any]] = iter([{name: samples}])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._batches

    def get_next(self) -> dict[str, Any] | None:
        """See onnxruntime's CalibrationDataReader."""
        return next(self._batches, None)
