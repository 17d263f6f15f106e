"""From buildah's store into containerd's, layer by layer: what containerd has already is neither exported nor sent again.

Layers are compressed with zstd at its fastest: the packages of the image `ml` shrink to a half of 8 GB faster than a disk takes them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cluster.kit import ClusterError
from cluster.kit.image_base import buildah
from cluster.kit.node import Node
from cluster.kit.places import Places

KIND = "application/vnd.oci.image"
REPOSITORY = "docker.io/forja/"


def held(node: Node) -> Held:
    """What containerd holds of Forja's images."""
    blobs = set(node.ctr("content", "ls", "--quiet").split())
    images: dict[str, str] = {}
    layers: dict[str, dict[str, Any]] = {}
    for line in node.ctr("images", "check").splitlines()[1:]:
        name, _, digest, *_, unpacked = line.split()
        if name.startswith(REPOSITORY) and digest in blobs:
            manifest = json.loads(node.ctr("content", "get", digest))
            config = manifest["config"]["digest"]
            if config in blobs and all(layer["digest"] in blobs for layer in manifest["layers"]):
                # An import that was cut short leaves the image without its file system: it is sent again, without a layer.
                images |= {name: config} if unpacked == "true" else {}
                names = json.loads(node.ctr("content", "get", config))["rootfs"]["diff_ids"]
                layers.update(zip(names, manifest["layers"], strict=True))
    return Held(images=images, layers=layers)


@contextmanager
def exported(node: Node, ref: str, identity: str, have: Held) -> Iterator[Export]:
    """Export an image's layers that containerd lacks, into a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=node.places.images, prefix=".export-") as scratch:
        folder = Path(scratch)
        blobs = folder / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        # buildah writes no layer that is in the folder already, and doesn't look into it: an empty file stands for what containerd has.
        for name in have.layers:
            (blobs / name.removeprefix("sha256:")).touch()
        options = ("--quiet", "--format", "oci", "--compression-format", "zstd", "--compression-level", "1")
        buildah(node.places, "push", *options, identity.removeprefix("sha256:"), f"oci:{folder}:new")
        (entry,) = json.loads((folder / "index.json").read_text())["manifests"]
        manifest = json.loads(_blob(folder, entry["digest"]).read_bytes())
        names = json.loads(_blob(folder, identity).read_bytes())["rootfs"]["diff_ids"]
        fresh = [layer["digest"] for name, layer in zip(names, manifest["layers"], strict=True) if name not in have.layers]
        manifest["layers"] = [have.layers.get(name, layer) for name, layer in zip(names, manifest["layers"], strict=True)]
        yield Export(folder=folder, ref=ref, manifest={**manifest, "mediaType": f"{KIND}.manifest.v1+json"}, fresh=tuple(fresh))


def send(node: Node, export: Export) -> None:
    """Import an exported image; containerd unpacks it.

    Raises:
        ClusterError: containerd refused it.
    """
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source:
        writer = threading.Thread(target=_write, args=(export, os.fdopen(writing, "wb")))
        writer.start()
        try:
            node.import_archive(source)
        finally:
            source.close()
            writer.join()


def drop_nameless(node: Node) -> None:
    """Remove images that another one has taken the name of: the kubelet's side of containerd keeps them, and their layers, by digest."""
    lines = [line.split()[:3] for line in node.ctr("images", "ls").splitlines()[1:]]
    named = {digest for name, _, digest in lines if not name.startswith("sha256:")}
    if nameless := [name for name, _, digest in lines if digest not in named]:
        node.ctr("images", "rm", "--sync", *nameless)


def share(places: Places, name: str) -> int:
    """Let buildah's layer of an environment and containerd's be the same files on the disk: 8 GB less for `ml`. Bytes that it freed.

    Both only ever read them: what changes a file of a layer makes a copy of it in another.
    """
    marker = f"opt/forja-cache/{name}/forja-complete.json"
    built = {_stamp(path): path.parent for path in (places.cache / "buildah" / "overlay").glob(f"*/diff/{marker}")}
    freed = 0
    for path in (places.containerd / "io.containerd.snapshotter.v1.overlayfs" / "snapshots").glob(f"*/fs/{marker}"):
        if source := built.get(_stamp(path)):
            freed += _link(source, path.parent)
    return freed


def _link(source: Path, target: Path) -> int:
    freed = 0
    for place, _, files in os.walk(target):
        for name in files:
            one, other = source / Path(place).relative_to(target) / name, Path(place) / name
            if one.is_file() and not one.is_symlink() and _stamp(one) == _stamp(other) and one.stat().st_ino != other.stat().st_ino:
                freed += other.stat().st_size
                half = other.with_name(f".{name}.share")
                half.hardlink_to(one)
                half.replace(other)
    return freed


def _stamp(path: Path) -> tuple[int, ...]:
    found = path.lstat()
    return found.st_mode, found.st_uid, found.st_gid, found.st_size, found.st_mtime_ns


def _write(export: Export, out: IO[bytes]) -> None:
    manifest = json.dumps(export.manifest, sort_keys=True).encode()
    digest = hashlib.sha256(manifest).hexdigest()
    named = {
        "mediaType": f"{KIND}.manifest.v1+json",
        "digest": f"sha256:{digest}",
        "size": len(manifest),
        "platform": {"architecture": "amd64", "os": "linux"},
        "annotations": {"io.containerd.image.name": export.ref, "org.opencontainers.image.ref.name": export.ref.rpartition(":")[2]},
    }
    index = {"schemaVersion": 2, "mediaType": f"{KIND}.index.v1+json", "manifests": [named]}
    texts = {
        "oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": json.dumps(index).encode(), f"blobs/sha256/{digest}": manifest,
    }  # fmt: skip
    # A reader that gives up says why itself.
    with suppress(BrokenPipeError), out, tarfile.open(fileobj=out, mode="w|") as tar:
        for name, text in texts.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
        for blob in (export.manifest["config"]["digest"], *export.fresh):
            path = _blob(export.folder, blob)
            tar.add(path, arcname=str(path.relative_to(export.folder)))
            path.unlink()  # containerd has it now: two copies are enough


def _blob(folder: Path, digest: str) -> Path:
    path = folder / "blobs" / digest.replace(":", "/")
    if not path.is_file():
        raise ClusterError(f"buildah's export lacks {digest}")
    return path


@dataclass(frozen=True, kw_only=True)
class Held:
    """Images and layers of Forja's in containerd, complete ones only."""

    images: Mapping[str, str]
    """Name to digest of the configuration."""
    layers: Mapping[str, dict[str, Any]]
    """Digest of a layer's content to its descriptor, which names the compressed blob."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """An image in a folder, less the layers that containerd has."""

    folder: Path
    ref: str
    manifest: dict[str, Any]
    fresh: tuple[str, ...]
    """Digests of the blobs of layers that containerd lacks."""

    @property
    def size(self) -> int:
        """Bytes of the new layers, compressed."""
        return sum(layer["size"] for layer in self.manifest["layers"] if layer["digest"] in self.fresh)
