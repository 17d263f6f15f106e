"""TensorRT's Python bindings without TensorRT: the wheels of the bindings beside compiled stubs of the three libraries they link to.

The bindings take nine C functions from those libraries. With stubs that give null they import on any host, so that every name of the
API can be looked up; nothing can be built or run that way.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from forja import envs
from forja.settings import Settings

FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL", "createInferRefitter_INTERNAL", "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry", "getPluginRegistry", "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
)  # fmt: skip
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
COMPILER = shutil.which("cc") or shutil.which("gcc") or ""

LOOK = """
import functools, importlib, json, sys
module = importlib.import_module(sys.argv[1])
missing = []
for name in json.load(sys.stdin):
    try:
        functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        missing.append(name)
print(json.dumps({"version": module.__version__, "missing": missing}))
"""


@functools.cache
def bindings(major: int) -> Path:
    """Folder of the bindings that ``tensorrt-<major>.txt`` pins, with stubs; made in the cache on first use, about 10 seconds."""
    requirements = Path(__file__).parent / f"tensorrt-{major}.txt"
    settings = Settings.from_env()
    digest = hashlib.sha256(requirements.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:12]
    place = settings.cache / "test" / f"tensorrt-{major}-py{sys.version_info.major}.{sys.version_info.minor}-{digest}"
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            made = Path(folder) / "made"
            _install(requirements, made, settings)
            _stubs(made, major)
            try:
                made.rename(place)
            except OSError:
                if not place.is_dir():  # otherwise another test run was first
                    raise
    return place


def _install(requirements: Path, target: Path, settings: Settings) -> None:
    pinned = ["--no-deps", "--require-hashes", "--requirements", str(requirements)]
    command = [envs.uv(settings), "pip", "install", "--quiet", "--python", sys.executable, "--target", str(target), *pinned]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def _stubs(folder: Path, major: int) -> None:
    source = folder / "stubs.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for library in LIBRARIES:
        subprocess.run([COMPILER, "-shared", "-fPIC", "-o", str(folder / f"{library}.so.{major}"), str(source)], check=True)


def missing(module: str, names: Iterable[str], folder: Path | None = None) -> tuple[str, list[str]]:
    """Version of a module, and which of the dotted names it lacks; imported in a process of its own.

    Args:
        module: ``tensorrt_bindings`` of ``folder``, or a module of this environment.
        names: for example ``BuilderFlag.TF32``.
        folder: what ``bindings`` gave.
    """
    paths = {} if folder is None else {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, module], input=json.dumps(sorted(names)), capture_output=True, text=True, check=False,
        env={**os.environ, **paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return found["version"], found["missing"]
