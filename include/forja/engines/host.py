"""Where an engine is built or loaded: which library, which GPU, which driver."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from forja.errors import Unavailable

DRIVER = Path("/proc/driver/nvidia/version")
"""There when the NVIDIA kernel driver is loaded; reading it starts nothing on the GPU."""
LIBRARIES = ("tensorrt-cu12", "tensorrt-cu13", "tensorrt", "tensorrt-rtx-cu12")
"""Distributions that bring a builder, in the order in which one is asked for."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A library that builds engines."""

    name: str
    """As receipts and engine.json name it."""
    module: str
    """Name of its Python module."""
    ahead_of_time: bool
    """Whether it builds for a GPU that isn't here."""
    timing_cache: bool
    """Whether it times kernels while it builds, and can keep the times."""


TENSORRT = Backend(name="tensorrt", module="tensorrt", ahead_of_time=False, timing_cache=True)
# It has the functions of a timing cache, but says itself that they do nothing since 1.2.
TENSORRT_RTX = Backend(name="tensorrt-rtx", module="tensorrt_rtx", ahead_of_time=True, timing_cache=False)


@dataclass(frozen=True, kw_only=True)
class Host:
    """A place where plans are built or loaded."""

    backend: str
    """Name of its library: ``tensorrt`` or ``tensorrt-rtx``."""
    library: str
    """Version of the library: major.minor.patch.build."""
    compute_capability: str = ""
    """Of its GPU, for example ``8.6``; empty without a GPU."""
    gpu: str = ""
    """Name of its GPU, or of the MIG instance; empty without one."""
    driver: str = ""
    """Version of the NVIDIA driver; empty without one."""


def backend() -> Backend:
    """TensorRT where a GPU's driver and the library are, TensorRT-RTX anywhere else."""
    found = DRIVER.exists() and importlib.util.find_spec(TENSORRT.module) is not None
    return TENSORRT if found else TENSORRT_RTX


def here(chosen: Backend | None = None) -> Host:
    """This host as ``chosen`` sees it, by default the library that ``make`` builds with.

    The GPU is CUDA's first, on which the library builds; asking for it starts CUDA in this process.

    Raises:
        Unavailable: the driver is loaded, but CUDA shows this process no GPU.
    """
    chosen = chosen or backend()
    library = str(importlib.import_module(chosen.module).__version__)
    if not DRIVER.exists():
        return Host(backend=chosen.name, library=library)
    import torch

    if not torch.cuda.is_available():
        raise Unavailable("GPU: the driver is loaded, but CUDA shows none", value=_driver(), do="give this process or pod a GPU")
    major, minor = torch.cuda.get_device_capability(0)
    return Host(
        backend=chosen.name, library=library, compute_capability=f"{major}.{minor}", gpu=torch.cuda.get_device_name(0), driver=_driver()
    )  # fmt: skip


def timing_key(team: str, place: Host) -> str:
    """Where in the lake the timing cache of a library's version on a GPU lies; empty when the library keeps none there.

    Times of one GPU say nothing about another, and TensorRT takes no cache of another version.
    """
    if place.backend != TENSORRT.name or not place.gpu:
        return ""
    gpu = re.sub(r"[^a-z0-9]+", "-", place.gpu.lower()).strip("-")
    return f"{team}/timing/{place.backend}-{place.library}-{gpu}.cache"


def signature() -> str:
    """What of this host an engine depends on: driver, GPU and builder; empty without a GPU, where the lock says it all.

    Nothing is imported or started on the GPU. A value that can't be found out is ``unknown``, so hosts that differ in what they
    show have different signatures.
    """
    if not DRIVER.exists():
        return ""
    return f"driver {_driver()}, compute capability {_capability()}, {_library()}"


def _driver() -> str:
    found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", DRIVER.read_text(errors="replace"))
    return found[0] if found else "unknown"


def _capability() -> str:
    """Compute capability of the host's GPUs, as ``nvidia-smi`` names it: ``9.0``; each kind once."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    try:
        done = subprocess.run(
            [tool, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return "+".join(sorted(set(re.findall(r"\d+\.\d+", done.stdout)))) or "unknown"


def _library() -> str:
    for name in LIBRARIES:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "no builder"
