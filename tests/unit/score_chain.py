"""A small lake for score: a raw table, and the receipts of the stages that lead to a gate, at the places where their keys put them.

``python tests/unit/score_chain.py FOLDER CASE`` scores in FOLDER in chunks of ``ROWS`` and ends as CASE of ``ENDS`` says.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from forja import client, evaluation, predictions, recipes
from forja.client import Item
from forja.lake import Lake, canonical, sha256
from forja.receipts import Output, Receipt
from forja.recipes.base import Column, Optimize, Recipe, Table
from forja.settings import Settings
from forja.stages import harness, ingest, score

IMAGES = dataclasses.replace(recipes.load("digits"), optimize=Optimize(variants=("fp32",)))
COLUMNS = (Column(name="kind", values=("a", "b")), Column(name="x", low=-10, high=10), Column(name="y", low=-10, high=10))
ROWS = dataclasses.replace(recipes.load("ai4i"), dataset=Table(columns=COLUMNS, classes=("0", "1")), optimize=Optimize(variants=("fp32",)))
CHUNK = 16


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 255, (8, 8), dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def row(value: int) -> bytes:
    return json.dumps({"kind": "ab"[value % 2], "x": value % 19 - 9, "y": value % 7 / 2}).encode()


def model(shape: tuple[int, ...], classes: int, seed: int = 0, gain: float = 0.05) -> bytes:
    """A linear model: float32 [n, *shape] to probabilities [n, classes]."""
    size = int(np.prod(shape))
    weights = np.random.default_rng(seed).normal(size=(classes, size)).astype(np.float32) * np.float32(gain)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["input"], ["flat"]),
            helper.make_node("Gemm", ["flat", "w"], ["logits"], transB=1),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "model",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", classes])],
        [numpy_helper.from_array(weights, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def record(key: str, payload: bytes, label: str | bytes | None = None, at: int | None = None) -> Any:
    """A record of Kafka, ``at`` milliseconds; the offset comes when it is put into the table."""
    content = label.encode() if isinstance(label, str) else label
    headers = [] if content is None else [("label", content)]
    return SimpleNamespace(key=key.encode(), value=payload, headers=headers, partition=0, timestamp=at)


class Chain:
    """A lake with a raw table of ``good`` labelled events (version 1), and a gate that chose fp32."""

    def __init__(self, folder: Path, recipe: Recipe = ROWS, good: int = 40) -> None:
        places = {"FORJA_LAKE": str(folder / "lake"), "FORJA_STATE": str(folder / "state"), "HOME": str(folder)}
        self.settings, self.recipe, self.offset = Settings.from_env(places), recipe, 0
        self.lake = Lake(self.settings.lake)
        self.raw_path = ingest.table_path(recipe.team, recipe.name)
        ingest.open_table(self.lake, self.raw_path)
        self.payload: Callable[[int], bytes] = png if recipe.source.payload == "image" else row
        self.onnx = model(recipe.dataset.shape, len(recipe.dataset.classes))
        self.good = [(f"k{i:03d}", self.payload(i)) for i in range(good)]
        self.right = self.answers(self.onnx, [p for _, p in self.good]).argmax(axis=1)
        names = recipe.dataset.classes
        self.add([record(k, p, names[n]) for (k, p), n in zip(self.good, self.right, strict=True)])

    def answers(self, onnx: bytes, payloads: Sequence[bytes]) -> NDArray[np.float32]:
        """As a client's request would be prepared, and the server's runtime answers."""
        return evaluation.answers(onnx, client.inputs(self.recipe, [Item(name="", payload=p) for p in payloads]))

    def add(self, records: Sequence[Any]) -> None:
        """Put records into the raw table as ingest does."""
        for item in records:
            item.offset, self.offset = self.offset, self.offset + 1
            item.timestamp = item.offset if item.timestamp is None else item.timestamp
        table = ingest.open_table(self.lake, self.raw_path)
        rows = ingest.to_rows(list(records), self.recipe.source, "t")
        ingest.commit(table, rows, {"t-0": self.offset}, {"t-0": table.transaction_version("t-0")})

    def raw(self, version: int | None = None) -> str:
        return f"{self.raw_path}@{self.lake.table(self.raw_path).version() if version is None else version}"

    def write(
        self, verb: str, refs: dict[str, list[str]], outputs: Mapping[str, bytes], facts: Mapping[str, Any], variant: str = ""
    ) -> str:
        """A receipt of a stage, where its key puts it."""
        prepared = harness.prepare(self.lake, verb, self.recipe, refs, variant)
        written = {}
        for name, data in outputs.items():
            self.lake.replace(f"{prepared.folder}/{name}", data)  # another model of equal inputs takes the place of the last
            written[name] = Output(path=f"{prepared.folder}/{name}", sha256=sha256(data), bytes=len(data))
        receipt = Receipt(
            stage=verb, recipe=self.recipe.name, team=self.recipe.team, key=prepared.key, code=prepared.code, command=prepared.command,
            inputs={k: list(v) for k, v in prepared.plan.inputs.items()}, outputs=written, metrics={}, facts=dict(facts), report=[],
            versions={}, started="", finished="", seconds=0.0, variant=variant,
        )  # fmt: skip
        path = f"{prepared.folder}/receipt{'-000001' if verb == 'register' else ''}.json"
        self.lake.replace(path, receipt.to_json())
        return path

    def gate(self, *, onnx: bytes = b"", chosen: str | None = "fp32", version: str = "1", **golden: Any) -> str:
        """Receipts from transform to gate; ``golden`` stands in for arrays of golden.npz."""
        onnx = onnx or self.onnx
        validation = [k for k, _ in self.good[:20]]
        dataset = self.write("transform", {"raw": [self.raw(1)]}, {"keys.json": canonical({"validation": validation[::-1]})}, {})
        training = self.write("train", {"dataset": [dataset]}, {"model.pt": sha256(onnx).encode()}, {})
        registered = self.write("register", {"dataset": [dataset], "training": [training]}, {"model.onnx": onnx}, {"version": version})
        inputs = client.inputs(self.recipe, [Item(name=k, payload=p) for k, p in self.good[:16]])
        buffer = io.BytesIO()
        arrays = {"inputs": inputs, "probabilities": evaluation.answers(onnx, inputs), "labels": self.right[:16], **golden}
        np.savez(buffer, allow_pickle=False, **arrays)
        outputs = {"model.onnx": onnx, "golden.npz": buffer.getvalue()}
        optimize = self.write("optimize", {"dataset": [dataset], "model": [registered]}, outputs, {}, variant="fp32")
        facts = {"chosen": chosen, "reason": "a test's", "verdicts": []}
        verdict = canonical({**facts, "models": sha256(onnx)})
        return self.write("gate", {"optimize": [optimize]}, {"verdict.json": verdict}, facts)

    def score(self, gate: str, raw: str | None = None, recipe: Recipe | None = None) -> tuple[Receipt, bool]:
        return harness.execute(self.settings, "score", recipe or self.recipe, {"raw": [raw or self.raw()], "gate": [gate]})

    def rows(self) -> list[dict[str, Any]]:
        """The predictions table, none when it isn't there."""
        path = predictions.table_path(self.recipe.team, self.recipe.name)
        if not list(self.lake.list(path)):
            return []
        found: list[dict[str, Any]] = pa.table(self.lake.table(path).to_pyarrow_table()).to_pylist()
        return found

    def chunks(self) -> list[str]:
        return [p for p in self.lake.list(f"{self.recipe.team}/{self.recipe.name}/score") if "-chunk-" in p]


def _kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _slow(real: Callable[..., Any]) -> Callable[..., Any]:
    def answers(*arguments: Any) -> Any:
        time.sleep(0.4)
        return real(*arguments)

    return answers


ENDS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "slowly": (score.scoring, "answers", _slow),
    "before the commit": (predictions, "append", lambda real: _kill),
    "after the commit": (score, "_outcome", lambda real: _kill),
}
"""How a run ends: what of which module is replaced by what."""

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder, case, gate = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    owner, name, change = ENDS[case]
    setattr(owner, name, change(getattr(owner, name)))
    score.ROWS = CHUNK
    settings = Settings.from_env({"FORJA_LAKE": str(folder / "lake"), "FORJA_STATE": str(folder / "state"), "HOME": str(folder)})
    raw = f"{ingest.table_path(ROWS.team, ROWS.name)}@1"
    receipt, written = harness.execute(settings, "score", ROWS, {"raw": [raw], "gate": [gate]})
    print("written" if written else "adopted")
