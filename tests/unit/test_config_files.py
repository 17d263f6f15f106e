"""What a release brings to run in Triton: model.py, and the first step of ensembles in Pillow and in DALI."""

from __future__ import annotations

import functools
import importlib.util
import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from forja import loading
from forja.datasets import Images
from forja.recipes.base import Serving
from forja.serving import ensemble, repository
from forja.serving.repository import PYTHON, Release

pytestmark = pytest.mark.ml

SHAPES = [(3, 32, 32), (1, 8, 8), (3, 48, 40)]


def picture(height: int, width: int) -> np.ndarray[Any, Any]:
    """Waves and noise, uint8 [height, width, 3]: edges and gradients as photographs have them."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([127 + 100 * np.sin(x / (7 + i) + i) * np.cos(y / (5 + i)) for i in range(3)], axis=-1)
    noisy = waves + np.random.default_rng(0).normal(0, 8, (height, width, 3))
    return np.clip(noisy, 0, 255).astype("uint8")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def images() -> dict[str, bytes]:
    large, same = picture(150, 200), Image.fromarray(picture(32, 32))
    photo = Image.fromarray(large)
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "jpeg": encoded(photo, "JPEG", quality=90),
        "jpeg without subsampling": encoded(photo, "JPEG", quality=90, subsampling=0),
        "progressive jpeg": encoded(photo, "JPEG", progressive=True),
        "grey jpeg": encoded(photo.convert("L"), "JPEG"),
        "cmyk jpeg": encoded(photo.convert("CMYK"), "JPEG"),
        "jpeg that lies on its side": encoded(photo, "JPEG", exif=turned.tobytes()),
        "jpeg of the very size": encoded(same, "JPEG", quality=90),
        "small jpeg": encoded(Image.fromarray(picture(16, 20)), "JPEG", quality=95),
        "png": encoded(photo, "PNG"),
        "png of the very size": encoded(same, "PNG"),
        "grey png": encoded(photo.convert("L"), "PNG"),
        "png with a palette": encoded(photo.quantize(64), "PNG"),
        "png that shines through": encoded(Image.fromarray(np.dstack([large, large[..., 0]])), "PNG"),
        "png of 16 bits": encoded(Image.fromarray(large[..., 0].astype("uint16") * 257), "PNG"),
    }


def imported(name: str) -> Iterator[Any]:
    """A file of serving/files, without the server around it."""
    names = ("triton_python_backend_utils", "lifeline")
    sys.modules.update({n: types.ModuleType(n) for n in names})
    yield module_of(PYTHON / name)
    for n in names:
        sys.modules.pop(n, None)


def module_of(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"served_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def step() -> Iterator[Any]:
    yield from imported("preprocess.py")


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    yield from imported("model.py")


def test_limits_of_a_table(model: Any, tmp_path: Path) -> None:
    """A feature each; null is any finite number; a limit that float32 can't hold is rounded as its values are."""
    (tmp_path / "preprocess.json").write_text('{"low": [0.1, null], "high": [0.7, null]}')
    served = model.TritonPythonModel()
    served.low, served.high = model._limits(tmp_path)
    fine = np.array([[0.1, -3e38], [0.7, 3e38]], np.float32)
    assert served._wrong(fine) == ""
    for row, message in (
        ((0.0999, 0), "0.0999 at [0] of sample 0; allowed: 0.1 to 0.7"),
        ((0.5, np.inf), "inf at [1]"),
        ((np.nan, 0), "nan"),
    ):
        assert message in served._wrong(np.array([row], np.float32))
    assert "allowed: a finite number" in served._wrong(np.array([[0.5, np.nan]], np.float32))


def test_an_empty_batch(model: Any) -> None:
    """Triton refuses it too, of other sizes than it expects; what is asked from inside of it comes here."""
    served = model.TritonPythonModel()
    served.low, served.high = np.float32(0), np.float32(255)
    assert served._wrong(np.zeros((0, 3, 32, 32), np.float32)) == "input: got an empty batch; allowed: one sample or more"


@functools.cache
def wanted(shape: tuple[int, ...]) -> list[np.ndarray[Any, Any] | None]:
    dataset = Images(height=shape[1], width=shape[2], channels=1 if shape[0] == 1 else 3, classes=("a", "b"))
    return list(loading.decode(list(images().values()), dataset))


