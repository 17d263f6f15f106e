"""Triton's configurations: for every backend what its own schema takes, strictly, and for every mistake a refusal."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as schema

from forja import recipes
from forja.errors import BadInput
from forja.recipes.base import Serving
from forja.serving import config, ensemble, repository
from forja.serving.config import Backend, Model, Tensor
from forja.serving.repository import Release

BOUNDED = Serving(instances=2, delay_us=700, queue=33, timeout_ms=250)


def release(recipe: str, **changes: Any) -> Release:
    dataset = recipes.load(recipe).dataset
    given: dict[str, Any] = {
        "model": recipe, "version": "3", "variant": "fp32", "classes": dataset.classes, "shape": dataset.shape, "max_batch": 32,
        "preprocess": repository.preprocess(dataset), "receipts": {}, "serving": BOUNDED,
    }  # fmt: skip
    return Release(**{**given, **changes})


def parse(text: str) -> Any:
    """A configuration by Triton's own schema, which refuses unknown fields and values; and what only Triton itself would refuse."""
    found = text_format.Parse(text, schema.ModelConfig())
    preferred = found.dynamic_batching.preferred_batch_size
    assert found.IsInitialized()
    assert all(0 < size <= found.max_batch_size for size in preferred)
    assert bool(found.platform) != bool(found.backend)
    assert found.HasField("ensemble_scheduling") == (found.platform == "ensemble")
    for tensor in (*found.input, *found.output):
        assert tensor.name
        assert tensor.dims
        assert tensor.data_type != schema.TYPE_INVALID
    for sample in found.model_warmup:
        assert set(sample.inputs) == {tensor.name for tensor in found.input}
        assert 1 <= sample.batch_size <= found.max_batch_size
        assert all(value.WhichOneof("input_data_type") for value in sample.inputs.values())
    return found


MODELS = [("python", "digits"), ("onnxruntime", "digits"), ("tensorrt_plan", "cifar10"), ("pytorch", "cifar10"), ("fil", "ai4i")]
KINDS = {"python": "KIND_CPU", "onnxruntime": "KIND_AUTO", "tensorrt_plan": "KIND_GPU", "pytorch": "KIND_AUTO", "fil": "KIND_AUTO"}


@pytest.mark.parametrize(("backend", "recipe"), MODELS)
def test_config_of_a_model(backend: Backend, recipe: str) -> None:
    given = release(recipe)
    found = parse(repository.config(given, backend, golden=True))
    assert (found.name, found.max_batch_size, list(found.version_policy.specific.versions)) == (recipe, 32, [3])
    assert found.backend == ("" if backend == "tensorrt_plan" else backend)
    assert found.platform == ("tensorrt_plan" if backend == "tensorrt_plan" else "")
    assert list(found.input[0].dims) == list(given.shape)
    assert {found.input[0].data_type, found.output[0].data_type} == {schema.TYPE_FP32}
    group = found.instance_group[0]
    assert (schema.ModelInstanceGroup.Kind.Name(group.kind), group.count) == (KINDS[backend], 2)
    batching = found.dynamic_batching
    assert (batching.max_queue_delay_microseconds, list(batching.preferred_batch_size)) == (700, [])
    policy = batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (33, 250_000)
    assert policy.timeout_action == schema.ModelQueuePolicy.REJECT
    assert [(s.batch_size, s.inputs[found.input[0].name].input_data_file) for s in found.model_warmup] == [(1, "golden"), (32, "golden")]


def test_names_and_labels() -> None:
    found = parse(repository.config(release("digits"), "pytorch"))
    assert (found.input[0].name, found.output[0].name, list(found.output[0].dims)) == ("input", "probabilities", [10])
    assert found.output[0].label_filename == "labels.txt"


