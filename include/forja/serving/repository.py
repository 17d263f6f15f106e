"""Model repositories: one release as Triton reads it, put into a slot as a whole or not at all.

<slot>/releases/<identity>/          everything of one release: config.pbtxt, labels.txt, release.json
<slot>/releases/<identity>/<version>/    model.py and model.onnx
<slot>/repository/<model>            a link to it, which Triton follows
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from forja.errors import BadInput, Damaged
from forja.lake import canonical, sha256
from forja.recipes.base import Images, Table
from forja.services.folders import private
from forja.services.triton import Slot

Backend = Literal["python", "onnxruntime", "tensorrt_plan"]
MODEL_PY = Path(__file__).parent / "files" / "model.py"
INPUT, OUTPUT = "input", "probabilities"
MAX_QUEUE = 256
"""Requests that may wait in Triton; one more is refused with 503, since a queue without end is latency without end."""
QUEUE_S = 10
"""Seconds that a request may wait in Triton."""
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Release:
    """One model version made servable."""

    model: str
    """Name of the model in Triton, MLflow and the routes: that of the recipe."""
    version: str
    """MLflow's version number; the version folder's name."""
    variant: str
    classes: tuple[str, ...]
    """Labels in the order of the output."""
    shape: tuple[int, ...]
    """Shape of one input."""
    max_batch: int
    preprocess: Mapping[str, Any]
    """What a client must send, for people and clients."""
    receipts: Mapping[str, str]
    """Paths in the lake of the receipts that led to it."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each file, by its path in the release's folder."""
    objects: Mapping[str, str] = field(default_factory=dict)
    """Path in the lake of each file."""
    replaces: str = ""
    """Version that was live when this release was made; empty for the first one."""
    schema: int = SCHEMA

    @property
    def identity(self) -> str:
        """Digest of what is served: equal identities answer equally, whichever receipts led there."""
        return sha256(canonical([self.model, self.version, self.variant, dict(self.digests)]))[:16]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A release as it lies in the lake, and its files."""

    release: Release
    path: str
    """Path in the lake of its release.json."""
    sha256: str
    contents: Mapping[str, bytes]
    """Its files but release.json, by their paths in the release's folder."""


def preprocess(dataset: Images | Table) -> dict[str, Any]:
    """What one input is, as data: raw values, since normalisation is inside the model."""
    if isinstance(dataset, Images):
        pixels = {"height": dataset.height, "width": dataset.width, "channels": dataset.channels}
        return {"kind": "image", **pixels, "layout": "NCHW", "values": "float32, 0 to 255"}
    return {"kind": "table", "features": list(dataset.features), "values": "float32, each in its column's unit"}


def files(release: Release, model: bytes, backend: Backend = "python") -> dict[str, bytes]:
    """The release's files apart from release.json, by path: what Triton's ``backend`` needs around ``model``'s bytes."""
    found = {
        "config.pbtxt": config(release, backend).encode(),
        "labels.txt": "".join(f"{c}\n" for c in release.classes).encode(),
        f"{release.version}/{'model.plan' if backend == 'tensorrt_plan' else 'model.onnx'}": model,
    }
    if backend == "python":
        found[f"{release.version}/model.py"] = MODEL_PY.read_bytes()
    return found


def sealed(release: Release, contents: Mapping[str, bytes]) -> Release:
    """The release with the digests of its files."""
    return dataclasses.replace(release, digests={name: sha256(data) for name, data in sorted(contents.items())})


def config(release: Release, backend: Backend = "python") -> str:
    """Triton's config.pbtxt: float32 in and out whatever the precision inside, one instance, bounded dynamic batching.

    Args:
        release: what is served.
        backend: ``python`` for the bundled server, ``onnxruntime`` or ``tensorrt_plan`` for NVIDIA's image.
    """
    kinds = {"python": "KIND_CPU", "onnxruntime": "KIND_AUTO", "tensorrt_plan": "KIND_GPU"}
    if backend not in kinds:
        raise BadInput("backend of a model repository", value=backend, allowed=", ".join(kinds))
    engine = 'platform: "tensorrt_plan"' if backend == "tensorrt_plan" else f'backend: "{backend}"'
    return f"""name: "{release.model}"
{engine}
max_batch_size: {release.max_batch}
version_policy {{ specific {{ versions: [ {int(release.version)} ] }} }}
input [ {{ name: "{INPUT}" data_type: TYPE_FP32 dims: {list(release.shape)} }} ]
output [ {{ name: "{OUTPUT}" data_type: TYPE_FP32 dims: [{len(release.classes)}] label_filename: "labels.txt" }} ]
instance_group [ {{ kind: {kinds[backend]} count: 1 }} ]
dynamic_batching {{
  default_queue_policy {{
    max_queue_size: {MAX_QUEUE}
    timeout_action: REJECT
    default_timeout_microseconds: {QUEUE_S * 1_000_000}
  }}
}}
"""


def install(place: Slot, release: Release, contents: Mapping[str, bytes]) -> None:
    """Put a release into a slot, in place of what is there: the link moves when all files are written.

    Args:
        place: a slot that takes no requests.
        release: as ``sealed`` gives it.
        contents: its files.
    """
    releases = private(place.repository.parent / "releases")
    part = releases / f".{release.identity}.{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    unpack(part, {**contents, "release.json": to_json(release)})
    target = releases / release.identity
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    _link(place, release.model, target)
    for old in releases.iterdir():
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def unpack(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write a release's files into ``folder``, by their paths in it."""
    for name, data in contents.items():
        private((folder / name).parent)
        (folder / name).write_bytes(data)


def to_json(release: Release) -> bytes:
    """Content of release.json."""
    return json.dumps({**dataclasses.asdict(release), "identity": release.identity}, indent=1, sort_keys=True).encode()


def parse(data: bytes, path: str, where: str) -> Release:
    """Read the release.json of ``path`` in the lake or in a slot; Damaged when it is none, or of another schema."""
    try:
        body = json.loads(data)
        if body["schema"] != SCHEMA:
            raise Damaged(f"schema of the release in {where}", value=body["schema"], allowed=str(SCHEMA), do="release again")
        del body["identity"]
        return Release(**{**body, "classes": tuple(body["classes"]), "shape": tuple(body["shape"])})
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"release in {where}", value=path, do="release again") from error


def _link(place: Slot, model: str, target: Path) -> None:
    link = private(place.repository) / model
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    aside = place.repository.parent / f".{model}.{os.getpid()}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(os.path.relpath(target, place.repository))
    aside.replace(link)


def remove(place: Slot, model: str) -> None:
    """Take a release out of its slot."""
    (place.repository / model).unlink(missing_ok=True)
    shutil.rmtree(place.repository.parent / "releases", ignore_errors=True)


def installed(place: Slot, model: str) -> Release | None:
    """The release in a slot, None for an empty one; Damaged when its release.json can't be read or is of another schema."""
    path = place.repository / model / "release.json"
    return parse(path.read_bytes(), str(path), "a slot") if path.is_file() else None


def intact(place: Slot, release: Release) -> bool:
    """Whether the release's files in the slot are what its digests say."""
    folder = place.repository / release.model
    found = {name: folder / name for name in release.digests}
    return all(p.is_file() and sha256(p.read_bytes()) == release.digests[name] for name, p in found.items())
