"""NVIDIA's perf_analyzer, where its real binary is: the same load by another generator.

``pip install perf-analyzer`` gives a placeholder, version 0.1.0, where no wheel fits the machine's C library; it counts as absent.
https://github.com/triton-inference-server/perf_analyzer/blob/main/docs/cli.md
"""

from __future__ import annotations

import base64
import csv
import json
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from forja.errors import Unavailable
from forja.serving.repository import INPUT
from forja.tune.transport import Target

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PLACEHOLDER = "0.1.0"


def find() -> str:
    """Path of the binary; empty when there is none, or only the placeholder."""
    path = shutil.which("perf_analyzer") or ""
    try:
        return "" if metadata.version("perf-analyzer") == PLACEHOLDER else path
    except metadata.PackageNotFoundError:
        return path


def throughput(binary: str, target: Target, sample: NDArray[np.float32], *, in_flight: int, seconds: float, scratch: Path) -> float:
    """Answers per second with ``in_flight`` requests of one sample, float32 [1, *shape], under way all the time.

    Raises:
        Unavailable: it ended with an error, or without a result.
    """
    data = {
        "data": [{INPUT: {"content": {"b64": base64.b64encode(sample.astype("<f4").tobytes()).decode()}, "shape": list(sample.shape[1:])}}]
    }
    given, result = scratch / "perf_analyzer.json", scratch / "perf_analyzer.csv"
    given.write_text(json.dumps(data))
    result.unlink(missing_ok=True)
    command = [
        binary, "-m", target.model, "-u", target.address, "-i", target.protocol, "--concurrency-range", str(in_flight), "--input-data",
        str(given), "--measurement-interval", str(round(seconds * 1000)), "--max-trials", "3", "-f", str(result),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 + 10 * seconds)
    if not result.is_file():
        raise Unavailable("perf_analyzer gave no result", value=(done.stdout + done.stderr)[-500:])
    with result.open(newline="") as file:
        row = next(csv.DictReader(file), None)
    if row is None:
        raise Unavailable("perf_analyzer gave no result", value=result.read_text()[:500])
    return float(row["Inferences/Second"])
