"""optimize and gate as stages, over a small dataset and model in a lake of their own."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from forja import receipts, recipes, shards
from forja.errors import BadInput, Refused
from forja.lake import Lake, canonical, sha256
from forja.receipts import Output, Receipt
from forja.recipes.base import Column, Table
from forja.settings import Settings
from forja.stages import harness

pytestmark = pytest.mark.ml

COLUMNS = tuple(Column(name=f"c{i}", low=-1e7, high=1e7) for i in range(11))
RECIPE = dataclasses.replace(recipes.load("ai4i"), dataset=Table(columns=COLUMNS, classes=("0", "1")))
AWAY = "http://127.0.0.1:9"
FEATURES = RECIPE.dataset.shape[0]


def model(sign: float) -> bytes:
    """Raw features up to 1e5 to two probabilities; the first feature decides, the right way for ``sign`` 1."""
    weights = np.zeros((2, FEATURES), np.float32)
    weights[:, 0] = (-sign * 4, sign * 4)
    constants = {"scale": np.full(FEATURES, 1e-5, np.float32), "w": weights, "b": np.zeros(2, np.float32)}
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["input", "scale"], ["scaled"]),
            helper.make_node("Gemm", ["scaled", "w", "b"], ["logits"], transB=1),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "model",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", FEATURES])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


class Chain:
    """A lake with a dataset and a registered model."""

    def __init__(self, folder: Path, sign: float = 1.0) -> None:
        places = {"FORJA_LAKE": str(folder / "lake"), "FORJA_STATE": str(folder / "state"), "HOME": str(folder)}
        # MLflow is away, and the environment that serves is this machine's.
        self.settings = Settings.from_env({**places, "FORJA_CACHE": str(Settings.from_env().cache), "MLFLOW_TRACKING_URI": AWAY})
        self.lake = Lake(self.settings.lake)
        rng = np.random.default_rng(0)
        outputs, keys = {}, {}
        for split, count in (("train", 200), ("validation", 100), ("test", 10)):
            inputs = (rng.normal(size=(count, FEATURES)) * 1e5).astype("<f4")
            packed, index = shards.pack([(row.tobytes(), int(row[0] > 0)) for row in inputs], "f32")
            outputs |= {f"{split}-000.tar": packed, f"{split}-000.idx": index}
            keys[split] = [f"{split}{i:04d}" for i in reversed(range(count))]
        outputs["keys.json"] = canonical(keys)
        self.dataset = self.write("transform", "d", outputs, {})
        self.model = self.write("register", "m", {"model.onnx": model(sign)}, {"model": RECIPE.name, "version": "1"})

    def write(self, stage: str, key: str, outputs: dict[str, bytes], facts: dict[str, Any]) -> str:
        folder = receipts.place(RECIPE.team, RECIPE.name, stage, key)
        written = {}
        for name, data in outputs.items():
            self.lake.create(f"{folder}/{name}", data)
            written[name] = Output(path=f"{folder}/{name}", sha256=sha256(data), bytes=len(data))
        receipt = Receipt(
            stage=stage, recipe=RECIPE.name, team=RECIPE.team, key=key, code="", command="", inputs={}, outputs=written, metrics={},
            facts=facts, report=[], versions={}, started="", finished="", seconds=0.0,
        )  # fmt: skip
        self.lake.create(f"{folder}/receipt.json", receipt.to_json())
        return f"{folder}/receipt.json"

    def optimize(self, variant: str) -> Receipt:
        refs = {"dataset": [self.dataset], "model": [self.model]}
        return harness.execute(self.settings, "optimize", RECIPE, refs, variant=variant)[0]

    def gate(self, *paths: str) -> Receipt:
        return harness.execute(self.settings, "gate", RECIPE, {"optimize": list(paths)})[0]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def test_three_variants_and_the_gate(chain: Chain) -> None:
    found = {v: chain.optimize(v) for v in RECIPE.optimize.variants}
    for variant, receipt in found.items():
        assert set(receipt.outputs) == {"model.onnx", "engine.plan", "engine.json", "golden.npz", "answers.npz", "measured.json"}
        assert receipt.metrics["accuracy"] > 0.97
        assert receipt.metrics["average_precision"] > 0.97
        assert receipt.metrics["nonfinite"] == 0
        assert receipt.facts["served"]["p50_ms"] > 0
        assert receipt.metrics["engine_bytes"] == receipt.outputs["engine.plan"].bytes > 0
        assert receipt.facts["variant"] == variant
        assert receipt.facts["engine"]["deserialised"] == "not measured"
        assert receipt.facts["engine"]["latency_ms"] is None
    registered = receipts.load(chain.lake, chain.model)
    assert found["fp32"].outputs["model.onnx"].sha256 == registered.outputs["model.onnx"].sha256
    gate = chain.gate(*(r.path for r in found.values()))
    assert gate.facts["chosen"] == "fp32"
    assert "untimed" in gate.facts["reason"]
    assert gate.facts["variants"]["fp32"]["agreement"] == 1
    assert gate.facts["variants"]["int8"]["agreement"] > 0.97
    assert gate.facts["variants"]["int8"]["p50_ms"] is None  # the recipe's target is a GPU, and there is none
    assert {v["outcome"] for v in gate.facts["verdicts"]} == {"pass", "not measured"}
    assert gate.metrics["test_accuracy"] > 0.8
    assert chain.gate(*(r.path for r in reversed(found.values()))).path == gate.path  # their order doesn't matter


def test_golden_samples_are_the_first_by_key_with_the_variants_own_answers(chain: Chain) -> None:
    from forja.evaluation import answers

    receipt = chain.optimize("int8")
    with np.load(io.BytesIO(chain.lake.get(receipt.outputs["golden.npz"].path)), allow_pickle=False) as golden:
        assert golden["inputs"].shape == (RECIPE.rollout.golden_samples, FEATURES)
        own = answers(chain.lake.get(receipt.outputs["model.onnx"].path), golden["inputs"])
        assert np.abs(own - golden["probabilities"]).max() < 1e-6
        assert list(golden["labels"]) == [int(x > 0) for x in golden["inputs"][:, 0]]


def test_the_same_work_gives_the_same_bytes(tmp_path: Path) -> None:
    both = [Chain(tmp_path / name).optimize("int8") for name in ("a", "b")]
    varying = ("engine.plan", "engine.json", "measured.json")  # TensorRT promises no equal bytes, and sizes and times follow
    first, second = ({n: o.sha256 for n, o in r.outputs.items() if n not in varying} for r in both)
    assert first == second


def test_a_model_that_answers_wrongly_is_refused(tmp_path: Path) -> None:
    chain = Chain(tmp_path, sign=-1.0)
    paths = [chain.optimize(v).path for v in RECIPE.optimize.variants]
    with pytest.raises(Refused, match="fp32 failed"):
        chain.gate(*paths)
    with pytest.raises(Refused):
        chain.gate(*paths)  # the verdict stands: the receipt is evidence


def test_a_model_that_answers_nan_has_no_numbers_and_is_refused(tmp_path: Path) -> None:
    chain = Chain(tmp_path, sign=float("nan"))
    receipt = chain.optimize("fp32")
    assert "accuracy" not in receipt.metrics
    assert receipt.metrics["nonfinite"] == 200
    json.loads(chain.lake.get(receipt.path), parse_constant=_no_constant)
    with pytest.raises(Refused, match="missing"):
        chain.gate(receipt.path)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} in JSON")


CASES: dict[str, Callable[[Chain, str], object]] = {
    "a variant twice": lambda chain, path: chain.gate(path, path),
    "no optimize receipt": lambda chain, path: chain.gate(chain.model),
    "a variant that the recipe doesn't make": lambda chain, path: chain.optimize("bf16"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_inputs(name: str, chain: Chain) -> None:
    path = chain.optimize("fp32").path
    with pytest.raises(BadInput):
        CASES[name](chain, path)
