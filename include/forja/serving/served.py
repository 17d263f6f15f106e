"""How a variant answers as served: Triton is started with it, and labelled samples go the whole way that a client's requests go."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from forja import loading
from forja.errors import Damaged
from forja.receipts import Receipt
from forja.recipes.base import Images, Table
from forja.serving import repository, trial
from forja.serving.repository import Release
from forja.serving.triton import Endpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from forja.stages.base import Work

REQUESTS, BATCHES = 200, 20
"""Requests of one sample, and of a full batch, at most."""
SECONDS = 3.0
"""After these it is enough, when a tenth of the requests are done."""
PROTOCOL = (
    f"Triton on this CPU over HTTP on the loopback, one client that sends {REQUESTS} requests of one sample, then {BATCHES} of a full "
    f"batch, or fewer in {SECONDS:g} s; the first tenth doesn't count"
)


def samples(work: Work, receipt: Receipt, dataset: Images | Table, split: str) -> loading.Arrays:
    """A split as a client would send it: images from their files by the client's decoder, rows as their features.

    Raises:
        Damaged: an image that transform could decode doesn't decode.
    """
    import numpy as np

    if isinstance(dataset, Table):
        return loading.arrays(work, receipt, dataset, split)
    payloads, labels, keys = loading.payloads(work, receipt, split)
    images = [(key, image) for key, image in zip(keys, loading.decode(payloads, dataset), strict=True)]
    if broken := [key for key, image in images if image is None]:
        raise Damaged(f"images of {receipt.path} that don't decode", value=broken[:5], do=f"run transform again: {receipt.command}")
    return loading.Arrays(inputs=np.stack([image for _, image in images if image is not None]), labels=labels, keys=keys)


def ask(work: Work, model: bytes, release: Release, inputs: NDArray[np.float32]) -> tuple[NDArray[np.float32], dict[str, float]]:
    """Serve a model and ask it for every sample.

    Args:
        model: ONNX that ONNX Runtime runs on a CPU.
        release: what is served; its digests aren't needed.
        inputs: float32 [N, *shape], raw.

    Returns:
        Probabilities float32 [N, classes]; p50_ms, p99_ms, throughput (samples per second) and memory_mb (twice this server: two
        releases side by side), all on this CPU by ``PROTOCOL``; server_cpu_s, the processor time of all of it.

    Raises:
        BadInput: the serving environment hasn't been made.
        Refused: Triton can't load it.
        Unavailable: Triton doesn't answer.
    """
    place = work.scratch / f"serve-{release.variant}"
    repository.unpack(place / release.model, repository.files(release, model))
    with trial.server(work.settings, place, work.scratch) as server:
        server.wait(release.model, release.version, check=work.check)
        with Endpoint(server.http, release.model, release.max_batch) as endpoint:
            probabilities, _ = endpoint.ask(inputs)
            speed = _speed(endpoint, inputs, release.max_batch)
        speed["memory_mb"] = round(2 * _memory(server.pid) / 1e6, 1)
        speed["server_cpu_s"] = round(_cpu_seconds(server.pid), 2)
    return probabilities, speed


def _speed(endpoint: Endpoint, inputs: NDArray[np.float32], max_batch: int) -> dict[str, float]:
    import numpy as np

    p50, p99 = np.percentile(_times(endpoint, inputs, 1, REQUESTS), [50, 99])
    seconds = float(np.median(_times(endpoint, inputs, max_batch, BATCHES)))
    return {"p50_ms": round(float(p50) * 1e3, 3), "p99_ms": round(float(p99) * 1e3, 3), "throughput": round(max_batch / seconds, 1)}


def _times(endpoint: Endpoint, inputs: NDArray[np.float32], size: int, count: int) -> list[float]:
    """Seconds of each request, without the first tenth."""
    import numpy as np

    found: list[float] = []
    began = time.perf_counter()
    for i in range(count + count // 10):
        rows = np.arange(i * size, (i + 1) * size) % len(inputs)
        start = time.perf_counter()
        endpoint.ask(inputs[rows])
        found.append(time.perf_counter() - start)
        if time.perf_counter() - began > SECONDS and i >= count // 5:
            break
    return found[count // 10 :]


def _memory(pid: int) -> int:
    """Proportional set size of a server and of the processes of its models, in bytes."""
    total = 0
    for folder, _ in _session(pid):
        with contextlib.suppress(OSError):  # it ended meanwhile
            lines = (folder / "smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def _cpu_seconds(pid: int) -> float:
    """Processor time of a server and of the processes of its models."""
    return sum(int(fields[11]) + int(fields[12]) for _, fields in _session(pid)) / os.sysconf("SC_CLK_TCK")


def _session(pid: int) -> Iterator[tuple[Path, list[str]]]:
    """Folder in /proc of every process of a session, and the fields of its stat behind the name: state, parent, group, session..."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == pid:
                    yield folder, fields
