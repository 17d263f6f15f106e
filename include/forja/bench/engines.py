"""``forja bench engines``: accuracy of cifar10 and what its variants lose, and the processor time of ResNet-18's way to the gate.

The parts run in the ml environment: ``python -m forja.bench.engines cifar10 DATA | resnet18``.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forja import envs, receipts, recipes
from forja.errors import ForjaError
from forja.lake import Lake, canonical, sha256
from forja.receipts import Input, Output, Receipt
from forja.recipes.base import Images, Optimize, Recipe, Split
from forja.settings import ROOT, Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PARTS = ("cifar10", "resnet18")
KEYS = {"cifar10": ("cifar10_top1", "int8_drop", "fp16_drop"), "resnet18": ("variants_s",)}
SIDE = 224
"""Height and width of ResNet-18's images, in pixels."""
ROWS = {"train": 500, "validation": 100, "test": 20}
"""Made-up images of each split for ResNet-18; 500 calibrate."""


def main(parts: tuple[str, ...], data: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the parts; a key that wasn't measured is None, with the reason under ``missing``."""
    found: dict[str, Any] = {key: None for keys in KEYS.values() for key in keys}
    missing: dict[str, str] = {}
    for part in PARTS:
        reason = "not asked for: see --parts" if part not in parts else ""
        if part == "cifar10" and data is None and not reason:
            reason = "no images: pass --data, a folder or zip of class folders"
        if reason:
            missing |= dict.fromkeys(KEYS[part], reason)
            continue
        say(f"{part} ...")
        found |= _child([part, *([str(data.absolute())] if part == "cifar10" and data else [])])
        say("  ".join(f"{key} {found[key]}" for key in KEYS[part]))
    return {**found, "missing": missing, "cpus": os.cpu_count()}


def _child(arguments: list[str]) -> dict[str, Any]:
    command = [str(envs.python("ml", Settings.from_env())), "-m", "forja.bench.engines", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT / "include")}, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ForjaError(f"{' '.join(command)} ended with status {done.returncode}", value=done.stdout[-1500:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def cifar10(data: Path) -> dict[str, Any]:
    """The recipe from its images to the gate; accuracy on the test split, which chose nothing, and losses there in points."""
    import numpy

    from forja import evaluation, paired
    from forja.bench import models
    from forja.serving import served
    from forja.stages import harness

    recipe = recipes.load("cifar10")
    with models.lake(recipe, data) as (settings, raw):
        began = time.monotonic()
        work, dataset, onnx = models.trained(settings, recipe, raw)
        train_s = time.monotonic() - began
        model = _registered(Lake(settings.lake), recipe, onnx)
        optimized = {
            v: harness.execute(settings, "optimize", recipe, {"dataset": [dataset.path], "model": [model]}, variant=v)[0]
            for v in recipe.optimize.variants
        }
        gate, _ = harness.execute(settings, "gate", recipe, {"optimize": [r.path for r in optimized.values()]})
        test = served.samples(work, dataset, recipe.dataset, "test")
        files = {v: "emulated.onnx" if "emulated.onnx" in r.outputs else "model.onnx" for v, r in optimized.items()}
        answers = {v: evaluation.answers(work.load(r, files[v]), test.inputs) for v, r in optimized.items()}
    drops = {v: paired.accuracy(answers["fp32"], a, test.labels) for v, a in answers.items()}
    points = {v: {k: round(100 * x, 3) for k, x in dataclasses.asdict(d).items()} for v, d in drops.items()}
    return {
        "cifar10_top1": round(evaluation.accuracy(answers["fp32"], test.labels), 4), "cifar10_test_images": len(test.labels),
        "cifar10_transform_and_train_s": round(train_s, 1), "int8_drop": points["int8"]["value"], "fp16_drop": points["fp16"]["value"],
        "drops": points, "calibration": recipe.optimize.calibration, "calibration_samples": recipe.optimize.calibration_samples,
        "gate": gate.report, "finite": bool(numpy.isfinite(answers["int8"]).all()),
    }  # fmt: skip


def resnet18() -> dict[str, Any]:
    """CPU-seconds from a checkpoint of ResNet-18 (random weights, 224x224) to gated receipts of all variants and engines.

    The images are made up and their labels are the network's own answers, so accuracy says nothing here; the work is that of a real one.
    """
    from forja.stages import harness

    recipe = _recipe()
    with tempfile.TemporaryDirectory(prefix="forja-bench-") as folder:
        settings = Settings.from_env({
            "FORJA_STATE": folder, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "FORJA_CACHE": str(Settings.from_env().cache),
        })  # fmt: skip
        lake, checkpoint = Lake(settings.lake), Path(folder) / "checkpoint.pt"
        _checkpoint(checkpoint)
        images = _images()
        dataset = _dataset(lake, recipe, images, _exported(checkpoint))
        before, began = _cpu(), time.monotonic()
        model = _registered(lake, recipe, _exported(checkpoint))
        optimized = [
            harness.execute(settings, "optimize", recipe, {"dataset": [dataset], "model": [model]}, variant=v)[0]
            for v in recipe.optimize.variants
        ]
        gate, _ = harness.execute(settings, "gate", recipe, {"optimize": [r.path for r in optimized]})
        wall, own = time.monotonic() - began, _cpu() - before
        # Triton is ended by a signal to its whole group, so its models' processes don't show in ours.
        servers = sum(r.facts["served"]["server_cpu_s"] for r in optimized)
    return {
        "variants_s": round(own + servers, 1), "variants_wall_s": round(wall, 1), "variants": list(recipe.optimize.variants),
        "resnet18_rows": ROWS, "resnet18_engine_mb": {r.variant: round(r.metrics["engine_bytes"] / 1e6, 2) for r in optimized},
        "resnet18_gate": gate.report, "not_counted": "processes of the server that answers the test split's 20 images",
    }  # fmt: skip


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _recipe() -> Recipe:
    digits = recipes.load("digits")
    dataset = Images(height=SIDE, width=SIDE, channels=3, classes=tuple(f"c{i}" for i in range(10)), split=Split(validation=0.2, test=0.2))
    rules = tuple(gate for gate in digits.gates if gate.metric == "accuracy" and gate.least)
    return dataclasses.replace(
        digits, dataset=dataset, optimize=Optimize(calibration="percentile", calibration_samples=ROWS["train"]), gates=rules
    )


def _checkpoint(path: Path) -> None:
    import torch
    from torchvision.models import resnet18 as network

    torch.manual_seed(0)
    torch.save(network(num_classes=10).state_dict(), path)


def _exported(checkpoint: Path) -> bytes:
    import torch
    from torchvision.models import resnet18 as network

    from forja import models
    from forja.stages import register

    module = network(num_classes=10)
    module.load_state_dict(torch.load(checkpoint, weights_only=True))
    return register.export(
        models.Served(torch.nn.Sequential(models.Normalize([128.0] * 3, [64.0] * 3, dims=4), module)).eval(), (3, SIDE, SIDE)
    )


def _images() -> dict[str, list[bytes]]:
    """JPEGs of smooth colours, as many as ROWS says."""
    import numpy
    from PIL import Image

    rng = numpy.random.default_rng(0)

    def made() -> Iterator[bytes]:
        while True:
            buffer = io.BytesIO()
            small = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype="uint8"), mode="RGB")
            small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, format="JPEG")
            yield buffer.getvalue()

    source = made()
    return {split: [next(source) for _ in range(count)] for split, count in ROWS.items()}


