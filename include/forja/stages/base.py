"""What a stage is made of.

A stage is a module with three names: ``STAGE`` (a Stage: where it runs and how it repeats), ``plan(recipe, inputs, variant)``
(pure: says what it will read of the recipe) and ``run(plan, work)`` (the only part that touches the world).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from forja import receipts
from forja.errors import BadInput, Damaged
from forja.lake import Lake, sha256
from forja.receipts import Input, Output, Receipt
from forja.settings import Settings

P = TypeVar("P")
Inputs = Mapping[str, list[Input]]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where a stage runs and how it repeats."""

    environment: Literal["control", "ml"]
    repeat: Literal["memoised", "reconciled"]
    """memoised: equal keys are adopted. reconciled: it looks at the world each time and changes only what differs."""
    inputs: tuple[str, ...] = ()
    """Names of its inputs; each is a receipt, apart from ``raw``, a table version."""
    many: tuple[str, ...] = ()
    """Inputs that may be given more than once."""
    variants: bool = False
    """Whether it runs once for each variant."""
    hardware: bool = False
    """Whether its result depends on the GPU it runs on."""


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[P]):
    """What a stage will do: its part of the recipe and its inputs, nothing else. The key is a digest of this."""

    stage: str
    recipe: str
    team: str
    parts: P
    inputs: Inputs
    variant: str = ""

    def input(self, name: str) -> Input:
        """The one input called ``name``."""
        return self.inputs[name][0]


@dataclass(kw_only=True)
class Outcome:
    """What a stage did; the harness makes a receipt of it."""

    outputs: dict[str, Output] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    report: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    obsolete: list[str] = field(default_factory=list)
    """Objects in the lake that the receipt makes useless; they are removed once it is written."""
    refused: str = ""
    """Why a gate said no: the receipt is written as evidence, then the stage fails with Refused."""


@dataclass(kw_only=True)
class Work:
    """What ``run`` may use of the world."""

    settings: Settings
    lake: Lake
    folder: str
    """Folder in the lake of this work's outputs."""
    key: str
    scratch: Path
    """Local folder, empty at first and removed afterwards."""
    check: Callable[[], None]
    """Raises Conflict when another run took this work over."""
    previous: Receipt | None = None
    """What a reconciled stage did last with this very key, when its outputs are still there."""
    written: list[str] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """One line of progress, with the seconds since the start."""
        self.check()
        print(f"{time.monotonic() - self._began:7.1f} s  {text}", flush=True)

    def save(self, name: str, data: bytes | Path) -> Output:
        """Write an output once, named by its content."""
        content = data.read_bytes() if isinstance(data, Path) else data
        digest = sha256(content)
        path = f"{self.folder}/{digest[:12]}-{name}"
        if self.lake.create(path, content):
            self.written.append(path)
        elif not self.lake.holds(path, digest):
            self.lake.replace(path, content)  # damaged since: its name says what it must hold
        return Output(path=path, sha256=digest, bytes=len(content))

    def receipt(self, item: Input) -> Receipt:
        """The receipt that an input names."""
        return receipts.load(self.lake, item.ref)

    def load(self, receipt: Receipt, name: str) -> bytes:
        """An output of another stage, its digest checked."""
        output = receipt.output(name)
        try:
            return self.lake.read(output.path, output.sha256)
        except Damaged as error:
            raise Damaged(str(error), do=f"remove {receipt.path} from the lake and run its stage again: {receipt.command}") from error


def one_variant(variant: str, allowed: tuple[str, ...]) -> str:
    """``variant`` if the recipe makes it; BadInput otherwise."""
    if variant not in allowed:
        raise BadInput(
            "variant", value=variant, allowed=", ".join(allowed), do="pass --variant, or add it to the recipe's optimize.variants"
        )
    return variant
