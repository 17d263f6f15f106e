"""Digits, trained long enough to be killed meanwhile."""

import dataclasses

from forja.recipes import digits

RECIPE = dataclasses.replace(digits.RECIPE, name="slow", training=dataclasses.replace(digits.RECIPE.training, epochs=40))
