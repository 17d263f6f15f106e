"""Releases in a slot's folder: whole or not at all, with labels and limits that are the model's."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forja import recipes
from forja.errors import Damaged, Refused
from forja.recipes.base import Serving
from forja.services.triton import Slot
from forja.serving import ensemble, repository
from forja.serving.config import Backend
from forja.serving.repository import Release

RELEASE = Release(
    model="digits", version="3", variant="int8", classes=tuple("0123456789"), shape=(1, 8, 8), max_batch=32,
    preprocess=repository.preprocess(recipes.load("digits").dataset), receipts={"gate": "vision/digits/gate/k/receipt.json"},
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Slot:
    folder = tmp_path / "digits" / "blue" / "repository"
    return Slot(name="blue", http_port=1, grpc_port=2, metrics_port=3, repository=folder, program="triton-digits-blue")


def put(place: Slot, model: bytes, **changes: Any) -> Release:
    release = dataclasses.replace(RELEASE, **changes)
    contents = repository.files(release, model)
    release = repository.sealed(release, contents)
    repository.install(place, release, contents)
    return release


FILES = {"config.pbtxt", "labels.txt", "3/labels.txt", "3/preprocess.json"}


@pytest.mark.parametrize(
    ("backend", "own"),
    [
        ("python", {"3/model.onnx", "3/model.py", "3/lifeline.py"}),
        ("onnxruntime", {"3/model.onnx"}),
        ("tensorrt_plan", {"3/model.plan"}),
        ("pytorch", {"3/model.pt"}),
    ],
)
def test_files_of_each_backend(backend: Backend, own: set[str]) -> None:
    assert set(repository.files(RELEASE, b"m", backend)) == FILES | own
    golden = np.full((2, 1, 8, 8), 7, np.float32)
    warm = repository.files(RELEASE, b"m", backend, golden)
    assert set(warm) == FILES | own | {"warmup/golden"}
    assert np.frombuffer(warm["warmup/golden"], "<f4").tolist() == [7.0] * 64


def test_limits_of_inputs() -> None:
    """What the server refuses comes from the columns: a category's features are 0 or 1, a derived one need only be finite."""
    table = recipes.load("ai4i").dataset
    found = repository.preprocess(table)
    assert len(found["low"]) == len(found["high"]) == len(table.features)
    assert (found["low"][:4], found["high"][:4]) == ([0.0, 0.0, 0.0, 250], [1.0, 1.0, 1.0, 350])
    assert found["low"][-3:] == found["high"][-3:] == [None] * 3
    image = repository.preprocess(recipes.load("digits").dataset)
    assert (image["low"], image["high"]) == (0.0, 255.0)
    assert json.loads(repository.files(RELEASE, b"m")["3/preprocess.json"])["shape"] == [1, 8, 8]


WRONG_LABELS = {
    "in another order": (
        b"1\n0\n" + b"".join(b"%d\n" % i for i in range(2, 10)),
        "line 1: got '1'; allowed: 0, which the model's output 0 means",
    ),
    "one too few": (b"".join(b"%d\n" % i for i in range(9)), "got '9 labels'; allowed: 10"),
    "one too many": (b"".join(b"%d\n" % i for i in range(11)), "got '11 labels'"),
    "none": (b"", "got '0 labels'"),
}


@pytest.mark.parametrize("name", ["labels.txt", "3/labels.txt"])
@pytest.mark.parametrize("case", WRONG_LABELS, ids=str)
def test_labels_that_are_not_the_classes_are_refused(case: str, name: str, place: Slot) -> None:
    data, message = WRONG_LABELS[case]
    contents = {**repository.files(RELEASE, b"m"), name: data}
    with pytest.raises(Refused, match=f"^{name} of digits version 3: {message}"):
        repository.sealed(RELEASE, contents)
    with pytest.raises(Refused, match=message):
        repository.install(place, RELEASE, contents)
    with pytest.raises(Refused, match=message):
        repository.lay(place.repository, RELEASE, contents)
    assert repository.installed(place, "digits") is None


def test_labels_of_an_ensemble_are_checked_too() -> None:
    contents = {**repository.files(RELEASE, b"m"), **ensemble.files(RELEASE)}
    repository.check_labels(RELEASE, contents)
    for name in [n for n in contents if n.startswith("models/") and n.endswith("labels.txt")]:
        with pytest.raises(Refused, match=name):
            repository.check_labels(RELEASE, {**contents, name: b"x\n"})


BAD_GOLDEN = {
    "of another shape": (np.zeros((1, 1, 8, 9), np.float32), r"\[1, 8, 9\]"),
    "not finite": (np.full((1, 1, 8, 8), np.nan, np.float32), "nan"),
    "above the limit": (np.full((1, 1, 8, 8), 256, np.float32), "256"),
    "below the limit": (np.full((1, 1, 8, 8), -1, np.float32), "-1"),
}


@pytest.mark.parametrize("case", BAD_GOLDEN, ids=str)
def test_a_golden_input_that_the_server_would_refuse(case: str) -> None:
    golden, message = BAD_GOLDEN[case]
    with pytest.raises(Refused, match=f"golden input of digits: got .*{message}"):
        repository.files(RELEASE, b"m", golden=golden)


