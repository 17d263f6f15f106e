"""Bundles: all that a device needs of one model, as files, as a signed manifest and as one archive.

Everything here is a function of what it is given: equal inputs give equal bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forja.edge import deepstream
from forja.edge.files import trust
from forja.edge.signing import Signer
from forja.edge.targets import Target, flags
from forja.errors import BadInput
from forja.lake import canonical, sha256
from forja.recipes.base import Images, Table
from forja.serving.repository import INPUT, OUTPUT, preprocess

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FILES = Path(__file__).parent / "files"
SCRIPTS = ("trust.py", "verify.py", "infer.py", "runtime.py", "update.py", "build.sh", "setup.sh")
TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2, "int8": 5e-2, "mixed": 5e-2}
"""Largest difference of a probability from its golden answer, for each variant: other kernels sum and round in another order."""
VALID_DAYS = 365
"""Days after which a bundle is no longer installed; ``./forja edge bundle --renew`` signs it anew."""


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Validation samples with the answers that the gate judged."""

    inputs: NDArray[np.float32]
    """float32 [N, *shape], raw."""
    outputs: NDArray[np.float32]
    """float32 [N, classes], probabilities."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a bundle is made of, but for its place in the line of versions."""

    team: str
    recipe: str
    target: Target
    variant: str
    """What the gate passed; ``targets.carried`` says which file that means."""
    dataset: Images | Table
    model: bytes
    """ONNX at the target's opset and IR."""
    golden: Golden
    max_batch: int
    plan: bytes = b""
    """Engine built ahead of time, for targets that take one."""
    tensorrt: tuple[str, str] = ("", "")
    """Oldest TensorRT that may load it, and the first that is too new."""
    facts: Mapping[str, Any]
    """For people and tools, in the manifest: model version, receipts, numbers of the gate, what was not measured."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a bundle stands in the line of those of its recipe and target."""

    version: int
    """Counts up by one; devices refuse a smaller one."""
    created: str
    """UTC, ``2026-11-24T20:00:00Z``."""
    expires: str
    previous: Mapping[str, Any] | None
    """Version, manifest digest and path of the bundle before, for the way back."""


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """A finished bundle."""

    manifest: bytes
    signature: bytes
    archive: bytes
    """.tar.gz."""

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest: what receipts and indexes name a bundle by."""
        return sha256(self.manifest)


def files(content: Content, public_pem: bytes) -> dict[str, bytes]:
    """All files but the manifest and its signature, by their paths in the bundle."""
    dataset = content.dataset
    if wrong := [c for c in dataset.classes if c != c.strip() or "\n" in c or not c]:
        raise BadInput("class names of a bundle", value=wrong, allowed="one line each, no space around them")
    names = [dataset.classes[int(i)] for i in content.golden.outputs.argmax(axis=1)]
    found = {name: (FILES / name).read_bytes() for name in SCRIPTS} | {
        "model.onnx": content.model,
        "labels.txt": "".join(f"{c}\n" for c in dataset.classes).encode(),
        "preprocess.json": _json(rules(dataset)),
        "golden/inputs.npy": npy(content.golden.inputs),
        "golden/outputs.npy": npy(content.golden.outputs),
        "golden/labels.json": _json(names),
        "bundle.env": environment(content).encode(),
        "signer.pub.pem": public_pem,
        "README.txt": _readme(content).encode(),
        "LICENSES.txt": _licences(content).encode(),
    }
    if content.plan:
        found["engine.plan"] = content.plan
    if isinstance(dataset, Images) and content.target.runtime == "tensorrt":
        found |= deepstream.files(content.target, dataset, content.variant, content.max_batch)
    return found


def rules(dataset: Images | Table) -> dict[str, Any]:
    """What one input is and how it is made: preprocess.json."""
    found = {**preprocess(dataset), "shape": list(dataset.shape), "input": INPUT, "dtype": "float32", "normalisation": "inside the model"}
    if isinstance(dataset, Images):
        found |= {
            "colour": "RGB" if dataset.channels == 3 else "grey", "resize": "to height x width, aspect ratio not kept",
            "interpolation": "linear with antialiasing, border pixels repeated (DALI fn.resize, antialias=True)",
        }  # fmt: skip
    return found


def environment(content: Content) -> str:
    """bundle.env: what the shell scripts read, one NAME=value a line."""
    target, shape = content.target, "x".join(map(str, content.dataset.shape))
    values: dict[str, object] = {
        "TARGET": target.name, "RUNTIME": target.runtime, "VARIANT": content.variant, "INPUT": INPUT, "SHAPE": shape,
        "MAX_BATCH": content.max_batch, "WORKSPACE_MIB": target.workspace_mib, "TENSORRT_MIN": content.tensorrt[0],
        "TENSORRT_BELOW": content.tensorrt[1], "FLAGS": " ".join(flags(target, content.variant)), "MODES": " ".join(target.modes),
        "NVPMODEL": "" if target.nvpmodel is None else target.nvpmodel, "SWAP_MIB": target.swap_mib,
    }  # fmt: skip
    return "".join(f"{name}={value}\n" for name, value in values.items())


def manifest(content: Content, place: Place, contents: Mapping[str, bytes], key_id: str) -> dict[str, Any]:
    """The manifest's object."""
    target = content.target
    return {
        "kind": trust.BUNDLE, "schema": trust.SCHEMA, "team": content.team, "recipe": content.recipe, "target": target.name,
        "title": target.title, "version": place.version, "created": place.created, "expires": place.expires,
        "previous": dict(place.previous) if place.previous else None, "key_id": key_id,
        "variant": content.variant, "runtime": target.runtime, "models": list(target.models), "python": list(target.python),
        "tensorrt": {"min": content.tensorrt[0], "below": content.tensorrt[1]} if content.tensorrt[0] else None,
        "compute_capability": target.compute_capability,
        "input": {"name": INPUT, "shape": list(content.dataset.shape), "dtype": "float32"},
        "output": {"name": OUTPUT, "dtype": "float32"}, "classes": list(content.dataset.classes),
        "batch": {"min": 1, "max": content.max_batch}, "tolerance": TOLERANCE[content.variant],
        "files": {name: {"sha256": sha256(data), "bytes": len(data)} for name, data in sorted(contents.items())},
        **content.facts,
    }  # fmt: skip


