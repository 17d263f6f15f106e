"""Lineage: the receipts behind a release, found by following their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from forja import receipts
from forja.lake import Lake
from forja.receipts import Receipt
from forja.recipes.base import VARIANTS


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """What a release was made from."""

    gate: Receipt
    optimize: list[Receipt]
    model: Receipt
    training: Receipt
    dataset: Receipt
    raw: str
    """Version of the raw table."""

    def variants(self) -> list[dict[str, Any]]:
        """Numbers and engine of each variant, fp32 first."""
        ordered = sorted(self.optimize, key=lambda r: VARIANTS.index(r.variant))
        judged = self.gate.facts["variants"]
        return [{"variant": r.variant, "metrics": r.metrics | judged[r.variant], "engine": r.facts["engine"]} for r in ordered]


def of_release(lake: Lake, release: Receipt) -> Lineage:
    """Everything behind a release receipt."""
    gate = receipts.load(lake, release.inputs["gate"][0].ref)
    optimize = [receipts.load(lake, item.ref) for item in gate.inputs["optimize"]]
    model = receipts.load(lake, release.inputs["model"][0].ref)
    training = receipts.load(lake, model.inputs["training"][0].ref)
    dataset = receipts.load(lake, training.inputs["dataset"][0].ref)
    return Lineage(gate=gate, optimize=optimize, model=model, training=training, dataset=dataset, raw=dataset.inputs["raw"][0].ref)
