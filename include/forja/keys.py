"""Keys: digests that name work. Equal keys mean the same inputs, the same parts of the recipe and the same code."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

from forja.errors import BadInput
from forja.lake import canonical, sha256
from forja.receipts import Input
from forja.settings import ROOT

LOCKS = {"control": ROOT / "requirements.txt", "ml": ROOT / "k8s" / "images" / "ml.txt"}
"""Lock of each environment that runs stages."""

PACKAGE = Path(__file__).parent


def plain(value: object) -> object:
    """JSON form of recipe parts; a dataclass carries its class name, so two kinds with equal fields differ."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__, **{f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return value


def stage_key(
    *, stage: str, recipe: str, variant: str, parts: object, inputs: Mapping[str, list[Input]], code: str, hardware: str = ""
) -> str:
    """Key of a stage's work, 32 hex digits: depends on the inputs' content, not on where they lie.

    Args:
        hardware: what ``engines.signature`` says of this machine, for a stage whose result depends on it.
    """
    body = {
        "stage": stage,
        "recipe": recipe,
        "variant": variant,
        "parts": plain(parts),
        "inputs": {name: [i.digest for i in items] for name, items in inputs.items()},
        "code": code,
        "hardware": hardware,
    }
    return sha256(canonical(body))[:32]


@functools.cache
def code_digest(module: str, environment: str) -> str:
    """SHA-256 over the sources that ``module`` imports from Forja, itself included, and the environment's lock."""
    digest = hashlib.sha256()
    for path in closure(module):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode())
        digest.update(path.read_bytes())
    lock = LOCKS[environment]
    if not lock.is_file():
        raise BadInput("lock of the environment", value=str(lock), do="run make lock")
    digest.update(lock.read_bytes())
    return digest.hexdigest()


def closure(module: str) -> list[Path]:
    """Files of ``module`` and of every Forja module that it imports, anywhere in the file, sorted.

    Found by reading the syntax tree, so it needs none of the libraries that the modules import.
    """
    found: dict[str, Path] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        path = _file(name)
        if path is None or name in found:
            continue
        found[name] = path
        todo += _imports(path)
        todo.append(name.rpartition(".")[0])
    return sorted(found.values())


def _file(module: str) -> Path | None:
    if module.partition(".")[0] != "forja":
        return None
    base = PACKAGE.joinpath(*module.split(".")[1:])
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((p for p in candidates if p.is_file()), None)


def _imports(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
