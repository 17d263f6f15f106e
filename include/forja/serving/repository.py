"""Model repositories: one release as Triton reads it, put into a slot as a whole or not at all.

<slot>/releases/<identity>/              everything of one release: config.pbtxt, labels.txt, warmup, release.json
<slot>/releases/<identity>/<version>/    model.py, model.onnx, labels.txt, preprocess.json
<slot>/releases/<identity>/models/<name>/    a model that comes with it, if there is one (see forja.serving.ensemble)
<slot>/repository/<model>, <name>        links to them, which Triton follows
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forja.errors import BadInput, Damaged, Refused
from forja.lake import canonical, sha256
from forja.recipes.base import Images, Serving, Table
from forja.services.folders import private
from forja.services.triton import Slot
from forja.serving.config import FILES, GOLDEN, LABELS, WARMUP, Backend, Model, Tensor, text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PYTHON = Path(__file__).parent / "files"
"""What runs in Triton's python backend."""
INPUT, OUTPUT = "input", "probabilities"
PREPROCESS = "preprocess.json"
MODELS = "models"
"""Folder of a release with the models that come with it, each as it lies in a model repository."""
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
    """What a client must send, for people and clients; the server refuses what is outside its limits."""
    receipts: Mapping[str, str]
    """Paths in the lake of the receipts that led to it."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each file, by its path in the release's folder."""
    objects: Mapping[str, str] = field(default_factory=dict)
    """Path in the lake of each file."""
    replaces: str = ""
    """Version that was live when this release was made; empty for the first one."""
    serving: Serving = field(default_factory=Serving)
    """How Triton queues and batches its requests."""
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
    """What one input is, as data: raw values, since normalisation is inside the model, and the limits of each.

    ``low`` and ``high`` hold for every pixel, or for each feature; null where a feature has no limit but must be finite.
    """
    if isinstance(dataset, Images):
        pixels = {"height": dataset.height, "width": dataset.width, "channels": dataset.channels}
        return {"kind": "image", **pixels, "layout": "NCHW", "values": "float32, 0 to 255", "low": 0.0, "high": 255.0}
    low: list[float | None] = []
    high: list[float | None] = []
    for column in dataset.columns:
        count = len(column.values) or 1
        low += [0.0 if column.values else column.low] * count
        high += [1.0 if column.values else column.high] * count
    free = [None] * len(dataset.derived)
    return {
        "kind": "table", "features": list(dataset.features), "values": "float32, each in its column's unit",
        "low": [*low, *free], "high": [*high, *free],
    }  # fmt: skip


def files(release: Release, model: bytes, backend: Backend = "python", golden: NDArray[np.float32] | None = None) -> dict[str, bytes]:
    """The release's files apart from release.json, by path: what Triton's ``backend`` needs around ``model``'s bytes.

    Args:
        golden: float32 [G, *shape] raw inputs, the first of which warms the model up; zeros do where there are none.

    Raises:
        Refused: that input is one that the server would refuse.
    """
    if golden is not None:
        _check_golden(release, golden[0])
    labels = "".join(f"{c}\n" for c in release.classes).encode()
    described = json.dumps({**release.preprocess, "shape": list(release.shape)}, indent=1).encode()
    found = {
        "config.pbtxt": config(release, backend, golden=golden is not None).encode(),
        LABELS: labels,
        # Triton reads the file above when it loads, and would name a version's answers by whatever it says then: this one is the version's.
        f"{release.version}/{LABELS}": labels,
        f"{release.version}/{PREPROCESS}": described,
        f"{release.version}/{FILES[backend]}": model,
    }
    if golden is not None:
        found[f"{WARMUP}/{GOLDEN}"] = golden[0].astype("<f4").tobytes()
    if backend == "python":
        found |= {f"{release.version}/{name}": (PYTHON / name).read_bytes() for name in ("model.py", "lifeline.py")}
    return found


def _check_golden(release: Release, sample: NDArray[np.float32]) -> None:
    """A warm-up that fails can end Triton (2.51) instead of being reported, so it must not be sent."""
    import numpy

    what, allowed = f"golden input of {release.model}", f"float32 {list(release.shape)} within the limits of its inputs"
    if sample.shape != release.shape:
        raise Refused(what, value=list(sample.shape), allowed=allowed)
    low, high = (numpy.array(_each(release.preprocess.get(name)), dtype="float32") for name in ("low", "high"))  # None is NaN
    rows = sample.reshape(-1, len(low))
    wrong = ~numpy.isfinite(rows) | (rows < low) | (rows > high)
    if wrong.any():
        raise Refused(what, value=float(rows[wrong][0]), allowed=allowed)


def check_labels(release: Release, contents: Mapping[str, bytes]) -> None:
    """Refuse label files that don't say, in this order, what the model's outputs are: every answer would have a wrong name.

    Raises:
        Refused: a file of labels is missing, has another count or another order than the release's classes.
    """
    sides = {name.rpartition("/")[0] for name in contents if name.startswith(f"{MODELS}/") and name.endswith(f"/{LABELS}")}
    for folder in ("", release.version, *sorted(sides)):
        name = f"{folder}/{LABELS}".lstrip("/")
        found = tuple(contents.get(name, b"").decode(errors="replace").splitlines())
        if found != release.classes:
            what = f"{name} of {release.model} version {release.version}"
            if len(found) != len(release.classes):
                raise Refused(what, value=f"{len(found)} labels", allowed=f"{len(release.classes)}", do="release again")
            wrong = next(i for i, label in enumerate(found) if label != release.classes[i])
            right = f"{release.classes[wrong]}, which the model's output {wrong} means"
            raise Refused(f"{what}: line {wrong + 1}", value=found[wrong], allowed=right, do="release again")


