"""export as a stage: real networks, ONNX files, engines and signatures in a lake of its own, for every target."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx
from unit import edge_parts
from unit.edge_chain import CLASSES, RECIPE, Chain, model, variants
from unit.edge_parts import Device

from forja import evaluation, loading, receipts
from forja.edge import bundle, depot, remake, signing, simulate
from forja.edge.bundle import Golden
from forja.edge.files import infer, trust
from forja.edge.targets import TARGETS
from forja.errors import BadInput, Refused
from forja.lake import sha256
from forja.receipts import Output, Receipt
from forja.settings import Settings
from forja.stages import export

pytestmark = pytest.mark.ml


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = signing.create(tmp_path / "keys", Settings.from_env({"FORJA_LAKE": str(tmp_path / "lake"), "FORJA_STATE": str(tmp_path)}))[0]
    monkeypatch.setenv(signing.VARIABLE, str(path))
    return path


def opened(chain: Chain, receipt: Receipt) -> tuple[dict[str, Any], dict[str, bytes]]:
    contents = simulate.opened(chain.lake.read(receipt.outputs["bundle.tar.gz"].path, receipt.outputs["bundle.tar.gz"].sha256))
    return json.loads(contents["manifest.json"]), contents


WANTED = {"jetson-nano": ("fp16", "fp32"), "xavier-nx": ("fp16", "fp32"), "orin": ("fp16", "fp32"), "cpu": ("fp32", "fp32")}
"""Variant and the file that carries it; of the others the variant's own."""


def test_every_target_gets_its_bundle(tmp_path: Path, key: Path) -> None:
    chain = Chain(tmp_path)
    for name, target in TARGETS.items():
        receipt = chain.export(name)
        manifest, contents = opened(chain, receipt)
        variant, carried = WANTED.get(name, ("int8",) * 2 if name.endswith("-int8") else ("fp16",) * 2)
        assert (receipt.facts["variant"], manifest["variant"], manifest["target"]) == (variant, variant, name)
        assert receipt.facts["made_again"] == (name == "jetson-nano")
        if not receipt.facts["made_again"]:
            assert contents["model.onnx"] == variants()[carried], "the very file that the gate judged"
        found = onnx.load_from_string(contents["model.onnx"])
        onnx.checker.check_model(found, full_check=True)
        assert found.ir_version <= target.ir
        assert found.opset_import[0].version <= target.opset
        assert receipt.metrics["parity"] <= manifest["tolerance"]
        assert ("parity_rounded" in receipt.metrics) == (target.weak and variant != "fp32")
        assert ("engine.plan" in contents) == (target.runtime == "tensorrt-rtx")
        assert ("deepstream/nvinfer.txt" in contents) == (target.runtime == "tensorrt")
        assert manifest["files"] == {
            n: {"sha256": sha256(d), "bytes": len(d)} for n, d in contents.items() if not n.startswith("manifest.")
        }  # fmt: skip
        assert (manifest["classes"], manifest["model_version"], manifest["receipts"]["gate"]) == (list(CLASSES), "7", chain.gate)
        assert "verify.py there measures" in manifest["not_measured"]
        device = Device(tmp_path / name, key.with_name(signing.PUBLIC).read_bytes())
        device.lay(chain.lake.get(receipt.outputs["bundle.tar.gz"].path))
        assert device.check()["version"] == 1
        if name == "jetson-nano":
            assert (found.opset_import[0].version, found.ir_version) == (13, 7)
            answers = evaluation.answers(contents["model.onnx"], model()[2])
            assert np.abs(answers - evaluation.answers(model()[1], model()[2])).max() < 1e-5
        if target.runtime == "tensorrt-rtx":
            assert manifest["tensorrt"]["min"] == tensorrt_rtx.__version__
            assert manifest["engine"]["deserialised"] == "not measured"