def seal(content: Content, place: Place, signer: Signer) -> Sealed:
    """The bundle, signed."""
    contents = files(content, signer.public_pem)
    return signed(manifest(content, place, contents, signer.key_id), contents, signer)


def signed(body: Mapping[str, Any], contents: Mapping[str, bytes], signer: Signer) -> Sealed:
    """A bundle of this manifest and these files."""
    data = canonical(body) + b"\n"
    signature = signer.sign(data)
    everything = {**contents, trust.MANIFEST: data, trust.SIGNATURE: signature}
    archive = pack(everything, f"{body['recipe']}-{body['target']}-{body['version']:06d}")
    return Sealed(manifest=data, signature=signature, archive=archive)


def pack(contents: Mapping[str, bytes], folder: str) -> bytes:
    """A .tar.gz with the files below one folder: sorted, no times, no owners."""
    buffer = io.BytesIO()
    zipped = gzip.GzipFile(filename="", fileobj=buffer, mode="wb", mtime=0, compresslevel=6)
    with zipped, tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in sorted(contents.items()):
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size, info.mode = len(data), 0o755 if name.endswith((".sh", ".py")) else 0o644
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def npy(array: NDArray[np.float32]) -> bytes:
    """An array as a .npy file, float32."""
    import numpy

    buffer = io.BytesIO()
    numpy.save(buffer, numpy.ascontiguousarray(array, dtype=numpy.float32), allow_pickle=False)
    return buffer.getvalue()


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _readme(content: Content) -> str:
    target = content.target
    return f"""{content.team}/{content.recipe} for {target.title}

The first bundle of a device is checked by hand, with the public key that you got by a way you trust (not with signer.pub.pem, which is in
here for information):

    openssl dgst -sha256 -verify KEY.pem -signature manifest.sig manifest.json
    mkdir -p /etc/forja-edge/keys && cp KEY.pem /etc/forja-edge/keys/
    python3 trust.py .                   # digests of all files, against the manifest

Then:

    sudo ./setup.sh                      # power mode, clocks, swap; --dry-run says what, --undo takes it back
    sudo ./build.sh                      # the engine, where one has to be built
    sudo python3 verify.py               # golden samples and speed on this device; work/receipt.json goes back to who made this
    python3 infer.py FILE...

Needs: Linux, openssl, Python {target.python[0]}.{target.python[1]} or newer, numpy, {_needs(content)}.
Device notes: deep-learning accelerators: {target.dla or "not known"}. This bundle doesn't use them.
"""


def _needs(content: Content) -> str:
    if content.target.runtime == "onnxruntime":
        return "onnxruntime 1.12 or newer"
    name = "TensorRT-RTX" if content.target.runtime == "tensorrt-rtx" else "TensorRT"
    return f"{name} {content.tensorrt[0]} or newer and older than {content.tensorrt[1]}, the CUDA runtime"


def _licences(content: Content) -> str:
    engine = "engine.plan was built by NVIDIA TensorRT-RTX, under its licence.\n" if content.plan else ""
    return f"""Scripts (.py, .sh): Forja, Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0
model.onnx, golden/: belong to the team {content.team}; ask it before you pass them on.
{engine}No NVIDIA library is in this bundle: TensorRT may be passed on only under its own agreement, and the device has it from JetPack.
"""
