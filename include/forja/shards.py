"""Training-ready shards: tar files in the webdataset layout, each with the index that DALI's reader wants.

A sample is two members: ``<n>.img`` (PNG or JPEG as it came) or ``<n>.f32`` (features, float32 little-endian), then
``<n>.cls`` (class number, int32 little-endian).
"""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Iterable

from forja.recipes.base import Images, Table


def extension(dataset: Images | Table) -> str:
    """Name of the payload's member."""
    return "img" if isinstance(dataset, Images) else "f32"


def pack(samples: Iterable[tuple[bytes, int]], payload: str) -> tuple[bytes, bytes]:
    """One shard and its index from (payload, class number) pairs; equal samples give equal bytes.

    The index has the form that DALI's ``wds2idx`` writes: a version line, then for each sample extension, offset, size
    and name of each member.
    """
    buffer = io.BytesIO()
    lines = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (data, label) in enumerate(samples):
            parts = []
            for name, content in ((payload, data), ("cls", struct.pack("<i", label))):
                info = tarfile.TarInfo(f"{number:08d}.{name}")
                info.size = len(content)
                parts.append(f"{name} {tar.offset + tarfile.BLOCKSIZE} {len(content)} {info.name}")
                tar.addfile(info, io.BytesIO(content))
            lines.append(" ".join(parts))
    return buffer.getvalue(), "\n".join([f"v1.2 {len(lines)}", *lines, ""]).encode()
