"""Releases in a slot's folder: whole or not at all, and a configuration that Triton's own schema takes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from forja import recipes
from forja.errors import BadInput, Damaged
from forja.services.triton import Slot
from forja.serving import repository
from forja.serving.repository import Release

RELEASE = Release(
    model="digits", version="3", variant="int8", classes=tuple("0123456789"), shape=(1, 8, 8), max_batch=32,
    preprocess=repository.preprocess(recipes.load("digits").dataset), receipts={"gate": "vision/digits/gate/k/receipt.json"},
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Slot:
    folder = tmp_path / "digits" / "blue" / "repository"
    return Slot(name="blue", http_port=1, grpc_port=2, metrics_port=3, repository=folder, program="triton-digits-blue")


def put(place: Slot, model: bytes, **changes: str) -> Release:
    release = dataclasses.replace(RELEASE, **changes)  # type: ignore[arg-type]
    contents = repository.files(release, model)
    release = repository.sealed(release, contents)
    repository.install(place, release, contents)
    return release


@pytest.mark.parametrize(("backend", "kind"), [("python", "KIND_CPU"), ("onnxruntime", "KIND_AUTO"), ("tensorrt_plan", "KIND_GPU")])
def test_config_is_what_tritons_schema_says(backend: repository.Backend, kind: str) -> None:
    config = text_format.Parse(repository.config(RELEASE, backend), model_config_pb2.ModelConfig())
    assert (config.name, config.max_batch_size) == ("digits", 32)
    assert backend in (config.backend, config.platform)
    assert (list(config.input[0].dims), list(config.output[0].dims)) == ([1, 8, 8], [10])
    assert {config.input[0].data_type, config.output[0].data_type} == {model_config_pb2.TYPE_FP32}
    assert list(config.version_policy.specific.versions) == [3]
    assert model_config_pb2.ModelInstanceGroup.Kind.Name(config.instance_group[0].kind) == kind
    policy = config.dynamic_batching.default_queue_policy
    assert 0 < policy.max_queue_size <= 1024
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT


def test_config_with_an_unknown_field_is_no_config() -> None:
    """Must fail: the schema check sees a misspelt field."""
    with pytest.raises(text_format.ParseError):
        text_format.Parse(repository.config(RELEASE) + "max_batchsize: 3\n", model_config_pb2.ModelConfig())


def test_backend_that_nobody_has() -> None:
    with pytest.raises(BadInput, match="tensorrt_plan"):
        repository.config(RELEASE, "tflite")  # type: ignore[arg-type]


def test_files_of_each_backend() -> None:
    assert set(repository.files(RELEASE, b"m")) == {"config.pbtxt", "labels.txt", "3/model.onnx", "3/model.py"}
    assert set(repository.files(RELEASE, b"m", "onnxruntime")) == {"config.pbtxt", "labels.txt", "3/model.onnx"}
    assert set(repository.files(RELEASE, b"m", "tensorrt_plan")) == {"config.pbtxt", "labels.txt", "3/model.plan"}


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
