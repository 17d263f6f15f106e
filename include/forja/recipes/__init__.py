"""The recipes: one file each, with one constant ``RECIPE``. Adding a file adds a recipe."""

from __future__ import annotations

import importlib
import pkgutil

from forja.errors import BadInput
from forja.recipes.base import Recipe


def names() -> tuple[str, ...]:
    """Names of all recipes, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base"))


def load(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        BadInput: no such recipe, or its file doesn't define ``RECIPE`` under that name.
    """
    if name not in names():
        raise BadInput("recipe", value=name, allowed=", ".join(names()), do="name one of these, or add include/forja/recipes/NAME.py")
    recipe = getattr(importlib.import_module(f"{__name__}.{name}"), "RECIPE", None)
    if not isinstance(recipe, Recipe) or recipe.name != name:
        raise BadInput(f"include/forja/recipes/{name}.py", value=recipe, allowed=f"a constant RECIPE = Recipe(name={name!r}, ...)")
    return recipe
