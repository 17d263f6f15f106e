"""Generates the passwords that docker-compose.yaml asks for: ``PYTHONPATH=include python3 -m forja.services.compose_env``.

It writes .env beside docker-compose.yaml, for this user alone, and keeps every value that is there. Which variables there
are is read from docker-compose.yaml itself. Only the standard library is imported: this runs on the system's Python.
"""

from __future__ import annotations

import base64
import os
import re
import secrets
import sys
from pathlib import Path

from forja.settings import ROOT

WANTED = re.compile(r"(?<!\$)\$\{(\w+):\?")
"""A variable that Compose refuses to go without."""


def wanted(compose: str) -> list[str]:
    """Names of the variables that a Compose file requires, in its order."""
    return list(dict.fromkeys(WANTED.findall(compose)))


def lines(compose: str, env: str) -> list[str]:
    """The lines of ``env``, and one with a new secret for each variable that it lacks.

    Each is random bytes as URL-safe base64: 32 for a Fernet key, as Airflow wants it, and 48 for the others, since a key that
    signs tokens should have 64 characters.
    """
    there = {line.partition("=")[0].strip() for line in env.splitlines() if line.partition("=")[2].strip()}
    kept = [line for line in env.splitlines() if line.strip()]
    missing = [name for name in wanted(compose) if name not in there]
    kept = [line for line in kept if line.partition("=")[0].strip() not in missing]
    return kept + [f"{name}={_secret(32 if 'FERNET' in name else 48)}" for name in missing]


def _secret(size: int) -> str:
    return base64.urlsafe_b64encode(secrets.token_bytes(size)).decode()


def main(root: Path = ROOT) -> int:
    """Write .env; the exit status."""
    path = root / ".env"
    old = path.read_text() if path.is_file() else ""
    new = "".join(f"{line}\n" for line in lines((root / "docker-compose.yaml").read_text(), old))
    part = path.with_name(f".env.{os.getpid()}")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(new)
    part.replace(path)
    sys.stdout.write(f"{path}: {len(new.splitlines())} variables; docker compose reads it by itself\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
