"""Receipts: the JSON record that every stage leaves in the lake. Their JSON Schema is ``receipt.schema.json``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from forja.errors import BadInput
from forja.lake import Lake, canonical, sha256

SCHEMA = 1
READABLE = (1,)
"""Schemas that this code reads: its own and the one before, once there is one."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """One object that a stage wrote."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Input:
    """One thing that a stage read: a receipt's path or a table version, with the digest of its content."""

    ref: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What one stage did."""

    stage: str
    recipe: str
    team: str
    key: str
    """Digest of inputs, recipe parts and code; equal keys mean equal work."""
    code: str
    """Digest of the stage's import closure and its lock."""
    command: str
    """Command that reproduces it."""
    inputs: dict[str, list[Input]]
    outputs: dict[str, Output]
    metrics: dict[str, float]
    """Measured numbers."""
    facts: dict[str, Any]
    """What is true now because of the stage: versions, offsets, verdicts. A number that nothing measured is null."""
    report: list[str]
    """Lines for people."""
    versions: dict[str, str]
    """Libraries that did the work."""
    started: str
    finished: str
    seconds: float
    variant: str = ""
    schema: int = SCHEMA
    path: str = field(default="", compare=False)
    """Where it lies in the lake; not part of the file."""

    @property
    def digest(self) -> str:
        """Digest of the outputs' content: what the key of a stage that reads them depends on."""
        return sha256(canonical({name: output.sha256 for name, output in self.outputs.items()}))

    def output(self, name: str) -> Output:
        """The output called ``name``; BadInput when there is none."""
        if name not in self.outputs:
            raise BadInput(f"output of {self.stage} receipt {self.path}", value=name, allowed=", ".join(self.outputs))
        return self.outputs[name]

    def to_json(self) -> bytes:
        """The file's bytes."""
        body = dataclasses.asdict(self)
        del body["path"]
        return json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False).encode()


def parse(data: bytes, path: str) -> Receipt:
    """Read a receipt.

    Raises:
        BadInput: not JSON, not a receipt, or of a schema that this code doesn't read.
    """
    try:
        body = json.loads(data)
        schema = body["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{path} is no receipt", value=str(error)) from error
    if schema not in READABLE:
        raise BadInput(f"schema of receipt {path}", value=schema, allowed=str(READABLE), do="use the Forja version that wrote it")
    try:
        body["inputs"] = {name: [Input(**item) for item in items] for name, items in body["inputs"].items()}
        body["outputs"] = {name: Output(**item) for name, item in body["outputs"].items()}
        return Receipt(**body, path=path)
    except (TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{path} is no receipt of schema {schema}", value=str(error)) from error


def load(lake: Lake, path: str) -> Receipt:
    """The receipt at ``path``; Damaged when it isn't there."""
    return parse(lake.get(path), path)


CHECKED_BYTES = 1 << 20
"""Size up to which an output's content is checked before adoption; of a larger one the size is, and its reader checks the rest."""


def intact(lake: Lake, receipt: Receipt) -> bool:
    """Whether all outputs are there."""
    return all(lake.size(o.path) == o.bytes and (o.bytes > CHECKED_BYTES or lake.holds(o.path, o.sha256)) for o in receipt.outputs.values())


def place(team: str, recipe: str, stage: str, key: str) -> str:
    """Folder of a receipt and its outputs."""
    return f"{team}/{recipe}/{stage}/{key}"


def newest(lake: Lake, team: str, recipe: str, stage: str, variant: str = "") -> Receipt | None:
    """The receipt of a stage that finished last: for people and summaries, never for a stage."""
    paths = [p for p in lake.list(f"{team}/{recipe}/{stage}") if p.rpartition("/")[2].startswith("receipt")]
    found = [r for r in (load(lake, p) for p in paths) if not variant or r.variant == variant]
    return max(found, key=lambda r: r.finished, default=None)
