"""Checks of recipe fields, with the error that names the field. Only the standard library: DAG files import recipes."""

from __future__ import annotations

import functools
import math
import types
import typing
from typing import Any

from forja.errors import BadInput


class Checked:
    """Base of the parts of a recipe: refuses values of another type than the field says, text for a number above all."""

    def __post_init__(self) -> None:
        owner: Any = type(self)
        for name, kind in _kinds(owner).items():
            value = getattr(self, name)
            fits = isinstance(value, kind) and not (isinstance(value, bool) and bool not in kind)
            check(fits, self, name, value, " or ".join(k.__name__ for k in kind))
            check(not isinstance(value, float) or math.isfinite(value), self, name, value, "a finite number")


@functools.cache
def _kinds(owner: Any) -> dict[str, tuple[type, ...]]:
    """Types that each plain field takes; an int is a float too."""
    found = {}
    for name, hint in typing.get_type_hints(owner).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if all(option in (int, float, str, bool, type(None)) for option in options):
            found[name] = (*options, int) if float in options else options
    return found


def check(ok: bool, owner: object, name: str, value: object, allowed: str) -> None:
    """Raise BadInput for field ``name`` of ``owner`` unless ``ok``."""
    if not ok:
        raise BadInput(
            f"recipe field {type(owner).__name__}.{name}",
            value=value,
            allowed=allowed,
            do="correct the field in include/forja/recipes/",
        )
