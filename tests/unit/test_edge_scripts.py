"""A bundle's scripts on the oldest Python, and its shell scripts against the tools of each TensorRT and a device's own."""

from __future__ import annotations

import ast
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from unit.edge_parts import Device, sealed, signer

from forja.edge import targets
from forja.edge.bundle import FILES, SCRIPTS

KEY = signer()
PYTHONS = [FILES / name for name in SCRIPTS if name.endswith(".py")]
OLD = (3, 6)

# From "What's New" of Python 3.7 to 3.11: what the modules that these scripts import have since.
LATER_NAMES = {
    "time": {"time_ns", "perf_counter_ns", "monotonic_ns", "process_time_ns"}, "math": {"prod", "dist", "isqrt", "comb", "perm", "lcm"},
    "os": {"pidfd_open", "posix_spawn", "waitstatus_to_exitcode"}, "shlex": {"join"}, "hashlib": {"file_digest", "scrypt"},
    "hmac": {"digest"}, "tarfile": {"data_filter", "fully_trusted_filter"},
    "typing": {"Literal", "Final", "Protocol", "TypedDict", "ForwardRef", "Annotated", "ParamSpec", "Self", "assert_never"},
    "ast": {"unparse"}, "re": {"Pattern", "Match", "NOFLAG"}, "functools": {"cache", "cached_property"},
}  # fmt: skip
LATER_MODULES = {"dataclasses", "contextvars", "importlib.resources", "importlib.metadata", "graphlib", "zoneinfo", "tomllib"}
LATER_METHODS = {"removeprefix", "removesuffix", "fromisoformat", "is_relative_to", "readlink", "bit_count", "isascii"}
LATER_KEYWORDS = {
    "capture_output", "text", "missing_ok", "dirs_exist_ok", "strict", "filter", "ignore_cleanup_errors", "initial", "usedforsecurity",
}  # fmt: skip


def problems(source: str) -> list[str]:
    """What Python 3.6 doesn't have in a script: syntax, modules, functions, methods and keyword arguments."""
    try:
        tree = ast.parse(source, feature_version=OLD)
    except SyntaxError as error:
        return [f"line {error.lineno}: {error.msg}"]
    return [f"line {getattr(node, 'lineno', 0)}: {what}" for node in ast.walk(tree) for what in _later(node)]


def _later(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (a.name for a in node.names if a.name in LATER_MODULES)
    elif isinstance(node, ast.ImportFrom):
        names = {a.name for a in node.names}
        if node.module in LATER_MODULES or (node.module == "__future__" and names & {"annotations"}):
            yield str(node.module)
        yield from names & LATER_NAMES.get(str(node.module), set())
    elif isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.attr in LATER_NAMES.get(node.value.id, set()):
            yield f"{node.value.id}.{node.attr}"
        if node.attr in LATER_METHODS and not (isinstance(node.value, ast.Name) and node.value.id == "os"):
            yield f".{node.attr}()"
    elif isinstance(node, ast.Call):
        yield from (f"{k.arg}=" for k in node.keywords if k.arg in LATER_KEYWORDS)
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in ("list", "dict", "tuple", "set"):
        yield f"{node.value.id}[...]"
    elif (
        isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) and isinstance(node.right, ast.Constant) and node.right.value is None
    ):
        yield "X | None"


@pytest.mark.parametrize("path", PYTHONS, ids=lambda p: p.name)
def test_scripts_keep_to_python_3_6(path: Path) -> None:
    assert problems(path.read_text()) == []


