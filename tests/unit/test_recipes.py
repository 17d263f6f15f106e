"""Recipes refuse impossible fields, and say which."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from forja import recipes
from forja.errors import BadInput
from forja.recipes import base

DIGITS = recipes.load("digits")
AI4I = recipes.load("ai4i")

IMPOSSIBLE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "half an epoch": (DIGITS.training, {"epochs": 1.5}, "Training.epochs"),
    "text for a number": (DIGITS.training, {"epochs": "15"}, "Training.epochs"),
    "true for a number": (DIGITS.training, {"seed": True}, "Training.seed"),
    "not a number": (DIGITS.training, {"learning_rate": float("nan")}, "Training.learning_rate"),
    "a metric that nobody measures": (DIGITS.gates[0], {"metric": "acuracy"}, "Gate.metric"),
    "a limit that nothing passes": (DIGITS.gates[0], {"least": float("nan")}, "Gate.least"),
    "a negative drop": (DIGITS.gates[1], {"max_drop": -1.0}, "Gate.max_drop"),
    "a variant twice": (DIGITS.optimize, {"variants": ("fp32", "int8", "int8")}, "Optimize.variants"),
    "a GPU that the builder doesn't know": (DIGITS.optimize, {"compute_capability": "SM99"}, "Optimize.compute_capability"),
    "a clock in words": (DIGITS.triggers, {"schedule": "every day"}, "Triggers.schedule"),
    "a topic that is a folder": (DIGITS.source, {"topic": ".."}, "Source.topic"),
    "a feature without an expression": (AI4I.dataset.derived[0], {"sql": ""}, "Derived.sql"),
    "no epochs": (DIGITS.training, {"epochs": 0}, "Training.epochs"),
    "a batch that the ranks can't share": (DIGITS.training, {"batch_size": 63}, "Training.batch_size"),
    "a negative learning rate": (DIGITS.training, {"learning_rate": -1.0}, "Training.learning_rate"),
    "splits of more than everything": (DIGITS.dataset.split, {"test": 0.95}, "Split.test"),
    "two colours": (DIGITS.dataset, {"channels": 2}, "Images.channels"),
    "one class": (DIGITS.dataset, {"classes": ("0",)}, "Images.classes"),
    "the same class twice": (DIGITS.dataset, {"classes": ("0", "0")}, "Images.classes"),
    "a variant that nobody makes": (DIGITS.optimize, {"variants": ("fp32", "fp4")}, "Optimize.variants"),
    "no fp32 to compare with": (DIGITS.optimize, {"variants": ("int8",)}, "Optimize.variants"),
    "a gate with two limits": (DIGITS.gates[0], {"max_drop": 0.1}, "Gate.least"),
    "a gate without a limit": (DIGITS.gates[0], {"least": None}, "Gate.least"),
    "a name with a slash": (DIGITS, {"name": "a/b"}, "Recipe.name"),
    "a team that leaves the lake": (DIGITS, {"team": "../x"}, "Recipe.team"),
    "no gates": (DIGITS, {"gates": ()}, "Recipe.gates"),
    "an image model for a table": (AI4I, {"model": DIGITS.model}, "Recipe.model"),
    "a table of images": (DIGITS, {"dataset": AI4I.dataset}, "Recipe.dataset"),
    "average precision of ten classes": (DIGITS, {"metric": "average_precision"}, "Recipe.metric"),
    "a column without a range": (AI4I.dataset.columns[1], {"low": None}, "Column.values"),
    "a range upside down": (AI4I.dataset.columns[1], {"low": 500}, "Column.low"),
    "a column twice": (AI4I.dataset, {"columns": AI4I.dataset.columns * 2}, "Table.columns"),
    "a live variant that isn't made": (
        DIGITS,
        {"optimize": base.Optimize(variants=("fp32",)), "rollout": base.Rollout(untimed="int8")},
        "untimed",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE, ids=str)
def test_impossible_fields_are_refused_by_name(case: str) -> None:
    owner, change, field = IMPOSSIBLE[case]
    with pytest.raises(BadInput, match=field) as caught:
        dataclasses.replace(owner, **change)
    assert "allowed" in str(caught.value)


def test_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(BadInput, match=r"'nosuch'.*ai4i, cifar10, digits"):
        recipes.load("nosuch")


def test_features_of_a_table_are_in_order() -> None:
    assert AI4I.dataset.features[:4] == ("Type=L", "Type=M", "Type=H", "Air temperature [K]")
    assert AI4I.dataset.shape == (len(AI4I.dataset.features),)
