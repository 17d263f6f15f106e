"""A lake as the stages before export leave it: a real network, its variants, and the gate's verdict."""

from __future__ import annotations

import dataclasses
import functools
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forja import evaluation, receipts, recipes, shards
from forja.edge.targets import TARGETS
from forja.lake import Lake, canonical, sha256
from forja.models import Served, build
from forja.precision import floats, int8
from forja.receipts import Input, Output, Receipt
from forja.recipes.base import Cnn, Recipe
from forja.settings import Settings
from forja.stages import harness, register

RECIPE = dataclasses.replace(recipes.load("digits"), model=Cnn(width=4, blocks=1), edge=tuple(TARGETS))
"""A smaller network than the real one."""
SHAPE, CLASSES = RECIPE.dataset.shape, RECIPE.dataset.classes


@functools.cache
def model(recipe: Recipe = RECIPE) -> tuple[bytes, bytes, np.ndarray[Any, Any]]:
    """A checkpoint of a network with clear answers, its ONNX file, and images."""
    torch.manual_seed(3)
    module = build(recipe.model, SHAPE, len(CLASSES), [80.0], [60.0])
    module.eval()
    with torch.no_grad():
        module.classifier.weight.mul_(40)  # type: ignore[union-attr, operator]
    buffer = io.BytesIO()
    torch.save({"weights": module.state_dict(), "mean": [80.0], "std": [60.0], "edges": []}, buffer)
    images = np.random.default_rng(0).integers(0, 241, (40, *SHAPE)).astype(np.float32)
    return buffer.getvalue(), register.export(Served(module).eval(), SHAPE), images


@functools.cache
def variants(recipe: Recipe = RECIPE) -> dict[str, bytes]:
    """The files that optimize would make."""
    _, exact, images = model(recipe)
    with tempfile.TemporaryDirectory() as folder:
        return {"fp32": exact, "fp16": floats.fp16(exact).model, "int8": int8.int8(exact, images, Path(folder))}


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


class Chain:
    """A lake as the stages before leave it."""

    recipe = RECIPE

    def __init__(self, folder: Path, *, failed: tuple[str, ...] = (), golden: Callable[[str, Any], Any] = lambda variant, a: a) -> None:
        self.settings = Settings.from_env({"FORJA_LAKE": str(folder / "lake"), "FORJA_STATE": str(folder / "state"), "HOME": str(folder)})
        self.lake = Lake(self.settings.lake)
        checkpoint, exact, images = model(self.recipe)
        labels = [i * i % 10 for i in range(40)]  # each class another count, but 0 and 5
        counts = {c: labels.count(i) for i, c in enumerate(CLASSES)}
        payloads = [(png(image), label) for image, label in zip(images, labels, strict=True)]
        packed, lines = shards.pack(payloads, "img")
        keys = [f"k{i:03d}" for i in range(40)]
        files = {f"{s}-000.tar": packed for s in ("train", "validation")} | {f"{s}-000.idx": lines for s in ("train", "validation")}
        files["keys.json"] = canonical({"train": keys, "validation": keys})
        dataset = self.write("transform", files, facts={"splits": {"validation": {"rows": 40, "classes": counts}}})
        training = self.write("train", {"model.pt": checkpoint}, inputs={"dataset": [dataset]})
        inputs = {"dataset": [dataset], "training": [training]}
        self.model = self.write("register", {"model.onnx": exact}, inputs=inputs, facts={"version": "7"})
        made = [self.variant(name, data, dataset, golden) for name, data in variants(self.recipe).items()]
        verdicts = [{"variant": v, "metric": "accuracy", "rule": "least", "passed": v not in failed} for v in variants(self.recipe)]
        verdict = {"chosen": None if "fp32" in failed else "fp32", "reason": "x", "verdicts": verdicts}
        verdict["models"] = {v: sha256(d) for v, d in variants(self.recipe).items()}
        self.gate = self.write("gate", {"verdict.json": canonical(verdict)}, inputs={"optimize": made})

    def variant(self, name: str, data: bytes, dataset: str, golden: Callable[[str, Any], Any]) -> str:
        images = model(self.recipe)[2][:16]
        answers = golden(name, evaluation.answers(data, images))
        files = {"model.onnx": data, "golden.npz": npz(inputs=images, probabilities=answers, labels=np.zeros(16, np.int64))}
        return self.write("optimize", files, variant=name, inputs={"dataset": [dataset], "model": [self.model]})

    def write(
        self, stage: str, files: dict[str, bytes], *, variant: str = "", inputs: dict[str, list[str]] | None = None,
        facts: dict[str, Any] | None = None,
    ) -> str:  # fmt: skip
        path = self.place(stage, variant, inputs or {})
        folder = path.rpartition("/")[0]
        outputs = {}
        for name, data in files.items():
            self.lake.create(f"{folder}/{name}", data)
            outputs[name] = Output(path=f"{folder}/{name}", sha256=sha256(data), bytes=len(data))
        given = {n: [Input(ref=r, digest=receipts.load(self.lake, r).digest) for r in refs] for n, refs in (inputs or {}).items()}
        receipt = Receipt(
            stage=stage, recipe=self.recipe.name, team=self.recipe.team, key=stage, code="", command="x", inputs=given, outputs=outputs,
            metrics={}, facts=facts or {}, report=[], versions={}, started="", finished="", seconds=0.0, variant=variant,
        )  # fmt: skip
        self.lake.create(path, receipt.to_json())
        return path

    def place(self, stage: str, variant: str, inputs: dict[str, list[str]]) -> str:
        """Where a receipt lies."""
        return f"{receipts.place(self.recipe.team, self.recipe.name, stage, f'{stage}{variant}')}/receipt.json"

    def export(self, target: str, recipe: Recipe = RECIPE, **refs: str) -> Receipt:
        given = {"gate": [refs.get("gate", self.gate)], "model": [refs.get("model", self.model)]}
        return harness.execute(self.settings, "export", recipe, given, variant=target)[0]


def png(image: np.ndarray[Any, Any]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[0].astype("uint8"), mode="L").save(buffer, format="PNG")
    return buffer.getvalue()
