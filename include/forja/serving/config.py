"""Triton's config.pbtxt, generated: what a model takes and answers, how its requests are queued and batched, what warms it up.

Field names: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from forja.errors import BadInput
from forja.recipes.base import Serving

Backend = Literal["python", "onnxruntime", "tensorrt_plan", "pytorch", "fil", "dali"]
"""``python`` is what the bundled server has; the others are those of NVIDIA's image (``fil`` answers with XGBoost's trees)."""
KINDS: Mapping[Backend, str] = {
    "python": "KIND_CPU", "onnxruntime": "KIND_AUTO", "tensorrt_plan": "KIND_GPU", "pytorch": "KIND_AUTO", "fil": "KIND_AUTO",
    "dali": "KIND_GPU",
}  # fmt: skip
"""Where the instances of a backend run. ``KIND_AUTO``: on each GPU, or on the CPU where there is none."""
FILES: Mapping[Backend, str] = {
    "python": "model.onnx", "onnxruntime": "model.onnx", "tensorrt_plan": "model.plan", "pytorch": "model.pt", "fil": "xgboost.json",
    "dali": "dali.py",
}  # fmt: skip
"""Name under which a backend looks for the model in its version folder; for ``python`` the name that our model.py opens."""
LABELS = "labels.txt"
WARMUP = "warmup"
"""Folder beside the versions where Triton looks for the data of a warm-up."""
GOLDEN = "golden"
"""Name of the file in it: one sample, as bytes."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or an output."""

    name: str
    dims: tuple[int, ...]
    """Shape of one sample; -1 for a length that differs."""
    kind: str = "TYPE_FP32"
    """Triton's name of its type."""
    labels: bool = False
    """Whether its elements have the names of labels.txt."""
    ragged: bool = False
    """Whether samples of different lengths may share a batch."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the configuration of one model says."""

    name: str
    version: str
    backend: Backend
    max_batch: int
    """Largest batch, in samples."""
    input: Tensor
    output: Tensor
    serving: Serving
    kind: str = ""
    """Where its instances run, if not where the backend's do: ``KIND_CPU``, ``KIND_GPU`` or ``KIND_AUTO``."""
    batching: bool = True
    """False for a model without a dynamic batcher: each request is a batch, and waits in a queue without an end."""
    profiles: tuple[int, ...] = ()
    """Batch size that each optimisation profile of a TensorRT plan is tuned for; one profile needs no mention."""
    warmup: Literal["", "zero", "golden"] = ""
    """What warms it up before it is ready: nothing, zeros, or the sample in warmup/golden."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Settings of the backend's own."""

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise BadInput(f"configuration of model {self.name}: field {name}", value=getattr(self, name), allowed=allowed)

        check(self.backend in KINDS, "backend", ", ".join(get_args(Backend)))
        check(self.version.isdigit() and int(self.version) > 0, "version", "a whole number from 1 on, the name of its folder")
        check(self.max_batch >= 1, "max_batch", "1 or more samples")
        check(self.kind in ("", "KIND_CPU", "KIND_GPU", "KIND_AUTO"), "kind", "KIND_CPU, KIND_GPU or KIND_AUTO")
        # Elsewhere a preferred size only makes requests wait: the largest batch that is there is always best.
        check(not self.profiles or self.backend == "tensorrt_plan", "profiles", "optimisation profiles of backend tensorrt_plan alone")
        check(
            list(self.profiles) == sorted(set(self.profiles)) and all(1 <= p <= self.max_batch for p in self.profiles),
            "profiles", f"ascending batch sizes from 1 to {self.max_batch}",
        )  # fmt: skip


def bounded(serving: Serving) -> bool:
    """Whether Triton's queue has an end: see ``_batching``."""
    return serving.instances > 1


def text(model: Model) -> str:
    """config.pbtxt of a model: inputs and outputs with labels, one version, instances, dynamic batching, warm-up."""
    lines = [
        f"name: {_quoted(model.name)}",
        f'platform: "{model.backend}"' if model.backend == "tensorrt_plan" else f'backend: "{model.backend}"',
        f"max_batch_size: {model.max_batch}",
        f"version_policy {{ specific {{ versions: [ {int(model.version)} ] }} }}",
        f"input [ {{ {_tensor(model.input)} }} ]",
        f"output [ {{ {_tensor(model.output)} }} ]",
        f"instance_group [ {{ {_instances(model)} }} ]",
        *_batching(model),
        *_warmup(model),
    ]
    for key, value in model.parameters.items():
        lines.append(f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}")
    return "\n".join(lines) + "\n"


def _tensor(tensor: Tensor) -> str:
    words = [f"name: {_quoted(tensor.name)}", f"data_type: {tensor.kind}", f"dims: {list(tensor.dims)}"]
    words += [f'label_filename: "{LABELS}"'] if tensor.labels else []
    words += ["allow_ragged_batch: true"] if tensor.ragged else []
    return " ".join(words)


def _instances(model: Model) -> str:
    profiles = f" profile: {json.dumps([str(i) for i in range(len(model.profiles))])}" if len(model.profiles) > 1 else ""
    return f"kind: {model.kind or KINDS[model.backend]} count: {model.serving.instances}{profiles}"


def _batching(model: Model) -> list[str]:
    """The dynamic batcher, and the end of its queue: what doesn't fit is refused, and so is what waited too long.

    With a queue policy Triton stops to prepare the next batch while one is computed, and wakes its batcher for a request only if an
    instance is idle at that very moment (core, ``RateLimiter::PayloadSlotAvailable``). With one instance that moment is missed again
    and again: of requests that a client sends one after the other, one in two hundred then waits for half a second, until the batcher
    looks by itself (measured with 2.51; none in 60,000 without a policy, or with a second instance). So one instance gets no policy.
    https://github.com/triton-inference-server/core/pull/237
    """
    if not model.batching:
        return []
    serving = model.serving
    preferred = [f"  preferred_batch_size: {list(model.profiles)}"] if len(model.profiles) > 1 else []
    delay = [f"  max_queue_delay_microseconds: {serving.delay_us}"] if serving.delay_us else []
    policy = [
        "  default_queue_policy {",
        f"    max_queue_size: {serving.queue}",
        "    timeout_action: REJECT",
        f"    default_timeout_microseconds: {serving.timeout_ms * 1000}",
        "  }",
    ]
    return ["dynamic_batching {", *preferred, *delay, *(policy if bounded(serving) else []), "}"]


def _warmup(model: Model) -> list[str]:
    """One sample and the largest batch; Triton repeats the sample to fill it. Kernels and memory for both exist when it is ready."""
    if not model.warmup:
        return []
    source = "zero_data: true" if model.warmup == "zero" else f'input_data_file: "{GOLDEN}"'
    value = f"data_type: {model.input.kind} dims: {list(model.input.dims)} {source}"
    entry = f"inputs {{ key: {_quoted(model.input.name)} value {{ {value} }} }}"
    return [f'model_warmup {{ name: "{model.warmup} {n}" batch_size: {n} {entry} }}' for n in sorted({1, model.max_batch})]


def _quoted(value: str) -> str:
    """A string of protobuf's text format, which escapes as JSON does."""
    return json.dumps(value, ensure_ascii=False)
