"""Where images come from: buildah with a store of its own, and a small Debian with Python to build on.

The base is what python:3.11-slim-bookworm is for people with a registry: Debian 12, its Python 3.11 with venv and libpython.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cluster.kit import ClusterError
from cluster.kit.places import Places

SUITE = "bookworm"
PACKAGES = ("python3.11-venv", "python3-distutils", "libpython3.11", "ca-certificates", "netbase", "tzdata")
"""python3-distutils is a dependency that debootstrap doesn't find by itself: it goes by another name there."""
UNWANTED = (
    "debootstrap",
    "var/cache/apt",
    "var/lib/apt/lists",
    "var/log",
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "etc/hostname",
)
"""What a base has no use for; the last one is this machine's."""
LAYOUT = 1
"""Raise it when ``_fill`` makes something else out of the same packages."""
RUN = "/run/forja-buildah"


def buildah(places: Places, command: str, *arguments: str | Path) -> str:
    """Run one of buildah's commands; what it printed.

    Raises:
        ClusterError: it failed. What it was working on is removed first.
    """
    words = _words(places, command, *arguments)
    answer = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if answer.returncode:
        subprocess.run(_words(places, "rm", "--all"), capture_output=True)
        raise ClusterError(f"buildah {command} failed ({answer.returncode}): {(answer.stdout + answer.stderr)[-2000:]}")
    return answer.stdout.strip()


def identity(places: Places, ref: str) -> str:
    """Digest of an image's configuration, ``sha256:...``, which is what buildah knows it by; empty when there is none."""
    words = _words(places, "images", "--quiet", "--no-trunc", ref)
    answer = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return answer.stdout.split()[0] if answer.returncode == 0 and answer.stdout.split() else ""


def base(places: Places) -> str:
    """Name of the base image, made if it isn't there.

    Raises:
        ClusterError: a package couldn't be fetched.
    """
    parts = f"{LAYOUT} {SUITE} {' '.join(PACKAGES)} {' '.join(UNWANTED)}"
    ref = f"localhost/forja/base:{SUITE}-{hashlib.sha256(parts.encode()).hexdigest()[:12]}"
    if not identity(places, ref):
        places.images.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(dir=places.images, prefix=".base-")
        # In memory (300 MB): dpkg waits for the disk after every file.
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", scratch], check=True)
        try:
            _fill(Path(scratch))
            container = buildah(places, "from", "--pull-never", "scratch")
            buildah(places, "copy", "--quiet", container, scratch, "/")
            buildah(places, "config", "--cmd", "/bin/bash", container)
            buildah(places, "commit", "--quiet", "--rm", container, ref)
        finally:
            # debootstrap mounts /proc in there, and leaves it when it is killed.
            subprocess.run(["umount", "--quiet", "--recursive", scratch], check=True)
            Path(scratch).rmdir()
    return ref


def _fill(root: Path) -> None:
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(root)]
    answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if answer.returncode:
        raise ClusterError(f"debootstrap failed ({answer.returncode}): {(answer.stdout + answer.stderr)[-2000:]}")
    subprocess.run(["rm", "-rf", "--", *(root / name for name in UNWANTED)], check=True)
    for name in UNWANTED[1:-1]:
        (root / name).mkdir()
    (root / "etc" / "resolv.conf").write_text("")
    for name in ("python", "python3"):
        (root / "usr" / "local" / "bin" / name).symlink_to("/usr/bin/python3.11")


def _words(places: Places, *words: str | Path) -> Sequence[str]:
    return ["buildah", "--root", str(places.cache / "buildah"), "--runroot", RUN, *map(str, words)]
