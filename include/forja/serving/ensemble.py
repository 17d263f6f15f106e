"""Ensembles: a release that also answers images as they are, PNG or JPEG, so that a client needs nothing but the file.

    <model>_image = <model>_preprocess (bytes to float32 [C, H, W]) + <model>

All three lie in one release and have its version. On the bundled server the first step runs in the python backend (Pillow); for
NVIDIA's image it is a DALI pipeline. Both give what forja.loading gives on the client's side, see files/preprocess.py.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

from forja.errors import BadInput
from forja.serving.config import LABELS, Backend, Model, Tensor, text
from forja.serving.repository import INPUT, MODELS, OUTPUT, PREPROCESS, PYTHON, Release

IMAGE = "image"
"""Input of the ensemble and of its first step."""
DALI_THREADS = 4
"""Threads of DALI's pipeline; of an image on a GPU they decode what the GPU's decoder doesn't."""


def name(model: str) -> str:
    """The model that takes images."""
    return f"{model}_image"


def step(model: str) -> str:
    """The model that turns an image into ``model``'s input."""
    return f"{model}_preprocess"


def files(release: Release, backend: Backend = "python", device: Literal["cpu", "gpu"] = "gpu") -> dict[str, bytes]:
    """What the release needs beside ``repository.files`` to take images, by path in its folder.

    Args:
        backend: of the release's own model: ``python`` for the bundled server, any other for NVIDIA's image.
        device: where NVIDIA's image decodes.

    Raises:
        BadInput: its inputs are no images.
    """
    if release.preprocess.get("kind") != "image":
        raise BadInput(f"inputs of {release.model}", value=release.preprocess.get("kind"), allowed="images")
    first, both = f"{MODELS}/{step(release.model)}", f"{MODELS}/{name(release.model)}"
    labels = "".join(f"{c}\n" for c in release.classes).encode()
    version, python = release.version, backend == "python"
    found = {
        f"{first}/config.pbtxt": step_config(release, backend, device).encode(),
        f"{both}/config.pbtxt": config(release, backend).encode(),
        f"{both}/{LABELS}": labels,
        # Triton wants a folder for the version of an ensemble, and a folder without a file can't be kept.
        f"{both}/{version}/{LABELS}": labels,
    }
    if python:
        described = json.dumps({**release.preprocess, "shape": list(release.shape)}, indent=1).encode()
        found[f"{first}/{version}/{PREPROCESS}"] = described
        found[f"{first}/{version}/model.py"] = (PYTHON / "preprocess.py").read_bytes()
        found[f"{first}/{version}/lifeline.py"] = (PYTHON / "lifeline.py").read_bytes()
    else:
        said = {"shape": list(release.shape), "max_batch": release.max_batch, "threads": DALI_THREADS, "device": device}
        found[f"{first}/{version}/pipeline.json"] = json.dumps(said, indent=1).encode()
        found[f"{first}/{version}/dali.py"] = (PYTHON / "dali.py").read_bytes()
    return found


def step_config(release: Release, backend: Backend = "python", device: Literal["cpu", "gpu"] = "gpu") -> str:
    """config.pbtxt of the first step: nothing is gained by waiting for a full batch, each image is decoded by itself.

    DALI takes bytes as uint8, and copies its memory for every instance: one is enough for it.
    """
    python = backend == "python"
    instances = release.serving.instances if python else 1
    return text(
        Model(
            name=step(release.model),
            version=release.version,
            backend="python" if python else "dali",
            max_batch=release.max_batch,
            input=_image(python),
            output=Tensor(name=INPUT, dims=release.shape),
            serving=dataclasses.replace(release.serving, delay_us=0, instances=instances),
            kind="KIND_CPU" if python or device == "cpu" else "KIND_GPU",
        )
    )


def config(release: Release, backend: Backend = "python") -> str:
    """config.pbtxt of the ensemble. Its steps name their version: what was proven together stays together."""
    image = _image(backend == "python")
    version = int(release.version)
    return f"""name: "{name(release.model)}"
platform: "ensemble"
max_batch_size: {release.max_batch}
version_policy {{ specific {{ versions: [ {version} ] }} }}
input [ {{ name: "{IMAGE}" data_type: {image.kind} dims: {list(image.dims)} }} ]
output [ {{ name: "{OUTPUT}" data_type: TYPE_FP32 dims: [{len(release.classes)}] label_filename: "{LABELS}" }} ]
ensemble_scheduling {{
  step [
    {{
      model_name: "{step(release.model)}"
      model_version: {version}
      input_map {{ key: "{IMAGE}" value: "{IMAGE}" }}
      output_map {{ key: "{INPUT}" value: "pixels" }}
    }},
    {{
      model_name: "{release.model}"
      model_version: {version}
      input_map {{ key: "{INPUT}" value: "pixels" }}
      output_map {{ key: "{OUTPUT}" value: "{OUTPUT}" }}
    }}
  ]
}}
"""


def _image(python: bool) -> Tensor:
    return Tensor(name=IMAGE, dims=(1,), kind="TYPE_STRING") if python else Tensor(name=IMAGE, dims=(-1,), kind="TYPE_UINT8", ragged=True)
