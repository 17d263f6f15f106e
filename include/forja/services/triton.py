"""Triton: two slots for each recipe, blue and green, each a server of its own that loads all models of its repository.

The server is the one that nvidia-pytriton bundles. Its python backend starts the first ``python3`` of the PATH, which must
be that of the serving environment: with NumPy 2 every output comes back empty.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from forja import envs, recipes
from forja.errors import BadInput, Damaged
from forja.prerequisites import libpython
from forja.services import probes
from forja.services.folders import private
from forja.services.ports import triton_base
from forja.services.program import Port, Program
from forja.settings import Settings

SlotName = Literal["blue", "green"]
SLOTS: tuple[SlotName, ...] = get_args(SlotName)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One of a recipe's two places for a release."""

    name: SlotName
    http_port: int
    grpc_port: int
    metrics_port: int
    repository: Path
    """Triton's model repository; empty when the slot holds no release."""
    program: str
    """Name for ``supervisor.start_program`` and its like."""


def slot(settings: Settings, recipe: str, name: str) -> Slot:
    """Slot ``name`` (blue or green) of a recipe; BadInput when there is no such recipe or slot."""
    if name not in SLOTS:
        raise BadInput("slot", value=name, allowed=", ".join(SLOTS))
    first = triton_base(settings, recipe) + 3 * SLOTS.index(name)
    return Slot(
        name=name,
        http_port=first,
        grpc_port=first + 1,
        metrics_port=first + 2,
        repository=settings.state / "serving" / recipe / name / "repository",
        program=f"triton-{recipe}-{name}",
    )


def programs(settings: Settings) -> list[Program]:
    """Both slots of every recipe. Only those that hold a release start by themselves."""
    python = envs.python("serving", settings)
    return [_program(settings, python, recipe, slot(settings, recipe, name)) for recipe in recipes.names() for name in SLOTS]


def _program(settings: Settings, python: Path, recipe: str, place: Slot) -> Program:
    server = _server(python)
    libraries = (_site_packages(python) / "nvidia_pytriton.libs", (libpython() or python).parent)
    prefix = f"forja_{hashlib.sha256(str(settings.state).encode()).hexdigest()[:8]}_{recipe}_{place.name}_"
    options = {
        "model-repository": place.repository,
        "backend-directory": _backends(settings, python),
        "cache-directory": server / "caches",
        "backend-config": f"python,shm-region-prefix-name={prefix}",
        "model-control-mode": "explicit",
        "load-model": "*",
        # A model that doesn't load must not take the server down, nor make its health "not ready" for good: whoever
        # loads a release asks for the model's own readiness and reads the reason in the repository index.
        "exit-on-error": "false",
        "strict-readiness": "false",
        "exit-timeout-secs": 5,
        "http-address": "127.0.0.1",
        "http-port": place.http_port,
        "grpc-address": "127.0.0.1",
        "grpc-port": place.grpc_port,
        "metrics-address": "127.0.0.1",
        "metrics-port": place.metrics_port,
        "allow-gpu-metrics": "false",
        "pinned-memory-pool-byte-size": 0,
    }
    return Program(
        name=place.program,
        service="triton",
        command=(str(server / "bin" / "tritonserver"), *(f"--{k}={v}" for k, v in options.items())),
        cwd=place.repository.parent,
        env={"PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin", "LD_LIBRARY_PATH": ":".join(map(str, libraries))},
        ports=tuple(Port(number=n, setting="triton") for n in (place.http_port, place.grpc_port, place.metrics_port)),
        ready=lambda started: probes.http_ok(f"http://127.0.0.1:{place.http_port}/v2/health/ready"),
        autostart=place.repository.is_dir() and any(p.is_dir() for p in place.repository.iterdir()),
        stop_seconds=15,
        shm_prefix=prefix,
        # 2.51 parses JSON on the stack of a thread: with 8 MiB a body of about 4 MiB ends the server.
        stack_mib=256,
    )


def prepare(settings: Settings) -> None:
    """Make the slots' folders, and the backend folder that holds the stub for this version of Python."""
    for recipe in recipes.names():
        for name in SLOTS:
            private(slot(settings, recipe, name).repository)
    python = envs.python("serving", settings)
    target = _backends(settings, python)
    if target.is_dir():
        return
    server = _server(python)
    stub = server / "python_backend_stubs" / _version(python) / "triton_python_backend_stub"
    if not stub.is_file():
        raise Damaged("Triton's python stub", value=str(stub), do="delete that environment's folder and run make setup")
    private(target.parent)
    part = target.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(server / "backends" / "python", part / "python")
    shutil.copy2(stub, part / "python" / stub.name)
    for path in (part, *part.rglob("*")):
        path.chmod(0o700 if path.is_dir() or path.name == stub.name else 0o600)
    part.rename(target)


def _backends(settings: Settings, python: Path) -> Path:
    return settings.state / "serving" / f"backends-{python.parents[1].name}"


def _version(python: Path) -> str:
    return _site_packages(python).parent.name.removeprefix("python")


def _site_packages(python: Path) -> Path:
    return next(iter(python.parents[1].glob("lib/python3.*/site-packages")))


def _server(python: Path) -> Path:
    return _site_packages(python) / "pytriton" / "tritonserver"