def test_a_golden_row_has_limits_of_its_own() -> None:
    dataset = recipes.load("ai4i").dataset
    release = dataclasses.replace(RELEASE, model="ai4i", classes=("0", "1"), shape=dataset.shape, preprocess=repository.preprocess(dataset))
    row = np.array([[1, 0, 0, 300, 310, 1500, 40, 100, 6e9, -5, 4000]], np.float32)
    assert "warmup/golden" in repository.files(release, b"m", golden=row)
    row[0, 3] = 351
    with pytest.raises(Refused, match="got 351"):
        repository.files(release, b"m", golden=row)


def test_the_models_of_an_ensemble_come_and_go_with_the_release(place: Slot) -> None:
    contents = {**repository.files(RELEASE, b"m"), **ensemble.files(RELEASE)}
    release = repository.sealed(RELEASE, contents)
    repository.install(place, release, contents)
    assert sorted(p.name for p in place.repository.iterdir()) == ["digits", "digits_image", "digits_preprocess"]
    assert (place.repository / "digits_preprocess" / "3" / "model.py").is_file()
    assert repository.intact(place, release)
    (place.repository / "digits_image").unlink()
    assert not repository.intact(place, release)
    plain = put(place, b"m")
    assert [p.name for p in place.repository.iterdir()] == ["digits"]
    assert repository.intact(place, plain)
    repository.install(place, release, contents)
    repository.remove(place, "digits")
    assert list(place.repository.iterdir()) == []


def test_a_repository_that_no_server_reads_yet(tmp_path: Path) -> None:
    contents = {**repository.files(RELEASE, b"m"), **ensemble.files(RELEASE)}
    repository.lay(tmp_path / "r", RELEASE, contents)
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["digits", "digits_image", "digits_preprocess"]
    assert (tmp_path / "r" / "digits_image" / "config.pbtxt").read_text().startswith('name: "digits_image"')


def test_install_read_back_replace_remove(place: Slot) -> None:
    assert repository.installed(place, "digits") is None
    first = put(place, b"first")
    assert repository.installed(place, "digits") == first
    assert repository.intact(place, first)
    second = put(place, b"second", version="4", replaces="3")
    assert repository.installed(place, "digits") == second
    assert second.identity != first.identity
    model = place.repository / "digits"
    assert sorted(p.name for p in model.iterdir()) == ["4", "config.pbtxt", "labels.txt", "release.json"]
    assert len(list((place.repository.parent / "releases").iterdir())) == 1
    repository.remove(place, "digits")
    assert repository.installed(place, "digits") is None
    assert list(place.repository.iterdir()) == []


def test_identity_is_what_is_served(place: Slot) -> None:
    release = put(place, b"model")
    assert dataclasses.replace(release, receipts={}, replaces="2").identity == release.identity
    assert dataclasses.replace(release, variant="fp32").identity != release.identity
    assert dataclasses.replace(release, version="4").identity != release.identity


def test_changed_file_is_not_intact(place: Slot) -> None:
    release = put(place, b"model")
    (place.repository / "digits" / "3" / "model.onnx").write_bytes(b"other")
    assert not repository.intact(place, release)
    (place.repository / "digits" / "3" / "model.onnx").unlink()
    assert not repository.intact(place, release)


def test_how_it_is_served_comes_back(place: Slot) -> None:
    release = put(place, b"model", serving=Serving(instances=3, queue=9))
    found = repository.installed(place, "digits")
    assert found is not None
    assert found.serving == release.serving == Serving(instances=3, queue=9)


def test_a_release_from_before_has_the_default_queue(place: Slot) -> None:
    put(place, b"model")
    path = place.repository / "digits" / "release.json"
    body = json.loads(path.read_text())
    del body["serving"]
    path.write_text(json.dumps(body))
    found = repository.installed(place, "digits")
    assert found is not None
    assert found.serving == Serving()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"identity": "x", "model": "digits"}'])
def test_unreadable_release(place: Slot, text: str) -> None:
    put(place, b"model")
    (place.repository / "digits" / "release.json").write_text(text)
    with pytest.raises(Damaged):
        repository.installed(place, "digits")


def test_release_of_another_schema(place: Slot) -> None:
    put(place, b"model")
    path = place.repository / "digits" / "release.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(Damaged, match="schema of the release in a slot: got 2; allowed: 1"):
        repository.installed(place, "digits")


def test_interrupted_install_leaves_the_old_release(place: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    old = put(place, b"old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(repository, "_link", killed)
    with pytest.raises(KeyboardInterrupt):
        put(place, b"new")
    assert repository.installed(place, "digits") == old
    assert repository.intact(place, old)
    monkeypatch.undo()
    put(place, b"new")
    assert len(os.listdir(place.repository.parent / "releases")) == 1


def test_a_folder_where_the_link_should_be_is_replaced(place: Slot) -> None:
    (place.repository / "digits" / "1").mkdir(parents=True)
    release = put(place, b"model")
    assert repository.installed(place, "digits") == release
