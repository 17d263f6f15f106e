"""Folders and files of the state: private to the user, written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from forja.settings import Settings


def private(path: Path) -> Path:
    """Make folder ``path`` for this user alone, with those above it, and return it."""
    if not path.is_dir():
        private(path.parent)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    return path


def write(path: Path, text: str) -> None:
    """Put ``text`` into ``path`` (mode 0600): a reader sees the old text or the new one, never a part."""
    private(path.parent)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    part.replace(path)


def write_if_new(path: Path, text: str) -> bool:
    """Like ``write``, unless the file holds that text already; says whether it was written."""
    if path.is_file() and path.read_text() == text:
        return False
    write(path, text)
    return True


def secret(settings: Settings, name: str, make: Callable[[], str] = lambda: secrets.token_urlsafe(24)) -> str:
    """The secret called ``name``, generated once and kept in the state folder with mode 0600."""
    path = settings.state / "secrets" / name
    with locked(settings, "secrets"):
        if not path.is_file():
            write(path, make())
        return path.read_text()


def load_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file."""
    return dict(json.loads(path.read_text())) if path.is_file() else {}


@contextlib.contextmanager
def locked(settings: Settings, name: str) -> Iterator[None]:
    """Hold the state folder's lock ``name``; others wait."""
    path = private(settings.state / "run") / f"{name}.lock"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
