"""What must be on the machine before ``make setup``: checked first and all at once, each with what to install.

Only the standard library is imported.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from forja.errors import BadInput

GLIBC = (2, 35)
"""The oldest C library that the bundled Triton runs on (its wheel is tagged manylinux_2_35)."""


def check_prerequisites(cache: Path, *, maven: bool, gib: float) -> None:
    """Refuse a machine that lacks something.

    Args:
        cache: where environments will lie.
        maven: whether Kafka's jars are still to be fetched.
        gib: disk in GiB that will be taken.

    Raises:
        BadInput: names everything that is missing, with what to install.
    """
    checks = (_platform(), _python(), _venv(), _libpython(), _java(), _maven() if maven else None, _disk(cache, gib))
    missing = [c for c in checks if c]
    if missing:
        raise BadInput("this machine lacks:\n" + "\n".join(f"  - {m}" for m in missing) + "\nThen run make setup again")


def libpython() -> Path | None:
    """The shared library of this interpreter, which Triton's python stub loads; None where it isn't installed."""
    name = sysconfig.get_config_var("INSTSONAME") or f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR") or "", f"{sys.base_prefix}/lib"]
    folders += [f"{f}/{sysconfig.get_config_var('MULTIARCH') or 'x86_64-linux-gnu'}" for f in (*folders, "/usr/lib")]
    candidates = (Path(folder) / name for folder in (*folders, "/usr/lib64", "/usr/local/lib") if folder)
    return next((p for p in candidates if ".so" in name and p.is_file()), None)


def _platform() -> str | None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"Linux on x86_64: this is {sys.platform} on {platform.machine()}"
    text = (os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc ")
    version = tuple(int(n) for n in re.findall(r"\d+", text)[:2])
    if version < GLIBC:
        return f"glibc 2.35 or newer (Debian 12, Ubuntu 22.04): this system has {text or 'another C library'}"
    return None


def _python() -> str | None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        found = f"{sys.executable} is {platform.python_version()}"
        return f"Python 3.11 to 3.13: {found}; apt-get install python3, or set FORJA_PYTHON to another one"
    return None


def _venv() -> str | None:
    if shutil.which("uv") is None and importlib.util.find_spec("ensurepip") is None:
        return f"the venv module: apt-get install python3.{sys.version_info[1]}-venv (or install uv)"
    return None


def _libpython() -> str | None:
    if libpython() is None:
        minor = sys.version_info[1]
        return (
            f"the shared library of Python 3.{minor}, which Triton loads: apt-get install libpython3.{minor}, "
            "or build Python with --enable-shared (pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared)"
        )
    return None


def _java() -> str | None:
    advice = "Java 17 or newer, for Kafka: apt-get install openjdk-17-jre-headless"
    java = shutil.which("java")
    if java is None:
        return advice
    release = Path(java).resolve().parents[1] / "release"  # half a second faster than starting a JVM
    text = release.read_text() if release.is_file() else _java_version(java)
    found = re.search(r'(?:JAVA_VERSION=|version )"(?:1\.)?(\d+)', text)
    if found is None or int(found[1]) < 17:
        return f"{advice} ({java} is {found[1] if found else 'of unknown version'})"
    return None


def _java_version(java: str) -> str:
    return subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr


def _maven() -> str | None:
    return None if shutil.which("mvn") else "Maven, which fetches Kafka's jars: apt-get install maven"


def _disk(cache: Path, gib: float) -> str | None:
    place = next(p for p in (cache, *cache.parents) if p.exists())
    free = shutil.disk_usage(place).free / 2**30
    return f"{gib:.1f} GiB of disk under {cache} ({free:.1f} free): free some, or set FORJA_CACHE to another disk" if free < gib else None