def _dataset(lake: Lake, recipe: Recipe, images: dict[str, list[bytes]], onnx: bytes) -> str:
    """A transform receipt over the images, labelled by what the network answers."""
    import numpy

    from forja import evaluation, loading, shards

    assert isinstance(recipe.dataset, Images)  # noqa: S101 - made above
    outputs, keys = {}, {}
    for split, payloads in images.items():
        decoded: NDArray[np.float32] = numpy.stack([i for i in loading.decode(payloads, recipe.dataset) if i is not None])
        labels = evaluation.answers(onnx, decoded).argmax(axis=1)
        outputs[f"{split}-000.tar"], outputs[f"{split}-000.idx"] = shards.pack(zip(payloads, labels.tolist(), strict=True), "img")
        keys[split] = [f"{split}-{i:05d}" for i in range(len(payloads))]
    return _receipt(lake, recipe, "transform", {**outputs, "keys.json": canonical(keys)}, {})


def _registered(lake: Lake, recipe: Recipe, onnx: bytes) -> str:
    """What register leaves, without MLflow."""
    return _receipt(lake, recipe, "register", {"model.onnx": onnx}, {"model": recipe.name, "version": "1", "mlflow_run": None})


def _receipt(lake: Lake, recipe: Recipe, stage: str, contents: dict[str, bytes], facts: dict[str, Any]) -> str:
    folder = receipts.place(recipe.team, recipe.name, stage, sha256(canonical(sorted(contents)))[:32])
    outputs = {}
    for name, data in contents.items():
        lake.create(f"{folder}/{name}", data)
        outputs[name] = Output(path=f"{folder}/{name}", sha256=sha256(data), bytes=len(data))
    inputs: dict[str, list[Input]] = {}
    receipt = Receipt(
        stage=stage, recipe=recipe.name, team=recipe.team, key=folder.rpartition("/")[2], code="0" * 64, command="./forja bench engines",
        inputs=inputs, outputs=outputs, metrics={}, facts=facts, report=[], versions={}, started="", finished="", seconds=0.0,
    )  # fmt: skip
    lake.create(f"{folder}/receipt.json", receipt.to_json())
    return f"{folder}/receipt.json"


if __name__ == "__main__":
    print(json.dumps(cifar10(Path(sys.argv[2])) if sys.argv[1] == "cifar10" else resnet18()))
