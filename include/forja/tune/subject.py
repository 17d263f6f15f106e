"""What is tuned: the model that the newest gate chose, with inputs to ask it, served by a Triton of one's own."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forja import receipts
from forja.errors import BadInput, ForjaError
from forja.lake import Lake
from forja.recipes.base import Recipe
from forja.serving import config, repository, trial
from forja.serving.config import Model, Tensor
from forja.serving.repository import INPUT, OUTPUT, Release
from forja.settings import Settings
from forja.tune.choose import Candidate
from forja.tune.transport import Target

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NICE = 5
"""How far Triton gives way to the load generator on the same cores: a client of another machine would not wait for a core either."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and inputs for it."""

    release: Release
    model: bytes
    """ONNX."""
    inputs: NDArray[np.float32]
    """float32 [G, *shape], raw."""
    gate: str = ""
    """Path of the gate's receipt; empty for a model that no gate judged."""

    @property
    def samples(self) -> list[NDArray[np.float32]]:
        """The inputs, one for each request."""
        return [self.inputs[i : i + 1] for i in range(len(self.inputs))]


@dataclass(frozen=True, kw_only=True)
class Served:
    """A candidate that answers."""

    http: str
    """host:port."""
    grpc: str
    model: str

    def target(self, protocol: str) -> Target:
        """Where the load generator asks."""
        return Target(
            address=self.grpc if protocol == "grpc" else self.http, model=self.model, protocol="grpc" if protocol == "grpc" else "http"
        )


def find(lake: Lake, recipe: Recipe) -> Subject:
    """The model that the newest gate chose, and the golden inputs of its optimize receipt.

    Raises:
        BadInput: no gate has chosen a model of this recipe yet.
        Damaged: the lake lacks what the receipts name.
    """
    import numpy

    paths = [p for p in lake.list(f"{recipe.team}/{recipe.name}/gate") if p.rpartition("/")[2] == "receipt.json"]
    gates = sorted((receipts.load(lake, path) for path in paths), key=lambda r: r.finished)
    gate = next((r for r in reversed(gates) if r.facts.get("chosen")), None)
    if gate is None:
        do = f"make run RECIPE={recipe.name}, or ./forja stage gate --recipe {recipe.name}"
        raise BadInput(f"gate receipt of {recipe.name} that chose a variant", allowed="one or more", do=do)
    optimize = [receipts.load(lake, item.ref) for item in gate.inputs["optimize"]]
    chosen = next(r for r in optimize if r.variant == gate.facts["chosen"])
    model, golden = (lake.read(o.path, o.sha256) for o in (chosen.output("model.onnx"), chosen.output("golden.npz")))
    with numpy.load(io.BytesIO(golden), allow_pickle=False) as arrays:
        inputs = arrays["inputs"]
    dataset = recipe.dataset
    release = Release(
        model=recipe.name, version="1", variant=chosen.variant, classes=dataset.classes, shape=dataset.shape,
        max_batch=recipe.optimize.max_batch, preprocess=repository.preprocess(dataset),
        receipts={"gate": gate.path, "optimize": chosen.path}, serving=recipe.serving,
    )  # fmt: skip
    return Subject(release=release, model=model, inputs=inputs, gate=gate.path)


def files(subject: Subject, candidate: Candidate) -> dict[str, bytes]:
    """The release's files with a candidate's settings."""
    release = dataclasses.replace(subject.release, max_batch=candidate.max_batch, serving=candidate.serving)
    found = repository.files(release, subject.model, golden=subject.inputs)
    if not candidate.batching:
        found["config.pbtxt"] = _plain(release).encode()
    return found


def _plain(release: Release) -> str:
    return config.text(
        Model(
            name=release.model, version=release.version, backend="python", max_batch=release.max_batch,
            input=Tensor(name=INPUT, dims=release.shape), output=Tensor(name=OUTPUT, dims=(len(release.classes),), labels=True),
            serving=release.serving, warmup="golden", batching=False,
        )
    )  # fmt: skip


@contextlib.contextmanager
def serve(settings: Settings, subject: Subject, candidate: Candidate, scratch: Path) -> Iterator[Served]:
    """Triton with a candidate's settings, on the loopback; it ends with the block, and so does its folder in ``scratch``.

    Raises:
        Refused: Triton can't load it.
        Unavailable: Triton ended, or doesn't answer.
    """
    folder = scratch / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    release = subject.release
    repository.lay(folder / "repository", release, files(subject, candidate))
    try:
        with trial.server(settings, folder / "repository", folder, nice=NICE) as server:
            server.wait(release.model, release.version)
            yield Served(http=server.http, grpc=server.grpc, model=release.model)
    finally:
        with contextlib.suppress(OSError, ForjaError):
            shutil.rmtree(folder)
