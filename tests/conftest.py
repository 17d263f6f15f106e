"""Each test file runs in one environment: those that say ``pytestmark = pytest.mark.ml`` in ml-dev, the rest in control-dev."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

ML = re.compile(r"^pytestmark\s*=.*\bmark\.ml\b", re.MULTILINE)
HERE_IS_ML = importlib.util.find_spec("torch") is not None


class OfTheOtherEnvironment(pytest.Module):
    """A file that isn't imported here: its imports would fail."""

    def collect(self) -> Iterable[pytest.Item]:
        """Nothing."""
        return []


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Leave out the files of the other environment, also those that are named on the command line."""
    if bool(ML.search(module_path.read_text())) == HERE_IS_ML:
        return None
    made: pytest.Module = OfTheOtherEnvironment.from_parent(parent, path=module_path)
    return made