def same(found: np.ndarray[Any, Any], right: np.ndarray[Any, Any], resized: bool) -> None:
    """Where pixels are weighed, a few that lie between two grey levels round to the other one; nothing else may differ."""
    differs = np.abs(found - right)
    assert found.shape == right.shape
    assert found.dtype == np.float32
    assert differs.max() <= (1 if resized else 0)
    assert (differs > 0).mean() <= 0.02


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pillow_gives_what_the_loader_gives(step: Any, shape: tuple[int, int, int]) -> None:
    for (name, payload), right in zip(images().items(), wanted(shape), strict=True):
        assert right is not None, name
        # A grey level is a weighed sum too.
        same(step.decode(payload, shape), right, resized="very size" not in name or shape != (3, 32, 32))


def test_an_edge_that_is_left_out_would_be_seen(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Must fail: Pillow's own resize, which weighs edges otherwise."""

    def pillow(pixels: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
        resized = Image.fromarray(pixels.astype("uint8")).resize((pixels.shape[1], size), Image.Resampling.BILINEAR)
        return np.asarray(resized, dtype=np.float32)

    monkeypatch.setattr(step, "_resize", pillow)
    right = wanted((3, 32, 32))[0]
    assert right is not None
    with pytest.raises(AssertionError):
        same(step.decode(next(iter(images().values())), (3, 32, 32)), right, resized=True)


BROKEN = {
    "nothing": b"",
    "text": b"hello",
    "half a jpeg": images()["jpeg"][:500],
    "half a png": images()["png"][:500],
    "a jpeg with an end and no middle": images()["jpeg"][:500] + b"\xff\xd9",
    "another format": encoded(Image.fromarray(picture(8, 8)), "BMP"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_refused(step: Any, name: str) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - of any kind: model.py turns it into the request's error
        step.decode(BROKEN[name], (3, 32, 32))


def test_an_image_that_claims_to_be_huge_is_refused(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="32x32 pixels, more than 1000"):
        step.decode(images()["png of the very size"], (3, 32, 32))


def release(shape: tuple[int, ...]) -> Release:
    dataset = Images(height=shape[1], width=shape[2], channels=1 if shape[0] == 1 else 3, classes=("a", "b"))
    return Release(
        model="m", version="2", variant="fp32", classes=("a", "b"), shape=shape, max_batch=8, preprocess=repository.preprocess(dataset),
        receipts={}, serving=Serving(),
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dali_gives_what_the_loader_gives(shape: tuple[int, ...], tmp_path: Path) -> None:
    """The files as they would lie in NVIDIA's image, serialised as its backend serialises them, run here on the CPU."""
    from nvidia.dali import Pipeline
    from nvidia.dali._utils.autoserialize import invoke_autoserialize

    module = _dali(tmp_path, shape, "cpu")
    target = tmp_path / "model.dali"
    invoke_autoserialize(module, str(target))
    pipe = Pipeline.deserialize(filename=str(target))
    pipe.build()
    payloads = [np.frombuffer(p, np.uint8) for p in images().values()][: pipe.max_batch_size]
    pipe.feed_input("image", payloads)
    (found,) = pipe.run()
    assert pipe.max_batch_size == 8
    for answer, right in zip(found.as_array(), wanted(shape), strict=False):
        assert right is not None
        assert (answer == right).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which takes it")
def test_dali_of_a_gpu_asks_for_one(tmp_path: Path) -> None:
    """Must fail here: a pipeline that would decode on the CPU all the same."""
    from nvidia.dali._utils.autoserialize import invoke_autoserialize

    with pytest.raises(RuntimeError, match="CUDA is not available"):
        invoke_autoserialize(_dali(tmp_path, (3, 32, 32), "gpu"), str(tmp_path / "model.dali"))


def _dali(folder: Path, shape: tuple[int, ...], device: Any) -> Any:
    files = ensemble.files(release(shape), "tensorrt_plan", device)
    repository.unpack(folder, files)
    path = folder / "models" / "m_preprocess" / "2" / "dali.py"
    return module_of(path)
