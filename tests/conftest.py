"""Each test file runs in one environment: those that say ``pytestmark = pytest.mark.ml`` in ml-dev, the rest in control-dev."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ML = re.compile(r"^pytestmark\s*=.*\bmark\.ml\b", re.MULTILINE)
HERE_IS_ML = importlib.util.find_spec("torch") is not None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the files of the other environment: their imports would fail here."""
    if collection_path.is_file() and collection_path.name.startswith("test_") and collection_path.suffix == ".py":
        return True if bool(ML.search(collection_path.read_text())) != HERE_IS_ML else None
    return None
