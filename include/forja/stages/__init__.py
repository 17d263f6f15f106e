"""The stages, one module a verb."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol, cast

from forja.errors import BadInput
from forja.recipes.base import STAGES, Recipe
from forja.stages.base import Inputs, Outcome, Plan, Stage, Work


class Module(Protocol):
    """Shape of a stage's module."""

    STAGE: Stage
    plan: Callable[[Recipe, Inputs, str], Plan[Any]]
    run: Callable[[Plan[Any], Work], Outcome]


def load(verb: str) -> Module:
    """The module of a stage; BadInput for an unknown verb."""
    if verb not in STAGES:
        raise BadInput("stage", value=verb, allowed=", ".join(STAGES))
    return cast(Module, importlib.import_module(f"{__name__}.{verb}"))
