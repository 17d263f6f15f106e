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
STACK_MIB = 256
"""Stack of Triton's threads: 2.51 parses JSON on it, and with 8 MiB a body of about 4 MiB ends the server."""


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
    prefix = f"forja_{hashlib.sha256(str(settings.state).encode()).hexdigest()[:8]}_{recipe}_{place.name}_"
    numbers = (place.http_port, place.grpc_port, place.metrics_port)
    return Program(
        name=place.program,
        service="triton",
        command=command(settings, python, place.repository, address="127.0.0.1", ports=numbers, shm_prefix=prefix),
        cwd=place.repository.parent,
        env=environment(python),
        ports=tuple(Port(number=n, setting="triton") for n in numbers),
        ready=lambda started: probes.http_ok(f"http://127.0.0.1:{place.http_port}/v2/health/ready"),
        autostart=place.repository.is_dir() and any(p.is_dir() for p in place.repository.iterdir()),
        stop_seconds=15,
        shm_prefix=prefix,
        stack_mib=STACK_MIB,
    )


def command(
    settings: Settings, python: Path, repository: Path, *, address: str, ports: tuple[int, int, int], shm_prefix: str
) -> tuple[str, ...]:
    """Triton's command line for all models of a repository.

    Args:
        python: interpreter of the serving environment.
        address: IP address for HTTP. gRPC and the metrics stay on the loopback.
        ports: of HTTP, gRPC and the metrics.
        shm_prefix: beginning of the names of its shared memory.
    """
    server = _server(python)
    options = {
        "model-repository": repository,
        "backend-directory": _backends(settings, python),
        "cache-directory": server / "caches",
        "backend-config": f"python,shm-region-prefix-name={shm_prefix}",
        "model-control-mode": "explicit",
        "load-model": "*",
        # A model that doesn't load must not take the server down, nor make its health "not ready" for good: whoever
        # loads a release asks for the model's own readiness and reads the reason in the repository index.
        "exit-on-error": "false",
        "strict-readiness": "false",
        "exit-timeout-secs": 5,
        "http-address": address,
        "http-port": ports[0],
        "grpc-address": "127.0.0.1",
        "grpc-port": ports[1],
        "metrics-address": "127.0.0.1",
        "metrics-port": ports[2],
        "allow-gpu-metrics": "false",
        "pinned-memory-pool-byte-size": 0,
    }
    return (str(server / "bin" / "tritonserver"), *(f"--{k}={v}" for k, v in options.items()))


def environment(python: Path) -> dict[str, str]:
    """Environment variables of a Triton that ``command`` starts."""
    libraries = (_site_packages(python) / "nvidia_pytriton.libs", (libpython() or python).parent)
    return {"PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin", "LD_LIBRARY_PATH": ":".join(map(str, libraries))}


def prepare(settings: Settings) -> None:
    """Make the slots' folders, and the folder of backends."""
    for recipe in recipes.names():
        for name in SLOTS:
            private(slot(settings, recipe, name).repository)
    make_backends(settings, envs.python("serving", settings))


def make_backends(settings: Settings, python: Path) -> None:
    """Make the folder of backends, which holds the stub for this version of Python."""
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