def sealed(release: Release, contents: Mapping[str, bytes]) -> Release:
    """The release with the digests of its files; Refused when its labels aren't its classes."""
    check_labels(release, contents)
    return dataclasses.replace(release, digests={name: sha256(data) for name, data in sorted(contents.items())})


def config(release: Release, backend: Backend = "python", *, golden: bool = False, profiles: tuple[int, ...] = ()) -> str:
    """Triton's config.pbtxt: float32 in and out whatever the precision inside.

    Args:
        release: what is served.
        backend: ``python`` for the bundled server, the others for NVIDIA's image.
        golden: whether there is a sample that warms it up.
        profiles: see ``forja.serving.config.Model``.
    """
    fil = backend == "fil"
    if fil and len(release.shape) != 1:
        raise BadInput(f"backend of {release.model}", value=backend, allowed="another one: trees take one row of features")
    # FIL's own names for its tensors, and of two classes it answers the probability of the second alone.
    single = fil and len(release.classes) == 2
    parameters = {"model_type": "xgboost_json", "is_classifier": "true", "predict_proba": "true", "threshold": "0.5"} if fil else {}
    return text(
        Model(
            name=release.model,
            version=release.version,
            backend=backend,
            max_batch=release.max_batch,
            input=Tensor(name="input__0" if fil else INPUT, dims=release.shape),
            output=Tensor(name="output__0" if fil else OUTPUT, dims=(1,) if single else (len(release.classes),), labels=not single),
            serving=release.serving,
            profiles=profiles,
            warmup="golden" if golden else "zero" if backend != "python" or _zeros(release) else "",
            parameters=parameters,
        )
    )


def _zeros(release: Release) -> bool:
    """Whether the server would take an input of zeros."""
    low, high = (_each(release.preprocess.get(name)) for name in ("low", "high"))
    return all(v is None or v <= 0 for v in low) and all(v is None or v >= 0 for v in high)


def _each(limit: Any) -> list[float | None]:
    return limit if isinstance(limit, list) else [limit]


def install(place: Slot, release: Release, contents: Mapping[str, bytes]) -> None:
    """Put a release into a slot, in place of what is there: the links move when all files are written.

    Args:
        place: a slot that takes no requests.
        release: as ``sealed`` gives it.
        contents: its files.
    """
    check_labels(release, contents)
    releases = private(place.repository.parent / "releases")
    part = releases / f".{release.identity}.{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    unpack(part, {**contents, "release.json": to_json(release)})
    target = releases / release.identity
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    links = _links(release, contents)
    # The model itself comes last: it says what is installed.
    for name, path in links.items():
        _link(place.repository, name, target / path)
    for old in place.repository.iterdir():
        if old.is_symlink() and old.name not in links:
            old.unlink()
    for old in releases.iterdir():
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def lay(repository: Path, release: Release, contents: Mapping[str, bytes]) -> None:
    """Make ``repository``, a folder that no server reads yet, a model repository of one release.

    Args:
        contents: its files, and release.json where the server is asked what it holds.
    """
    check_labels(release, contents)
    unpack(repository / release.model, contents)
    for name, path in _links(release, contents).items():
        if name != release.model:
            _link(repository, name, repository / release.model / path)


def _links(release: Release, contents: Mapping[str, bytes]) -> dict[str, str]:
    """Folder of each model in the release's folder, by the model's name; the release's own is last."""
    sides = sorted({name.split("/")[1] for name in contents if name.startswith(f"{MODELS}/")})
    return {**{name: f"{MODELS}/{name}" for name in sides}, release.model: ""}


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
        # Releases of before had Triton's queue as the default still is.
        serving = Serving(**body.pop("serving", {}))
        return Release(**{**body, "classes": tuple(body["classes"]), "shape": tuple(body["shape"]), "serving": serving})
    except (ValueError, KeyError, TypeError, BadInput) as error:
        raise Damaged(f"release in {where}", value=path, do="release again") from error


def _link(repository: Path, name: str, target: Path) -> None:
    link = private(repository) / name
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    aside = repository.parent / f".{name}.{os.getpid()}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(os.path.relpath(target, repository))
    aside.replace(link)


def remove(place: Slot, model: str) -> None:
    """Take a release out of its slot, with the models that came with it."""
    (place.repository / model).unlink(missing_ok=True)
    for link in place.repository.glob("*"):
        if link.is_symlink():
            link.unlink()
    shutil.rmtree(place.repository.parent / "releases", ignore_errors=True)


def installed(place: Slot, model: str) -> Release | None:
    """The release in a slot, None for an empty one; Damaged when its release.json can't be read or is of another schema."""
    path = place.repository / model / "release.json"
    return parse(path.read_bytes(), str(path), "a slot") if path.is_file() else None


def intact(place: Slot, release: Release) -> bool:
    """Whether the release's files in the slot are what its digests say, and Triton would find each of its models."""
    folder = place.repository / release.model
    found = {name: folder / name for name in release.digests}
    whole = all(p.is_file() and sha256(p.read_bytes()) == release.digests[name] for name, p in found.items())
    links = _links(release, dict.fromkeys(release.digests, b""))
    return whole and all((place.repository / name).resolve() == (folder / path).resolve() for name, path in links.items())
