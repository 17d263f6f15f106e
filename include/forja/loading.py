"""Loading of samples by DALI: the same graph feeds training, evaluation, calibration and the clients of served models.

Without a GPU DALI runs on the CPU (``device_id=None``); with one, images are decoded on it.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forja import decoder
from forja.errors import BadInput
from forja.receipts import Receipt
from forja.recipes.base import Images, Table
from forja.shards import extension

if TYPE_CHECKING:
    import numpy as np

    from forja.stages.base import Work

CHUNK = 64
"""Samples that are decoded at once outside training."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Local copies of one split."""

    paths: list[str]
    indexes: list[str]


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """One split in memory."""

    inputs: np.ndarray[Any, Any]
    """float32 [N, *shape], raw: grey levels 0 to 255, or features in their own units."""
    labels: np.ndarray[Any, Any]
    """int64 [N], class numbers."""
    keys: list[str]


def fetch(work: Work, receipt: Receipt, split: str) -> Shards:
    """Copy the shards of a split from the lake to the scratch folder, digests checked."""
    names = sorted(n for n in receipt.outputs if n.startswith(f"{split}-") and n.endswith(".tar"))
    if not names:
        raise BadInput(f"split of dataset {receipt.path}", value=split, allowed="train, validation, test")
    paths = []
    for name in [*names, *(n.removesuffix("tar") + "idx" for n in names)]:
        path = work.scratch / name
        if not path.exists():
            path.write_bytes(work.load(receipt, name))
        paths.append(str(path))
    return Shards(paths=paths[: len(names)], indexes=paths[len(names) :])


def arrays(work: Work, receipt: Receipt, dataset: Images | Table, split: str) -> Arrays:
    """A split of a dataset, in the order of the shards (that of the keys' hashes)."""
    import numpy as np

    keys = json.loads(work.load(receipt, "keys.json"))[split]
    count = len(keys)
    pipe = Pipelines().shards(dataset, fetch(work, receipt, split), batch_size=min(CHUNK, count), threads=2)
    inputs, labels = [], []
    for _ in range(0, count, CHUNK):
        batch, numbers = pipe.run()
        inputs.append(batch.as_array())
        labels.append(numbers.as_array()[:, 0])
    # The last batch is filled up with repetitions.
    return Arrays(inputs=np.concatenate(inputs)[:count].astype("float32"), labels=np.concatenate(labels)[:count].astype("int64"), keys=keys)


def payloads(work: Work, receipt: Receipt, split: str) -> tuple[list[bytes], np.ndarray[Any, Any], list[str]]:
    """A split's samples as they came, in the order of ``arrays``: encoded bytes, class numbers int64 [N], keys."""
    import numpy as np

    found: dict[str, list[bytes]] = {"payload": [], "cls": []}
    for path in fetch(work, receipt, split).paths:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                found["cls" if member.name.endswith(".cls") else "payload"].append(file.read() if file else b"")
    labels = np.frombuffer(b"".join(found["cls"]), "<i4").astype("int64")
    return found["payload"], labels, json.loads(work.load(receipt, "keys.json"))[split]


def decode(payloads: Sequence[bytes], dataset: Images) -> Iterator[np.ndarray[Any, Any] | None]:
    """Images as the model wants them, float32 [C, H, W] of grey levels 0 to 255; None for one that doesn't decode.

    DALI (2.2, on a CPU) has crashed its process for a broken JPEG among good images, so a process of its own decodes
    them all, and what crashes it counts as an image that doesn't decode.
    """
    with decoder.Decoder(dataset.shape) as child:
        for start in range(0, len(payloads), decoder.CHUNK):
            yield from _survivors(child, payloads[start : start + decoder.CHUNK])


def _survivors(child: decoder.Decoder, chunk: Sequence[bytes]) -> list[Any]:
    """A chunk's images; when it crashes the process, one by one."""
    found: list[Any] | None = child.ask(chunk)
    if found is None:
        found = [(child.ask([payload]) or [None])[0] for payload in chunk]
        good = [p for p, image in zip(chunk, found, strict=True) if image is not None]
        if good and child.ask(good) is None:
            # They crash in company alone, as they would in training; there is no telling which one it is.
            return [None] * len(chunk)
    return found


class Pipelines:
    """DALI's pipelines; a class only so that DALI is imported when the first one is built."""

    def __init__(self) -> None:
        from nvidia.dali import fn, pipeline_def, types

        self.fn, self.types, self.pipeline_def = fn, types, pipeline_def

    def image(self, raw: Any, shape: tuple[int, ...], device: str) -> Any:
        """Encoded bytes to float32 of ``shape`` (channels, height, width)."""
        kind = self.types.GRAY if shape[0] == 1 else self.types.RGB
        pixels = self.fn.decoders.image(raw, device=device, output_type=kind)
        pixels = self.fn.resize(pixels, size=list(shape[1:]), antialias=True)
        return self.fn.crop_mirror_normalize(pixels, dtype=self.types.FLOAT, output_layout="CHW")

    def memory(self, shape: tuple[int, ...], batch_size: int) -> Any:
        """A pipeline over bytes in memory, ``run(raw=[...])`` with up to ``batch_size`` of them; one output [N, *shape] float32."""

        @self.pipeline_def  # type: ignore[untyped-decorator]
        def graph() -> Any:
            return self.image(self.fn.external_source(name="raw", batch=True, dtype=self.types.UINT8, ndim=1), shape, "cpu")

        return graph(batch_size=batch_size, num_threads=2, device_id=None, prefetch_queue_depth=1)

    def shards(
        self, dataset: Images | Table, shards: Shards, *, batch_size: int, threads: int, rank: int = 0, world: int = 1,
        shuffle: bool = False, seed: int = 0, device_id: int | None = None,
    ) -> Any:  # fmt: skip
        """A pipeline over shards with two outputs, inputs [N, *shape] float32 and class numbers [N, 1] int32."""
        gpu = device_id is not None
        image = isinstance(dataset, Images)

        @self.pipeline_def  # type: ignore[untyped-decorator]
        def graph() -> Any:
            payload, label = self.fn.readers.webdataset(
                paths=shards.paths, index_paths=shards.indexes, ext=[extension(dataset), "cls"],
                dtypes=[self.types.UINT8 if image else self.types.FLOAT, self.types.INT32], missing_component_behavior="error",
                shard_id=rank, num_shards=world, random_shuffle=shuffle, initial_fill=4096, pad_last_batch=True, seed=seed, name="reader",
            )  # fmt: skip
            if isinstance(dataset, Images):
                payload = self.image(payload, dataset.shape, "mixed" if gpu else "cpu")
            elif gpu:
                payload = payload.gpu()
            return payload, label

        return graph(batch_size=batch_size, num_threads=threads, device_id=device_id)


def training_batches(
    dataset: Images | Table, shards: Shards, *, batch_size: int, rank: int, world: int, shuffle: bool, seed: int, device_id: int | None
) -> Any:
    """Batches of one rank's share as ``[{"inputs": float32 [N, *shape], "labels": int32 [N, 1]}]`` torch tensors.

    With ``shuffle`` the last, smaller batch is dropped; without, every sample comes exactly once. Each pass over the
    iterator is an epoch.
    """
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    pipe = Pipelines().shards(
        dataset, shards, batch_size=batch_size, threads=1, rank=rank, world=world, shuffle=shuffle, seed=seed, device_id=device_id
    )
    policy = LastBatchPolicy.DROP if shuffle else LastBatchPolicy.PARTIAL
    return DALIGenericIterator([pipe], ["inputs", "labels"], reader_name="reader", last_batch_policy=policy, auto_reset=True)
