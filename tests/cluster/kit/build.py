"""Builds the cluster's programs with Go. A program is named by a digest of its sources, so only a change builds it again."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from cluster.kit import ClusterError
from cluster.kit.places import KIT, Places
from cluster.kit.versions import APT, BINARIES, Binary

ENV = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
FLAGS = ("-trimpath",)
KEEP = 3
"""Builds of one program that stay: checkouts that share a cache may pin different ones, and one may be running."""
BY_NAME = {b.name: b for b in BINARIES}


def missing() -> list[str]:
    """What this machine lacks for the cluster, each with what to do; empty when all is there."""
    wrong = []
    if sys.platform != "linux":
        wrong.append(f"Linux (this is {sys.platform})")
    elif os.geteuid() != 0:
        wrong.append("root (namespaces, cgroups and mounts need it)")
    elif (
        shutil.which("unshare")
        and subprocess.run(["unshare", "--mount", "--pid", "--net", "--fork", "true"], capture_output=True).returncode
    ):
        wrong.append("the right to make namespaces (unshare says no)")
    if not shutil.which("go"):
        wrong.append("Go 1.26 (https://go.dev/dl)")
    elif (version := _go_version()) < (1, 26):
        wrong.append(f"Go 1.26 (found {'.'.join(map(str, version))})")
    packages = [p for program, p in APT.items() if not (shutil.which(program) or Path(program).is_file())]
    if packages:
        wrong.append(f"Debian's packages: apt-get install {' '.join(packages)}")
    return wrong


def binary(places: Places, name: str) -> Path:
    """Path of a program, there or not."""
    return places.bin / f"{name}-{digest(BY_NAME[name])}"


def digest(wanted: Binary) -> str:
    """12 hex digits of the sources, the pins and the flags of a program."""
    parts = [wanted.package, *FLAGS, *ENV.values(), *(f"{k}={v}" for k, v in wanted.stamps)]
    for path in sorted((KIT / "go" / wanted.module).iterdir()):
        parts += [path.name, hashlib.sha256(path.read_bytes()).hexdigest()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def build(places: Places) -> None:
    """Build what isn't there, one after the other: a second compiler beside the first would only take memory.

    Raises:
        ClusterError: the machine lacks something, or a build failed.
    """
    if lacking := missing():
        raise ClusterError(f"the test cluster needs {'; '.join(lacking)}")
    places.bin.mkdir(parents=True, exist_ok=True)
    for wanted in BINARIES:
        path = binary(places, wanted.name)
        if path.is_file():
            path.touch()
            continue
        began = time.monotonic()
        _compile(places, wanted, path)
        print(f"built {wanted.name:26} {time.monotonic() - began:5.0f} s {path.stat().st_size / 1e6:6.0f} MB", flush=True)
        newest = sorted(places.bin.glob(f"{wanted.name}-{'?' * 12}"), key=lambda p: p.stat().st_mtime, reverse=True)
        for old in newest[KEEP:]:
            old.unlink()


def source(places: Places, module: str, package: str) -> Path:
    """Folder of a Go module's sources, as ``module`` pins it."""
    command = ["go", "list", "-m", "-f", "{{.Dir}}", package]
    answer = subprocess.run(command, cwd=KIT / "go" / module, env=environment(places), capture_output=True, text=True)
    if answer.returncode or not answer.stdout.strip():
        download = ["go", "mod", "download", package]
        subprocess.run(download, cwd=KIT / "go" / module, env=environment(places), check=True)
        answer = subprocess.run(command, cwd=KIT / "go" / module, env=environment(places), capture_output=True, text=True, check=True)
    return Path(answer.stdout.strip())


def environment(places: Places) -> dict[str, str]:
    """Go's environment: the machine's own proxy settings, our caches."""
    return {**os.environ, **ENV, "GOCACHE": str(places.cache / "gocache"), "GOMODCACHE": str(places.cache / "gomod")}


def _compile(places: Places, wanted: Binary, path: Path) -> None:
    stamps = " ".join(["-s", "-w", *(f"-X {k}={v}" for k, v in wanted.stamps)])
    half = path.with_name(f".{path.name}.{os.getpid()}")
    command = ["go", "build", *FLAGS, "-ldflags", stamps, "-o", str(half), wanted.package]
    answer = subprocess.run(command, cwd=KIT / "go" / wanted.module, env=environment(places), capture_output=True, text=True)
    if answer.returncode:
        raise ClusterError(f"go build of {wanted.name} failed:\n{answer.stderr[-3000:]}")
    half.rename(path)


def _go_version() -> tuple[int, int]:
    said = subprocess.run(["go", "env", "GOVERSION"], capture_output=True, text=True, env={**os.environ, **ENV}).stdout.strip()
    major, minor = [*said.removeprefix("go").split("."), "0", "0"][:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)
