"""The newest inputs of a stage, for people who type ``forja stage`` without naming them. No stage reads this."""

from __future__ import annotations

from collections.abc import Mapping

from forja import receipts, stages
from forja.errors import BadInput
from forja.lake import Lake
from forja.receipts import Receipt
from forja.recipes.base import Recipe
from forja.stages.ingest import table_path

MAKER = {"dataset": "transform", "training": "train", "model": "register", "optimize": "optimize", "gate": "gate"}
"""Stage that makes each input."""


def inputs(lake: Lake, recipe: Recipe, verb: str, known: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """References of the inputs of ``verb`` that ``known`` doesn't name.

    Raises:
        BadInput: the stage before has not run.
    """
    kind = stages.load(verb).STAGE
    found: dict[str, list[str]] = {}
    for name in kind.inputs:
        if name in known:
            continue
        if name == "raw":
            path = table_path(recipe.team, recipe.name)
            found[name] = [f"{path}@{lake.table(path).version()}"]
        elif name == "optimize":
            found[name] = [_newest(lake, recipe, name, variant).path for variant in recipe.optimize.variants]
        else:
            found[name] = [_newest(lake, recipe, MAKER[name]).path]
    return found


def _newest(lake: Lake, recipe: Recipe, verb: str, variant: str = "") -> Receipt:
    receipt = receipts.newest(lake, recipe.team, recipe.name, verb, variant)
    if receipt is None:
        what = f"{verb} {variant}".strip()
        raise BadInput(
            f"receipt of {what} of {recipe.name}", allowed="a stage that has run",
            do=f"./forja stage {verb} --recipe {recipe.name}" + (f" --variant {variant}" if variant else ""),
        )  # fmt: skip
    return receipt
