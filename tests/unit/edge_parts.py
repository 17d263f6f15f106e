"""What the tests of the edge share: a model of 269 bytes, a bundle of it, and a device to lay it on."""

from __future__ import annotations

import base64
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from forja.edge import bundle, depot, signing, simulate, targets
from forja.edge.bundle import Content, Golden, Place, Sealed
from forja.edge.files import trust
from forja.edge.signing import Signer
from forja.lake import Lake, canonical, sha256
from forja.recipes.base import Images

MODEL = base64.b64decode(
    "CAcSADqAAgojCgVpbnB1dBIEZmxhdCIHRmxhdHRlbioLCgRheGlzGAGgAQIKJgoEZmxhdAoBdxIGbG9naXRzIgRHZW1tKg0KBnRyYW5zQhgBoAECCi0KBmxvZ2l0cxIN"
    "cHJvYmFiaWxpdGllcyIHU29mdG1heCoLCgRheGlzGAGgAQISAW0qOwgDCAQQAUIBd0owzcxMPQAAAAAAAAAAAAAAAAAAAADNzEw9AAAAAAAAAAAAAAAAAAAAAM3MTD0AAAAA"
    "WiAKBWlucHV0EhcKFQgBEhEKAxIBbgoCCAEKAggCCgIIAmIgCg1wcm9iYWJpbGl0aWVzEg8KDQgBEgkKAxIBbgoCCANCBAoAEA0="
)
"""Softmax over 0.05 times each of the first three of four pixels: float32 [N, 1, 2, 2] to [N, 3], opset 13, IR 7; made with onnx.helper."""
CLASSES = ("cat", "dog", "owl")
DATASET = Images(height=2, width=2, channels=1, classes=CLASSES)
LINE = depot.Line(team="vision", recipe="digits", target="cpu")
"""In the lake; the recipe is one that exists, since commands load it."""


def golden() -> Golden:
    """Six samples, two of each class, with the answers that the model must give."""
    inputs = np.zeros((6, 1, 2, 2), np.float32)
    for i in range(6):
        inputs[i, 0, (i % 3) // 2, (i % 3) % 2] = 100 + 20 * (i // 3)
    logits = 0.05 * inputs.reshape(6, 4)[:, :3]
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return Golden(inputs=inputs, outputs=(powers / powers.sum(axis=1, keepdims=True)).astype(np.float32))


def content(target: str = "cpu", variant: str = "fp32", **changes: Any) -> Content:
    kind = targets.find(target)
    made = Content(
        team="vision", recipe="digits", target=kind, variant=variant, dataset=DATASET, model=MODEL, golden=golden(), max_batch=4,
        tensorrt=kind.tensorrt, facts={"model_version": "1", "receipts": {}},
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def place(version: int = 1, created: str = "2026-01-01T00:00:00Z", expires: str = "2998-01-01T00:00:00Z") -> Place:
    return Place(version=version, created=created, expires=expires, previous=None)


def sealed(signer: Signer, version: int = 1, **changes: Any) -> Sealed:
    return bundle.seal(content(**changes), place(version), signer)


def stored(lake: Lake, signer: Signer, work: str = "a", **changes: Any) -> depot.Stored:
    """A bundle in the lake, with the next version."""
    line = dataclasses.replace(LINE, target=changes.get("target", "cpu"))
    spot = depot.allocate(lake, line, f"{work}:{signer.key_id}")
    depot.store(lake, line, spot.version, bundle.seal(content(**changes), spot, signer))
    return depot.bundle(lake, line, spot.version)


class Device:
    """Folders that stand for a device: its keys, its state, and one bundle laid out."""

    def __init__(self, folder: Path, *public: bytes, python: str = sys.executable) -> None:
        self.folder, self.python = folder, python
        self.etc, self.var, self.bundle = folder / "etc", folder / "var", folder / "bundle"
        (self.etc / "keys").mkdir(parents=True)
        for number, pem in enumerate(public):
            (self.etc / "keys" / f"{number}.pem").write_bytes(pem)

    def lay(self, archive: bytes) -> dict[str, bytes]:
        """Unpack a bundle; its files."""
        contents = simulate.opened(archive)
        for name, data in contents.items():
            path = self.bundle / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.chmod(0o755 if name.endswith((".py", ".sh")) else 0o644)
        return contents

    def sign(self, key: Signer, **fields: Any) -> None:
        """Sign the bundle as it lies here, with other fields in its manifest."""
        paths = [p for p in self.bundle.rglob("*") if p.is_file() and p.name not in (trust.MANIFEST, trust.SIGNATURE)]
        listed = {str(p.relative_to(self.bundle)): p.read_bytes() for p in paths}
        body = json.loads((self.bundle / trust.MANIFEST).read_text())
        body |= {"files": {n: {"sha256": sha256(d), "bytes": len(d)} for n, d in listed.items()}, **fields}
        (self.bundle / trust.MANIFEST).write_bytes(canonical(body))
        (self.bundle / trust.SIGNATURE).write_bytes(key.sign(canonical(body)))

    def check(self, now: float | None = None) -> dict[str, Any]:
        """What trust says of the bundle."""
        return trust.check(str(self.bundle), str(self.etc), str(self.var), now)

    @property
    def options(self) -> list[str]:
        return ["--etc", str(self.etc), "--var", str(self.var)]

    def run(self, script: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a script of the bundle with nothing of this process's environment but the PATH."""
        command = [self.python, "-B"] if script.endswith(".py") else ["sh"]
        base = {"PATH": "/usr/bin:/bin", "HOME": str(self.folder), "FORJA_EDGE_MODEL": str(self.folder / "none")}
        return subprocess.run(
            [*command, str(self.bundle / script), *arguments], env={**base, **(env or {})}, capture_output=True, text=True, check=False,
        )  # fmt: skip


def signer() -> Signer:
    return signing.new()