NEWER = {
    "walrus": "if (n := 1): pass",
    "match": "match 1:\n  case 1: pass",
    "positional only": "def f(a, /): pass",
    "X | None": "y: int | None",
    "list[int]": "x: list[int] = []",
    "annotations": "from __future__ import annotations",
    "dataclasses": "from dataclasses import dataclass",
    "capture_output": "import subprocess\nsubprocess.run([], capture_output=True)",
    "text": "import subprocess\nsubprocess.run([], text=True)",
    "removeprefix": "'a'.removeprefix('b')",
    "perf_counter_ns": "import time\ntime.perf_counter_ns()",
    "math.prod": "import math\nmath.prod([1])",
    "strict zip": "zip([], [], strict=True)",
    "Literal": "from typing import Literal",
    "tar filter": "t.extractall(filter='data')",
    "file_digest": "import hashlib\nhashlib.file_digest(f, 'sha256')",
}


@pytest.mark.parametrize("case", NEWER)
def test_the_check_of_old_python_catches(case: str) -> None:
    assert problems(NEWER[case])


@pytest.mark.parametrize("path", PYTHONS, ids=lambda p: p.name)
def test_scripts_need_the_standard_library_and_numpy_alone(path: Path) -> None:
    """The runtime itself, and a decoder of images where one is there, are asked for and may be missing."""
    tree = ast.parse(path.read_text())
    found = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    found |= {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    beside = {p.stem for p in PYTHONS}
    assert found - set(sys.stdlib_module_names) - beside <= ({"numpy", "PIL", "cv2"} if path.name == "infer.py" else {"numpy"})


@functools.cache
def python36() -> str | None:
    """A real Python 3.6, when this machine has one."""
    roots = (os.environ.get("PYENV_ROOT"), Path.home() / ".pyenv", "/opt")
    paths = [p for root in roots if root for p in sorted(Path(root).glob("versions/3.6.*/bin/python3.6"))]
    found = shutil.which("python3.6")
    for path in [*map(str, paths), *([found] if found else [])]:
        if subprocess.run([path, "-c", "import json, ssl"], capture_output=True, check=False).returncode == 0:
            return path
    return None


def test_trust_on_a_real_python_3_6(tmp_path: Path) -> None:
    python = python36()
    if python is None:
        pytest.skip("no Python 3.6 on this machine; the syntax was checked above")
    device = Device(tmp_path, KEY.public_pem, python=python)
    device.lay(sealed(KEY).archive)
    for path in PYTHONS:  # compiles, without leaving a file
        command = [python, "-c", f"compile(open({str(path)!r}, encoding='utf-8').read(), 'x', 'exec')"]
        assert subprocess.run(command, check=False).returncode == 0, path.name
    assert device.run("trust.py", *device.options, str(device.bundle)).returncode == 0
    (device.bundle / "labels.txt").write_text("x")
    assert device.run("trust.py", *device.options, str(device.bundle)).returncode == 3


# Options that trtexec of each version knows, of those that matter here: samples/common/sampleOptions.cpp at tags 8.2.1, 8.5, 10.3, 11.1.
COMMON = {"--onnx", "--saveEngine", "--minShapes", "--optShapes", "--maxShapes", "--noTF32"}
TRTEXEC = {
    "8.2.1": ("v8201", COMMON | {"--workspace", "--buildOnly", "--fp16", "--int8"}),
    "8.5.2": ("v8502", COMMON | {"--workspace", "--memPoolSize", "--buildOnly", "--fp16", "--int8"}),
    "10.3.0": ("v100300", COMMON | {"--memPoolSize", "--skipInference", "--fp16", "--int8", "--bf16", "--stronglyTyped"}),
    "10.16.1": ("v101601", COMMON | {"--memPoolSize", "--skipInference", "--fp16", "--int8", "--bf16", "--stronglyTyped"}),
    "11.4.1": ("v110401", COMMON | {"--memPoolSize", "--skipInference"}),
}
FAKE = """#!{python}
import sys
print("&&&& RUNNING TensorRT.trtexec [TensorRT {version}] # trtexec")
if sys.argv[1:] == ["--help"]:
    raise SystemExit(0)
given = dict(a.partition("=")[::2] for a in sys.argv[1:])
unknown = set(given) - {options}
if unknown:
    print("Unknown option:", *sorted(unknown))
    raise SystemExit(1)
open({log!r}, "w").write(" ".join(sys.argv[1:]))
open(given["--saveEngine"], "wb").write({engine!r})
"""


def device_with(tmp_path: Path, version: str, target: str, variant: str, engine: bytes = b"plan") -> tuple[Device, dict[str, str]]:
    """A device with a trtexec that knows what that version's knows, and refuses the rest."""
    device = Device(tmp_path, KEY.public_pem)
    device.lay(sealed(KEY, target=target, variant=variant).archive)
    tool, (said, options) = tmp_path / "bin" / "trtexec", TRTEXEC[version]
    tool.parent.mkdir()
    tool.write_text(FAKE.format(python=sys.executable, version=said, options=options, log=str(tmp_path / "log"), engine=engine))
    tool.chmod(0o755)
    return device, {"PATH": f"{tool.parent}:{Path(sys.executable).parent}:/usr/bin:/bin"}


BUILDS = {
    ("8.2.1", "jetson-nano", "fp16"): "--workspace=1024 --buildOnly --fp16",
    ("8.2.1", "jetson-nano", "fp32"): "--workspace=1024 --buildOnly --noTF32",
    ("8.5.2", "xavier-nx", "fp16"): "--memPoolSize=workspace:1024 --buildOnly --fp16",
    ("8.5.2", "xavier-nx-int8", "int8"): "--memPoolSize=workspace:1024 --buildOnly --int8 --fp16",
    ("10.3.0", "orin", "fp16"): "--memPoolSize=workspace:1024 --skipInference --fp16",
    ("10.3.0", "orin-int8", "int8"): "--memPoolSize=workspace:1024 --skipInference --int8 --fp16",
    ("10.16.1", "agx-orin", "fp16"): "--memPoolSize=workspace:1024 --skipInference --stronglyTyped",
    ("10.16.1", "thor", "fp32"): "--memPoolSize=workspace:1024 --skipInference --stronglyTyped --noTF32",
    ("11.4.1", "agx-orin", "fp16"): "--memPoolSize=workspace:1024 --skipInference",
    ("11.4.1", "thor-int8", "int8"): "--memPoolSize=workspace:1024 --skipInference",
    ("11.4.1", "thor", "fp32"): "--memPoolSize=workspace:1024 --skipInference --noTF32",
}


@pytest.mark.parametrize("case", BUILDS, ids=" ".join)
def test_build_by_version(case: tuple[str, str, str], tmp_path: Path) -> None:
    device, env = device_with(tmp_path, *case)
    done = device.run("build.sh", *device.options, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    said = (tmp_path / "log").read_text()
    assert said.endswith(BUILDS[case])
    limit = min(4, targets.find(case[1]).max_batch)
    assert f"--minShapes=input:1x1x2x2 --optShapes=input:1x1x2x2 --maxShapes=input:{limit}x1x2x2 " in said
    facts = json.loads((device.bundle / "work" / "engine.json").read_text())
    assert (facts["tensorrt"], facts["bytes"]) == (case[0], 4)
    assert device.check()["version"] == 1, "what was built doesn't break the bundle"
    dry = device.run("build.sh", "--dry-run", "--tensorrt", case[0])
    assert dry.stdout.strip().endswith(BUILDS[case])


NOT_BUILT = {
    "too old": ("8.2.1", "xavier-nx", "for 8.5 or newer"),
    "too new": ("10.3.0", "xavier-nx", "older than 8.6"),
    "11 for a weakly typed bundle": ("11.4.1", "orin", "older than 10.4"),
    "JetPack 6 for one of JetPack 7": ("10.3.0", "agx-orin", "for 10.16 or newer"),
}


@pytest.mark.parametrize("case", NOT_BUILT)
def test_what_is_not_built(case: str, tmp_path: Path) -> None:
    version, target, words = NOT_BUILT[case]
    device, env = device_with(tmp_path, version, target, "fp16")
    done = device.run("build.sh", *device.options, env=env)
    assert done.returncode == 3
    assert words in done.stderr
    assert not (tmp_path / "log").exists()


def test_a_changed_bundle_is_not_built(tmp_path: Path) -> None:
    device, env = device_with(tmp_path, "8.2.1", "jetson-nano", "fp16")
    (device.bundle / "bundle.env").write_text("RUNTIME=tensorrt\nFLAGS=--best\n")
    done = device.run("build.sh", *device.options, env=env)
    assert (done.returncode, (tmp_path / "log").exists()) == (3, False)
    assert "digest: bundle.env" in done.stderr or "files: " in done.stderr


def test_nothing_of_bundle_env_is_run(tmp_path: Path) -> None:
    device, _ = device_with(tmp_path, "8.2.1", "jetson-nano", "fp16")
    (device.bundle / "bundle.env").write_text(f"RUNTIME=onnxruntime\n$(touch {tmp_path}/ran)\n`touch {tmp_path}/ran`\n")
    assert device.run("build.sh", "--dry-run", "--tensorrt", "8.2").returncode == 0
    assert not (tmp_path / "ran").exists()


def test_without_trtexec_it_says_what_to_install(tmp_path: Path) -> None:
    device, env = device_with(tmp_path, "8.2.1", "jetson-nano", "fp16")
    (tmp_path / "bin" / "trtexec").unlink()
    done = device.run("build.sh", *device.options, env=env)
    assert done.returncode == 3
    assert "trtexec is neither on the PATH" in done.stderr


def test_an_empty_engine_is_none(tmp_path: Path) -> None:
    device, env = device_with(tmp_path, "8.2.1", "jetson-nano", "fp16", engine=b"")
    done = device.run("build.sh", *device.options, env=env)
    assert (done.returncode, "wrote no engine" in done.stderr) == (3, True)
    assert not (device.bundle / "work" / "engine.json").exists()


@pytest.mark.parametrize(("target", "variant"), [("cpu", "fp32"), ("rtx-ada", "fp16")])
def test_nothing_to_build(target: str, variant: str, tmp_path: Path) -> None:
    device = Device(tmp_path, KEY.public_pem)
    device.lay(sealed(KEY, target=target, variant=variant).archive)
    done = device.run("build.sh", *device.options, env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"})
    assert (done.returncode, done.stdout.splitlines()[-1].startswith("nothing to build")) == (0, True)


CONF = "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PARAM TYPE=FILE NAME=MAXN >\n"
TOOLS = ("nvpmodel", "jetson_clocks", "mkswap", "swapon", "swapoff")


class Board:
    """A device whose tools only write down what they were told."""

    def __init__(self, folder: Path, target: str, conf: str = CONF, swap_kb: int = 0) -> None:
        self.device = Device(folder, KEY.public_pem)
        self.device.lay(sealed(KEY, target=target, variant="fp16").archive)
        self.log = folder / "log"
        (folder / "bin").mkdir()
        for name in TOOLS:
            tool = folder / "bin" / name
            said = "echo NV Power Mode: 15W; echo 0" if name == "nvpmodel" else "true"
            store = f'[ "$1" != --store ] || touch "$2"; echo "{name} $*" >>{self.log}; {said}'
            tool.write_text(f"#!/bin/sh\n{store}\n")
            tool.chmod(0o755)
        (folder / "bin" / "dd").write_text(f'#!/bin/sh\necho "dd $*" >>{self.log}\ntouch {self.device.var}/swap\n')
        (folder / "bin" / "dd").chmod(0o755)
        (folder / "nvpmodel.conf").write_text(conf)
        (folder / "meminfo").write_text(f"MemTotal: 4051048 kB\nSwapTotal: {swap_kb} kB\n")
        self.env = {
            "PATH": f"{folder}/bin:{Path(sys.executable).parent}:/usr/bin:/bin", "FORJA_EDGE_NVPMODEL": str(folder / "nvpmodel.conf"),
            "FORJA_EDGE_MEMINFO": str(folder / "meminfo"),
        }  # fmt: skip

    def setup(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.device.run("setup.sh", *self.device.options, *arguments, env=self.env)

    def said(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


root = pytest.mark.skipif(os.getuid() != 0, reason="setup.sh changes a device as root alone")


@root
def test_setup_and_undo(tmp_path: Path) -> None:
    board = Board(tmp_path, "orin")
    done = board.setup()
    assert done.returncode == 0, done.stderr
    var = board.device.var
    assert board.said() == ["nvpmodel -q", f"jetson_clocks --store {var}/clocks.before", "nvpmodel -m 2", "jetson_clocks "]
    assert (var / "setup.before").read_text() == "MODE=0\n"
    board.log.unlink()
    assert board.setup().returncode == 0
    assert board.said() == ["nvpmodel -m 2", "jetson_clocks "], "what it found first stays what is gone back to"
    board.log.unlink()
    assert board.setup("--undo").returncode == 0
    assert board.said() == [f"jetson_clocks --restore {var}/clocks.before", "nvpmodel -m 0"]
    assert board.setup("--undo").returncode == 3, "once"


@root
def test_swap_is_made_and_taken_off(tmp_path: Path) -> None:
    board = Board(tmp_path, "jetson-nano", conf="< POWER_MODEL ID=0 NAME=MAXN >\n", swap_kb=1024 * 1024)
    assert board.setup().returncode == 0
    swap = board.device.var / "swap"
    assert board.said()[-3:] == [f"dd if=/dev/zero of={swap} bs=1048576 count=3072", f"mkswap {swap}", f"swapon {swap}"]
    assert swap.stat().st_mode & 0o777 == 0o600
    assert board.setup("--undo").returncode == 0
    assert board.said()[-1] == f"swapoff {swap}"
    assert not swap.exists()


@root
def test_enough_swap_is_left_alone(tmp_path: Path) -> None:
    board = Board(tmp_path, "jetson-nano", conf="< POWER_MODEL ID=0 NAME=MAXN >\n", swap_kb=4096 * 1024)
    assert board.setup().returncode == 0
    assert not any(line.startswith(("dd", "swapon")) for line in board.said())


@root
@pytest.mark.parametrize("what", ["no such mode", "a changed bundle"])
def test_setup_refuses(what: str, tmp_path: Path) -> None:
    board = Board(tmp_path, "orin", conf="< POWER_MODEL ID=0 NAME=15W >\n" if what == "no such mode" else CONF)
    if what == "a changed bundle":
        (board.device.bundle / "labels.txt").write_text("x")
    done = board.setup()
    assert (done.returncode, board.said()) == (3, [])
    assert ("0=15W" if what == "no such mode" else "digest: labels.txt") in done.stderr


def test_a_dry_run_changes_nothing_and_says_how_to_undo(tmp_path: Path) -> None:
    board = Board(tmp_path, "jetson-nano", conf="< POWER_MODEL ID=0 NAME=MAXN >\n")
    done = board.setup("--dry-run")
    assert done.returncode == 0, done.stderr
    assert (board.said(), board.device.var.exists()) == ([], False)
    for words in ("nvpmodel -m 0", "jetson_clocks", "swapon", "to undo: sudo"):
        assert words in done.stdout


def test_setup_needs_root(tmp_path: Path) -> None:
    board = Board(tmp_path, "orin")
    (tmp_path / "bin" / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "bin" / "id").chmod(0o755)
    done = board.setup()
    assert (done.returncode, board.said()) == (3, [])
    assert "need root" in done.stderr


def test_nothing_to_set_up(tmp_path: Path) -> None:
    device = Device(tmp_path, KEY.public_pem)
    device.lay(sealed(KEY).archive)
    assert device.run("setup.sh", "--dry-run").stdout.startswith("nothing to set: cpu")
