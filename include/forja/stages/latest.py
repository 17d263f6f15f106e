"""The inputs that a stage would have now, for people who type ``forja stage`` without naming them. No stage reads this."""

from __future__ import annotations

from collections.abc import Mapping

from forja import stages
from forja.errors import BadInput
from forja.lake import Lake
from forja.recipes.base import Recipe
from forja.stages import harness
from forja.stages.ingest import table_path


def inputs(lake: Lake, recipe: Recipe, verb: str, known: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """References of the inputs of ``verb`` that ``known`` doesn't name: what this recipe and code made of the newest raw table.

    Raises:
        BadInput: the stage before has not run on that.
    """
    found: dict[str, list[str]] = {}
    for name in stages.load(verb).STAGE.inputs:
        if name in known:
            continue
        if name == "raw":
            path = table_path(recipe.team, recipe.name)
            found[name] = [f"{path}@{lake.table(path).version()}"]
            continue
        maker = harness.MAKER[name]
        refs = inputs(lake, recipe, maker, {})
        variants = recipe.optimize.variants if stages.load(maker).STAGE.variants else ("",)
        found[name] = [_made(lake, recipe, maker, refs, variant) for variant in variants]
    return found


def _made(lake: Lake, recipe: Recipe, verb: str, refs: Mapping[str, list[str]], variant: str) -> str:
    prepared = harness.prepare(lake, verb, recipe, refs, variant)
    receipt = prepared.receipt or harness.last(lake, prepared.folder)
    if receipt is None:
        raise BadInput(f"receipt of {verb} {variant}".strip() + f" of {recipe.name}", allowed="a stage that has run", do=prepared.command)
    return receipt.path