def test_trees() -> None:
    """FIL has names of its own, and of two classes it answers the second's probability alone, which has no place for two labels."""
    found = parse(repository.config(release("ai4i"), "fil"))
    assert (found.input[0].name, found.output[0].name, list(found.output[0].dims)) == ("input__0", "output__0", [1])
    assert found.output[0].label_filename == ""
    parameters = {key: value.string_value for key, value in found.parameters.items()}
    assert parameters == {"model_type": "xgboost_json", "is_classifier": "true", "predict_proba": "true", "threshold": "0.5"}
    many = parse(repository.config(release("ai4i", classes=("a", "b", "c")), "fil"))
    assert (list(many.output[0].dims), many.output[0].label_filename) == ([3], "labels.txt")


def test_profiles_of_a_plan() -> None:
    found = parse(repository.config(release("cifar10"), "tensorrt_plan", profiles=(1, 8, 32)))
    assert list(found.dynamic_batching.preferred_batch_size) == [1, 8, 32]
    assert list(found.instance_group[0].profile) == ["0", "1", "2"]
    one = parse(repository.config(release("cifar10"), "tensorrt_plan", profiles=(32,)))
    assert (list(one.dynamic_batching.preferred_batch_size), list(one.instance_group[0].profile)) == ([], [])


@pytest.mark.parametrize(
    ("recipe", "backend", "sources"),
    [("digits", "python", [True, True]), ("ai4i", "onnxruntime", [True, True]), ("ai4i", "python", [])],
    ids=["zeros that the server takes", "a server that checks nothing", "zeros out of range"],
)
def test_warm_up_without_a_golden_input(recipe: str, backend: Backend, sources: list[bool]) -> None:
    found = parse(repository.config(release(recipe), backend))
    assert [sample.inputs["input"].zero_data for sample in found.model_warmup] == sources


def test_a_queue_has_an_end_where_triton_can_keep_it() -> None:
    """With one instance a queue policy makes Triton miss requests for half a second; see ``config._batching``."""
    one = parse(repository.config(release("digits", serving=dataclasses.replace(BOUNDED, instances=1))))
    assert one.HasField("dynamic_batching")
    assert not one.dynamic_batching.HasField("default_queue_policy")
    two = parse(repository.config(release("digits")))
    assert two.dynamic_batching.HasField("default_queue_policy")
    assert [config.bounded(Serving(instances=n)) for n in (1, 2)] == [False, True]


def test_without_dynamic_batching() -> None:
    tensor = Tensor(name="x", dims=(3,))
    found = parse(
        config.text(
            Model(name="m", version="1", backend="python", max_batch=4, input=tensor, output=tensor, serving=BOUNDED, batching=False)
        )
    )
    assert not found.HasField("dynamic_batching")


@pytest.mark.parametrize(("backend", "kind"), [("python", "TYPE_STRING"), ("tensorrt_plan", "TYPE_UINT8"), ("onnxruntime", "TYPE_UINT8")])
def test_ensemble(backend: Backend, kind: str) -> None:
    given = release("cifar10")
    model, first, both = (
        parse(t) for t in (repository.config(given, backend), ensemble.step_config(given, backend), ensemble.config(given, backend))
    )
    assert (model.name, first.name, both.name) == ("cifar10", "cifar10_preprocess", "cifar10_image")
    assert {m.max_batch_size for m in (model, first, both)} == {32}
    assert [list(m.version_policy.specific.versions) for m in (model, first, both)] == [[3], [3], [3]]
    assert first.backend == ("python" if backend == "python" else "dali")
    assert schema.DataType.Name(both.input[0].data_type) == kind
    assert (both.input[0].name, both.input[0].data_type, list(both.input[0].dims)) == (
        first.input[0].name, first.input[0].data_type, list(first.input[0].dims),
    )  # fmt: skip
    assert first.input[0].allow_ragged_batch == (kind == "TYPE_UINT8")
    assert (both.output[0].label_filename, list(both.output[0].dims)) == ("labels.txt", [10])
    fed, asked = both.ensemble_scheduling.step
    assert [(s.model_name, s.model_version) for s in (fed, asked)] == [("cifar10_preprocess", 3), ("cifar10", 3)]
    # Each step's names are the model's, and what the first gives is what the second takes: in name, type and shape.
    assert set(fed.input_map) == {first.input[0].name}
    assert set(fed.output_map) == {first.output[0].name}
    assert set(asked.input_map) == {model.input[0].name}
    assert set(asked.output_map) == {model.output[0].name}
    assert fed.output_map[first.output[0].name] == asked.input_map[model.input[0].name]
    assert (first.output[0].data_type, list(first.output[0].dims)) == (model.input[0].data_type, list(model.input[0].dims))


