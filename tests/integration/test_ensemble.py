"""The bundled Triton, real: images in, bad requests refused alone, labels that belong to the version, a queue with an end."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient import http as tritonhttp
from tritonclient.utils import InferenceServerException

from forja import envs, recipes
from forja.errors import BadInput, Refused
from forja.recipes.base import Serving
from forja.serving import ensemble, repository, trial, triton
from forja.serving.repository import Release
from forja.serving.trial import Trial
from forja.settings import ROOT, Settings
from forja.tune.measured import counts
from forja.tune.transport import Target, body

DATASET = recipes.load("cifar10").dataset
RELEASE = Release(
    model="cifar10", version="7", variant="fp32", classes=DATASET.classes, shape=DATASET.shape, max_batch=16,
    preprocess=repository.preprocess(DATASET), receipts={}, serving=Serving(instances=2),
)  # fmt: skip
WAITS = dataclasses.replace(RELEASE, model="waits", serving=Serving(instances=1, delay_us=400_000))
"""Whatever comes within 0.4 s shares a batch."""
SHORT = dataclasses.replace(RELEASE, model="short", serving=Serving(instances=2, delay_us=400_000, queue=3))


@dataclass(frozen=True, kw_only=True)
class Models:
    """The server, and what the client-side path answers."""

    server: Trial
    inputs: np.ndarray[Any, Any]
    answers: np.ndarray[Any, Any]
    images: list[bytes]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    folder = tmp_path_factory.mktemp("ensemble")
    settings = Settings.from_env({**os.environ, "FORJA_STATE": str(folder / "state")})
    command = [envs.python("ml", settings), Path(__file__).with_name("ensemble_models.py"), folder]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "include")})
    onnx = (folder / "model.onnx").read_bytes()
    with np.load(folder / "answers.npz") as arrays:
        inputs, answers = arrays["inputs"], arrays["probabilities"]
    place = folder / "repository"
    repository.lay(place, RELEASE, {**repository.files(RELEASE, onnx, golden=inputs), **ensemble.files(RELEASE)})
    for release in (WAITS, SHORT):
        repository.lay(place, release, repository.files(release, onnx, golden=inputs))
    swapped = dataclasses.replace(RELEASE, model="swapped")
    repository.lay(place, swapped, repository.files(swapped, onnx))
    (place / "swapped" / "labels.txt").write_text("".join(f"{c}\n" for c in reversed(RELEASE.classes)))
    with trial.server(settings, place, folder) as server:
        for release in (RELEASE, WAITS, SHORT):
            server.wait(release.model, release.version)
        server.wait(ensemble.name(RELEASE.model), RELEASE.version)
        images = [(folder / f"{i}.image").read_bytes() for i in range(len(inputs))]
        yield Models(server=server, inputs=inputs, answers=answers, images=images)


def ask(models: Models, images: list[bytes], **more: Any) -> np.ndarray[Any, Any]:
    tensor = tritonhttp.InferInput("image", [len(images), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[image] for image in images], dtype=object))
    with tritonhttp.InferenceServerClient(models.server.http) as client:
        answer = client.infer(ensemble.name("cifar10"), [tensor], outputs=[tritonhttp.InferRequestedOutput("probabilities", **more)])
        assert answer.get_response()["model_version"] == "7"
        found: np.ndarray[Any, Any] = answer.as_numpy("probabilities")
        return found


def test_golden_answers_of_the_model(models: Models) -> None:
    golden = triton.Golden(inputs=models.inputs, probabilities=models.answers)
    assert triton.smoke(models.server.http, "cifar10", golden, tolerance=1e-6, max_batch=16, version="7") <= 1e-6


def test_an_image_is_answered_as_by_the_client_side_path(models: Models) -> None:
    """To the bit where nothing is resized; where it is, one grey level of one pixel in a thousand changes next to nothing."""
    found = ask(models, models.images)
    differs = np.abs(found - models.answers).max(axis=1)
    assert differs[::2].max() <= 1e-6
    assert differs.max() <= 1e-4
    assert (found.argmax(axis=1) == models.answers.argmax(axis=1)).all()
    assert np.abs(models.answers[0] - models.answers[1]).max() > 1e-2  # the images differ, so a mix-up would show


def test_answers_have_the_names_of_the_version(models: Models) -> None:
    named = ask(models, models.images[:1], class_count=1)[0]
    best = int(models.answers[0].argmax())
    _, index, label = (named if isinstance(named, bytes) else named[0]).decode().split(":")
    assert (int(index), label) == (best, RELEASE.classes[best])


def test_a_broken_image_is_refused_alone(models: Models) -> None:
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(ask, models, [image]) for image in (models.images[0], b"no image", models.images[1])]
        with pytest.raises(InferenceServerException, match="no whole file; allowed: a whole PNG or JPEG file") as refused:
            calls[1].result()
    assert refused.value.status() == "400"
    assert np.abs(calls[0].result() - models.answers[0]).max() <= 1e-6
    assert np.abs(calls[2].result() - models.answers[1]).max() <= 1e-4


def ones(value: float, *shape: int) -> np.ndarray[Any, Any]:
    return np.full(shape or (1, 3, 32, 32), value, np.float32)


def one_wrong_pixel() -> np.ndarray[Any, Any]:
    inputs = ones(1, 4, 3, 32, 32)
    inputs[2, 2, 4, 5] = 300
    return inputs


BAD = {
    "not a number": (ones(np.nan), r"got nan at \[0, 0, 0\] of sample 0; allowed: 0 to 255"),
    "infinite": (ones(np.inf), "got inf"),
    "above the range": (ones(255.5), r"got 255.5 .*allowed: 0 to 255"),
    "below the range": (ones(-0.5), "got -0.5"),
    "one wrong pixel of many": (one_wrong_pixel(), r"got 300 at \[2, 4, 5\] of sample 2"),
    "another shape": (ones(1, 1, 3, 31, 32), "unexpected shape"),
    "too large a batch": (ones(1, 17, 3, 32, 32), "batch-size must be <= 16"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_inputs_are_refused(case: str, models: Models) -> None:
    inputs, message = BAD[case]
    with pytest.raises(BadInput, match=message):
        triton.infer(models.server.http, "cifar10", inputs)


@pytest.mark.parametrize("value", [0.0, 255.0])
def test_the_limits_themselves_are_taken(value: float, models: Models) -> None:
    assert triton.infer(models.server.http, "cifar10", ones(value)).shape == (1, 10)


def post(models: Models, model: str, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
    """Status and text of one request, as no client library would send it."""
    connection = http.client.HTTPConnection(models.server.http, timeout=10)
    with contextlib.closing(connection):
        connection.request("POST", f"/v2/models/{model}/infer", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")


@pytest.mark.parametrize(
    ("shape", "kind", "message"), [([0, 3, 32, 32], "FP32", "Expected 12288, got 0"), ([1, 3, 32, 32], "FP64", "data-type")]
)
def test_empty_batches_and_other_types_are_refused(shape: list[int], kind: str, message: str, models: Models) -> None:
    request = {"inputs": [{"name": "input", "shape": shape, "datatype": kind, "data": [0.0] * int(np.prod(shape))}]}
    status, text = post(models, "cifar10", json.dumps(request).encode(), {})
    assert status == 400
    assert message in text


def test_a_bad_request_fails_alone_in_its_batch(models: Models) -> None:
    """Eight requests wait for each other and become one batch; the bad ones among them are refused, the good ones get their own answers."""
    target = Target(address=models.server.http, model="waits")
    before = counts(target)
    bad = {2: ones(np.nan), 5: ones(256)}
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(triton.infer, models.server.http, "waits", bad.get(i, models.inputs[i : i + 1])) for i in range(8)]
        for i, call in enumerate(calls):
            if i in bad:
                with pytest.raises(BadInput, match="allowed: 0 to 255"):
                    call.result()
            else:
                assert np.abs(call.result()[0] - models.answers[i]).max() <= 1e-6
    after = counts(target)
    assert before is not None
    assert after is not None
    assert ((after - before).samples, (after - before).batches) == (8, 1)


def test_a_full_queue_refuses_what_is_too_much(models: Models) -> None:
    content, json_bytes = body(models.inputs[:1])
    with ThreadPoolExecutor(12) as pool:
        headers = {"Inference-Header-Content-Length": str(json_bytes)}
        statuses = [status for status, _ in pool.map(lambda _: post(models, "short", content, headers), range(12))]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 3


def test_labels_of_another_version_are_not_served(models: Models) -> None:
    """Must fail: Triton would name every answer by the file that lies beside the versions."""
    with pytest.raises(Refused, match=r"could not load .*labels\.txt: got 10 labels \['truck'"):
        models.server.wait("swapped", "7")