def test_the_same_work_gives_the_same_bytes(tmp_path: Path, key: Path) -> None:
    chain = Chain(tmp_path)
    first = chain.export("cpu")
    assert chain.export("cpu").path == first.path, "adopted"
    chain.lake.delete(first.outputs["bundle.tar.gz"].path)
    again = chain.export("cpu")
    assert again.outputs == first.outputs
    assert [b.version for b in depot.bundles(chain.lake, edge_parts.LINE)] == [1]


def test_an_adopted_bundle_needs_no_key(tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(tmp_path)
    first = chain.export("cpu")
    monkeypatch.delenv(signing.VARIABLE)
    assert chain.export("cpu").path == first.path
    with pytest.raises(Refused, match="FORJA_EDGE_KEY is not set"):
        chain.export("thor")
    assert list(chain.lake.list("vision/digits/edge/thor")) == []


def test_other_scripts_are_other_work(tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(tmp_path)
    chain.export("cpu")
    monkeypatch.setattr(export, "scripts", lambda: "0" * 64)
    assert chain.export("cpu").facts["version"] == 2


def test_scripts_are_all_in_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {export.scripts()}
    for name in bundle.SCRIPTS:
        for other in bundle.SCRIPTS:
            data = (Path(export.__file__).parents[1] / "edge" / "files" / other).read_bytes()
            (tmp_path / other).write_bytes(data + (b"#" if other == name else b""))
        monkeypatch.setattr(bundle, "FILES", tmp_path)
        export.scripts.cache_clear()
        found.add(export.scripts())
    export.scripts.cache_clear()
    assert len(found) == len(bundle.SCRIPTS) + 1


REFUSED: dict[str, tuple[dict[str, Any], str, type[Exception], str]] = {
    "the gate refused the model": ({"failed": ("fp32",)}, "cpu", Refused, "gate chose no variant"),
    "the gate refused the variant": ({"failed": ("int8",)}, "orin-int8", Refused, "int8 failed accuracy"),
    "answers that differ from the judged ones": ({"golden": lambda v, a: a[::-1]}, "cpu", Refused, "answers differ"),
    "golden answers that are NaN": ({"golden": lambda v, a: a * np.nan}, "cpu", Refused, "answers differ"),
    "a target that isn't in the catalogue": ({}, "toaster", BadInput, "toaster"),
    "no target": ({}, "", BadInput, "--variant TARGET"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path, key: Path) -> None:
    options, target, kind, words = REFUSED[case]
    chain = Chain(tmp_path, **options)
    with pytest.raises(kind, match=words):
        chain.export(target)
    assert list(chain.lake.list("vision/digits/edge")) == [], "no version is taken"


def test_the_next_variant_is_taken_when_the_best_differs(tmp_path: Path, key: Path) -> None:
    chain = Chain(tmp_path, golden=lambda variant, a: a + 0.05 if variant == "fp16" else a)
    receipt = chain.export("orin")
    assert receipt.facts["variant"] == "fp32"
    assert "answers differ" in receipt.facts["skipped"]["fp16"]
    assert any("not fp16" in line for line in receipt.report)


def test_another_models_gate_is_refused(tmp_path: Path, key: Path) -> None:
    chain = Chain(tmp_path)
    old = receipts.load(chain.lake, chain.model)
    chain.lake.create("vision/digits/register/other/model.onnx", variants()["fp16"])
    output = Output(path="vision/digits/register/other/model.onnx", sha256=sha256(variants()["fp16"]), bytes=len(variants()["fp16"]))
    other = dataclasses.replace(old, outputs={"model.onnx": output})
    chain.lake.create("vision/digits/register/other/receipt.json", other.to_json())
    with pytest.raises(BadInput, match="not the model that the gate judged"):
        chain.export("cpu", model="vision/digits/register/other/receipt.json")


@pytest.mark.parametrize(("classes", "good"), [(CLASSES, True), (CLASSES[::-1], False), ((*CLASSES[:9], "X"), False)])
def test_classes_in_another_order_than_the_dataset_are_refused(
    classes: tuple[str, ...], good: bool, tmp_path: Path, key: Path
) -> None:  # fmt: skip
    chain = Chain(tmp_path)
    recipe = dataclasses.replace(RECIPE, dataset=dataclasses.replace(RECIPE.dataset, classes=classes))
    if good:
        assert chain.export("cpu", recipe).facts["version"] == 1
        return
    with pytest.raises(BadInput, match="classes of the recipe"):
        chain.export("cpu", recipe)


def test_nothing_of_the_key_is_in_the_lake_or_said(tmp_path: Path, key: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chain = Chain(tmp_path)
    chain.export("cpu")
    secret = b"".join(key.read_bytes().splitlines()[1:-1])[:40]
    said = "".join(capfd.readouterr()).encode()
    assert b"signed by" in said
    for data in (said, *(p.read_bytes() for p in (tmp_path / "lake").rglob("*") if p.is_file())):
        assert secret not in data
        assert b"PRIVATE KEY" not in data
        assert str(key).encode() not in data


@pytest.mark.parametrize("variant", ["fp32", "fp16", "int8"])
def test_variants_made_again_at_an_old_opset(variant: str, tmp_path: Path, key: Path) -> None:
    """No target of today has an old parser and these variants; one that does gets them."""
    chain = Chain(tmp_path)
    old = dataclasses.replace(TARGETS["xavier-nx-int8"], name="old", opset=13, ir=7, weak=False, precisions=(variant,))
    work = _work(chain, tmp_path)
    gate = receipts.load(chain.lake, chain.gate)
    judged = remake.Judged(
        optimize={r.variant: r for r in (receipts.load(chain.lake, i.ref) for i in gate.inputs["optimize"])},
        training=receipts.load(chain.lake, receipts.load(chain.lake, chain.model).inputs["training"][0].ref),
        dataset=receipts.load(chain.lake, receipts.load(chain.lake, chain.model).inputs["dataset"][0].ref),
    )
    golden = remake.golden(work, judged.optimize[variant])
    made = remake.make(work, old, variant, judged, (RECIPE.dataset, RECIPE.model, RECIPE.optimize), golden)
    found = onnx.load_from_string(made.model)
    assert (made.again, found.opset_import[0].version, found.ir_version) == (True, 13, 7)
    kinds = {t.data_type for t in found.graph.initializer} | {n.op_type for n in found.graph.node}
    assert {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "int8": "QuantizeLinear"}[variant] in kinds


def _work(chain: Chain, folder: Path) -> Any:
    from forja.stages.base import Work

    (folder / "scratch").mkdir(exist_ok=True)
    return Work(settings=chain.settings, lake=chain.lake, folder="x", key="y", scratch=folder / "scratch", check=lambda: None)


def test_a_variant_that_an_old_opset_lacks_is_named(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    old = dataclasses.replace(TARGETS["thor-int8"], opset=13)
    judged = remake.Judged(
        optimize={}, training=receipts.load(chain.lake, receipts.load(chain.lake, chain.model).inputs["training"][0].ref),
        dataset=receipts.load(chain.lake, chain.gate),
    )  # fmt: skip
    with pytest.raises(Refused, match="mixed for thor-int8: it can't be made at opset 13"):
        remake.from_checkpoint(_work(chain, tmp_path), old, "mixed", judged, (RECIPE.dataset, RECIPE.model, RECIPE.optimize))


def test_inputs_that_float16_can_not_hold_are_found(tmp_path: Path) -> None:
    """A weakly typed builder may run the first layer in float16; from pixels that is harmless, from a table it may not be."""
    golden = edge_parts.golden()
    assert remake.parity(edge_parts.MODEL, remake.halved(golden.inputs), golden, 1e-3, "x") < 1e-6
    large = Golden(inputs=golden.inputs * 1000, outputs=evaluation.answers(edge_parts.MODEL, golden.inputs * 1000))
    assert remake.parity(edge_parts.MODEL, large.inputs, large, 1e-3, "x") == 0
    with pytest.raises(Refused, match="answers differ"):
        remake.parity(edge_parts.MODEL, remake.halved(large.inputs), large, 1e-3, "x")


@pytest.mark.parametrize(("opset", "ir"), [(12, 7), (13, 6)])
def test_a_file_too_new_for_its_target_is_refused(opset: int, ir: int) -> None:
    remake.checked(edge_parts.MODEL, dataclasses.replace(TARGETS["cpu"], opset=13, ir=7))
    with pytest.raises(Refused, match="too new"):
        remake.checked(edge_parts.MODEL, dataclasses.replace(TARGETS["cpu"], opset=opset, ir=ir))


def test_a_broken_file_is_refused() -> None:
    broken = onnx.load_from_string(edge_parts.MODEL)
    broken.graph.node[0].op_type = "Flat"
    with pytest.raises(Refused, match="not valid"):
        remake.checked(broken.SerializeToString(), TARGETS["cpu"])


def test_the_shared_model_is_what_it_says() -> None:
    onnx.checker.check_model(onnx.load_from_string(edge_parts.MODEL), full_check=True)
    golden = edge_parts.golden()
    assert np.abs(evaluation.answers(edge_parts.MODEL, golden.inputs) - golden.outputs).max() < 1e-6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (37, 53), (200, 150), (5, 6), (16, 16)], ids=str)
def test_infer_prepares_images_as_training_did(size: tuple[int, int], channels: int) -> None:
    from PIL import Image

    pixels = np.random.default_rng(1).integers(0, 256, (*size, channels)).astype("uint8")
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(buffer, "PNG")
    pipe = loading.Pipelines().memory((channels, 16, 16), 1)
    pipe.build()
    theirs = pipe.run(raw=[np.frombuffer(buffer.getvalue(), np.uint8)])[0].as_array()[0]
    worst = np.abs(theirs - infer.prepared(pixels, 16, 16)).max()
    assert worst == 0 if min(size) >= 16 else worst <= 1, "one grey level of rounding where an image grows"


def test_names_of_tensorrt_that_the_scripts_use() -> None:
    """TensorRT-RTX has the interface of TensorRT 10 and 11; that of 8.2 can be had for Python 3.6 on a Jetson alone."""
    for kind, names in {
        tensorrt_rtx.IExecutionContext: ("set_input_shape", "set_tensor_address", "execute_async_v3"),
        tensorrt_rtx.ICudaEngine: ("num_io_tensors", "create_execution_context"),
        tensorrt_rtx.Runtime: ("deserialize_cuda_engine",),
        tensorrt_rtx.Logger: ("WARNING",),
    }.items():
        assert [n for n in names if not hasattr(kind, n)] == []


def test_a_real_bundle_proves_itself_end_to_end(tmp_path: Path, key: Path) -> None:
    chain = Chain(tmp_path)
    receipt = chain.export("jetson-nano")
    archive = chain.lake.get(receipt.outputs["bundle.tar.gz"].path)
    rows, body = simulate.run(Settings.from_env(), archive, [key.with_name(signing.PUBLIC).read_bytes()], lambda text: None)
    assert [r.what for r in rows if not r.ok] == []
    assert {r.wanted for r in rows} == {
        "passed",
        "digest",
        "signature",
        "extra",
        "downgrade",
        "expired",
        "clock",
        "target",
        "labels",
        "golden",
    }
    assert (body["outcome"], body["simulated"], body["bundle"]["manifest_sha256"]) == ("passed", True, receipt.facts["manifest_sha256"])
    assert trust.parsed(chain.lake.get(receipt.outputs["manifest.json"].path), trust.BUNDLE)["version"] == 1