@pytest.mark.parametrize(("device", "kind"), [("gpu", "KIND_GPU"), ("cpu", "KIND_CPU")])
def test_where_dali_decodes(device: Any, kind: str) -> None:
    group = parse(ensemble.step_config(release("cifar10"), "tensorrt_plan", device)).instance_group[0]
    assert (schema.ModelInstanceGroup.Kind.Name(group.kind), group.count) == (kind, 1)


@pytest.mark.parametrize(
    "mistake", ["max_batchsize: 3", "instance_group [ { kind: KIND_TPU } ]", 'output [ { name: "x" data_type: FP32 } ]']
)
@pytest.mark.parametrize(("backend", "recipe"), MODELS)
def test_a_mistake_is_no_config(backend: Backend, recipe: str, mistake: str) -> None:
    """Must fail: the schema sees a misspelt field, and a value that there is none of."""
    with pytest.raises(text_format.ParseError):
        parse(f"{repository.config(release(recipe), backend)}{mistake}\n")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("dynamic_batching {", "dynamic_batching { preferred_batch_size: [ 99 ]"),
        ("data_type: TYPE_FP32 dims: [10]", "dims: [10]"),
        ('backend: "python"', 'backend: "python" platform: "onnxruntime_onnx"'),
        ("zero_data: true", ""),
        ('key: "input"', 'key: "inputs"'),
    ],
)
def test_what_only_triton_would_refuse(old: str, new: str) -> None:
    """Must fail: the test's own checks."""
    text = repository.config(release("digits"))
    assert old in text
    with pytest.raises(AssertionError):
        parse(text.replace(old, new))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a backend that there is none of": ({"backend": "tflite"}, "field backend.*tensorrt_plan"),
    "a version that is no folder": ({"version": "v3"}, "field version"),
    "version nought": ({"version": "0"}, "field version"),
    "no batch": ({"max_batch": 0}, "field max_batch"),
    "a place that there is none of": ({"kind": "KIND_TPU"}, "field kind"),
    "profiles where there are none": ({"profiles": (1, 4)}, "profiles of backend tensorrt_plan"),
    "profiles out of order": ({"backend": "tensorrt_plan", "profiles": (4, 1)}, "ascending"),
    "a profile beyond the batch": ({"backend": "tensorrt_plan", "profiles": (1, 16)}, "1 to 8"),
}


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_wrong_models_are_refused(case: str) -> None:
    changes, message = WRONG[case]
    tensor = Tensor(name="x", dims=(3,))
    given: dict[str, Any] = {
        "name": "m", "version": "1", "backend": "python", "max_batch": 8, "input": tensor, "output": tensor, "serving": Serving(),
    }  # fmt: skip
    parse(config.text(Model(**given)))
    with pytest.raises(BadInput, match=message):
        Model(**{**given, **changes})


def test_every_backend_has_a_place_and_a_file() -> None:
    assert set(config.KINDS) == set(config.FILES) == set(get_args(Backend))


def test_trees_take_no_images() -> None:
    with pytest.raises(BadInput, match="trees"):
        repository.config(release("digits"), "fil")


def test_an_ensemble_takes_no_rows() -> None:
    with pytest.raises(BadInput, match="images"):
        ensemble.files(release("ai4i"))
