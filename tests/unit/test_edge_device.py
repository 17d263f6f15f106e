"""verify.py and infer.py as a device runs them: real scripts, a real ONNX Runtime, receipts of all that happens."""

from __future__ import annotations

import ctypes
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from unit.edge_parts import CLASSES, MODEL, Device, golden, sealed, signer

from forja.edge import bundle, returns, simulate
from forja.edge.files import infer, runtime, trust
from forja.settings import Settings

KEY = signer()
ORT = str(simulate.interpreter(Settings.from_env()))


def device(tmp_path: Path, **changes: Any) -> Device:
    made = Device(tmp_path, KEY.public_pem, python=ORT)
    made.lay(sealed(KEY, **changes).archive)
    return made


def verified(made: Device, *arguments: str) -> tuple[int, dict[str, Any]]:
    path = made.folder / "receipt.json"
    done = made.run("verify.py", *made.options, "--receipt", str(path), "--device", "bench-1", *arguments)
    assert path.is_file(), done.stdout + done.stderr
    body = json.loads(path.read_text())
    returns.parse(path.read_bytes()) if body["bundle"]["manifest_sha256"] else None  # what comes back is what is taken back
    return done.returncode, body


def test_a_good_bundle_passes_and_is_remembered(tmp_path: Path) -> None:
    made = device(tmp_path)
    code, body = verified(made)
    assert (code, body["outcome"], body["simulated"]) == (0, "passed", False)
    assert body["runtime"]["name"] == "onnxruntime"
    assert body["golden"] == {"samples": 6, "worst": body["golden"]["worst"], "tolerance": 1e-3, "labels_checked": 6}
    assert body["golden"]["worst"] < 1e-6
    assert body["speed"]["runs"] == 200
    assert 0 < body["speed"]["p50_ms"] <= body["speed"]["p99_ms"]
    assert body["device"]["id"] == "bench-1"
    state = json.loads((made.var / "vision.digits" / "state.json").read_text())
    assert (state["version"], state["target"]) == (1, "cpu")
    assert state["manifest"] == body["bundle"]["manifest_sha256"] == trust.digest((made.bundle / "manifest.json").read_bytes())


@pytest.mark.parametrize("option", ["--simulated", "--only"])
def test_what_is_not_remembered(option: str, tmp_path: Path) -> None:
    made = device(tmp_path)
    assert verified(made, option)[0] == 0
    assert not made.var.exists()


def test_another_runtime_is_never_taken_for_the_devices_own(tmp_path: Path) -> None:
    made = device(tmp_path, target="jetson-nano", variant="fp16")
    code, body = verified(made)
    assert (code, body["rule"], "run ./build.sh" in body["reason"]) == (3, "runtime", True)
    code, body = verified(made, "--simulated")
    assert (code, body["simulated"], body["runtime"]["name"]) == (0, True, "onnxruntime, in place of the device's own")


def outputs(change: Callable[[Any], Any]) -> Callable[[Device], None]:
    def act(made: Device) -> None:
        path = made.bundle / "golden" / "outputs.npy"
        path.write_bytes(bundle.npy(change(np.load(path))))

    return act


def labels(*names: str) -> Callable[[Device], None]:
    return lambda made: (made.bundle / "labels.txt").write_text("".join(f"{n}\n" for n in names)) and None


def model(old: bytes, new: bytes) -> Callable[[Device], None]:
    assert old in MODEL
    return lambda made: (made.bundle / "model.onnx").write_bytes(MODEL.replace(old, new)) and None


WEIGHT = np.float32(0.05).tobytes()
TURNED = ("dog", "owl", "cat")
REFUSED: dict[str, tuple[Callable[[Device], None], dict[str, Any], str, str]] = {
    "other answers": (outputs(lambda a: a[::-1]), {}, "golden", "differs by"),
    "just beyond the tolerance": (outputs(lambda a: a + 1.1e-3), {}, "golden", "allowed: 0.001"),
    "answers of fewer classes": (outputs(lambda a: a[:, :2]), {}, "golden", "of shape"),
    "fewer answers": (outputs(lambda a: a[:5]), {}, "golden", "of shape"),
    "NaN weights": (model(WEIGHT, np.float32(np.nan).tobytes()), {}, "golden", "NaN or infinite"),
    "golden answers that are NaN": (outputs(lambda a: a * np.nan), {}, "golden", "differs by nan"),
    "labels in another order, in the file": (labels(*TURNED), {}, "labels", "the manifest"),
    "a label too few": (labels(*CLASSES[:2]), {}, "labels", "the manifest"),
    "labels in another order, everywhere": (labels(*TURNED), {"classes": list(TURNED)}, "labels", "called 'dog', it is 'cat'"),
    "no answer is clear": (lambda made: None, {"tolerance": 0.6}, "labels", "no golden sample"),
    "a broken model": (lambda made: (made.bundle / "model.onnx").write_bytes(b"hello") and None, {}, "runtime", "model.onnx"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    act, fields, rule, words = REFUSED[case]
    made = device(tmp_path)
    act(made)
    made.sign(KEY, **fields)  # as a signer who made this mistake would have
    code, body = verified(made)
    assert (code, body["outcome"], body["rule"]) == (3, "refused", rule)
    assert words in body["reason"]
    assert not made.var.exists(), "what was refused isn't installed"


def test_within_the_tolerance_is_good(tmp_path: Path) -> None:
    made = device(tmp_path)
    outputs(lambda a: a + 0.9e-3)(made)
    made.sign(KEY)
    assert verified(made)[0] == 0


def test_a_refusal_before_anything_is_believed_is_a_receipt_too(tmp_path: Path) -> None:
    made = device(tmp_path)
    (made.bundle / "model.onnx").write_bytes(b"x" * len(MODEL))
    code, body = verified(made)
    assert (code, body["rule"], body["recipe"], body["runtime"]) == (3, "digest", "", None)


def test_nothing_of_a_changed_bundle_is_loaded(tmp_path: Path) -> None:
    made = device(tmp_path)
    (made.bundle / "runtime.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert verified(made)[1]["rule"] == "digest"
    assert not (tmp_path / "ran").exists()
    (made.bundle / "numpy.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert verified(made)[1]["rule"] == "extra"
    assert not (tmp_path / "ran").exists()


def test_a_device_with_a_key_authenticates_its_receipts(tmp_path: Path) -> None:
    made = device(tmp_path)
    assert verified(made)[1]["mac"] is None
    (made.etc / "device.key").write_text("secret\n")
    verified(made)
    returned = returns.parse((tmp_path / "receipt.json").read_bytes())
    assert returned.authentic({"bench-1": "secret"})
    assert not returned.authentic({"bench-1": "other"})
    assert not returned.authentic({"bench-2": "secret"})
    forged = returned.data.replace(b'"fps": ', b'"fps": 9')
    assert not returns.parse(forged).authentic({"bench-1": "secret"})


def test_infer(tmp_path: Path) -> None:
    made = device(tmp_path)
    np.save(tmp_path / "one.npy", golden().inputs[1])
    (tmp_path / "owl.pgm").write_bytes(b"P5 # a comment\n2 2\n255\n" + bytes([0, 0, 200, 0]))
    done = made.run("infer.py", *made.options, "--json", str(tmp_path / "one.npy"), str(tmp_path / "owl.pgm"), "golden/inputs.npy")
    assert done.returncode == 2, "golden/inputs.npy is relative to where it is called"
    done = made.run(
        "infer.py", *made.options, "--json", str(tmp_path / "one.npy"), str(tmp_path / "owl.pgm"), str(made.bundle / "golden/inputs.npy")
    )
    assert done.returncode == 0, done.stderr
    assert [a["answer"] for a in json.loads(done.stdout)] == ["dog", "owl", *CLASSES, *CLASSES]
    (made.bundle / "labels.txt").write_text("x")
    assert made.run("infer.py", *made.options, str(tmp_path / "one.npy")).returncode == 3


FEATURES = ["Type=L", "Type=M", "Torque [Nm]", "Power [W]"]
ROWS: dict[str, tuple[Any, list[float] | str]] = {
    "numbers": ({"Type=L": 1, "Type=M": 0, "Torque [Nm]": 2, "Power [W]": 3.5}, [1, 0, 2, 3.5]),
    "a category by its name": ({"Type": "M", "Torque [Nm]": 2, "Power [W]": 3.5}, [0, 1, 2, 3.5]),
    "a category that isn't there": ({"Type": "H", "Torque [Nm]": 2, "Power [W]": 3.5}, [0, 0, 2, 3.5]),
    "a derived feature is missing": ({"Type": "M", "Torque [Nm]": 2}, r"lacks Power \[W\]"),
    "text for a number": ({"Type": "M", "Torque [Nm]": "2", "Power [W]": 3.5}, "no finite number"),
    "NaN": ({"Type": "M", "Torque [Nm]": float("nan"), "Power [W]": 3.5}, "no finite number"),
    "a list": ([1, 2], "holds list"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows(case: str) -> None:
    values, wanted = ROWS[case]
    if isinstance(wanted, list):
        assert infer.row(values, FEATURES, "x").tolist() == wanted
        return
    with pytest.raises(infer.Wrong, match=wanted):
        infer.row(values, FEATURES, "x")


@pytest.mark.parametrize("data", [b"P6\n2 2\n255\n" + b"0" * 12, b"P5\n2 2\n255\n" + b"0" * 5, b"P5\n2 2\n65535\n" + b"0" * 8, b"hello"])
def test_images_that_are_none(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(data)
    with pytest.raises(infer.Wrong):
        infer.decoded(str(tmp_path / "a.pgm"), grey=True)


class HostCuda:
    """The CUDA runtime's calls, on memory of this process."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def call(self, name: str, *arguments: Any) -> None:
        assert (name, arguments) == ("cudaDeviceSynchronize", ())

    def allocate(self, size: int) -> int:
        self.kept.append(ctypes.create_string_buffer(size))
        return ctypes.addressof(self.kept[-1])

    def copy(self, target: int, source: int, size: int, kind: int) -> None:
        assert kind in (1, 2)
        ctypes.memmove(target, source, size)


def answer(shape: tuple[int, ...], source: int, target: int) -> None:
    count = int(np.prod(shape))
    inputs = np.ctypeslib.as_array((ctypes.c_float * count).from_address(source)).reshape(shape[0], 4)
    logits = np.exp(0.05 * inputs[:, :3] - (0.05 * inputs[:, :3]).max(axis=1, keepdims=True))
    found = (logits / logits.sum(axis=1, keepdims=True)).astype(np.float32)
    ctypes.memmove(target, found.ctypes.data, found.nbytes)


class ByName:
    """An engine of TensorRT 8.5 and later; its own context."""

    num_io_tensors = 2

    def __init__(self, most: int = 4) -> None:
        self.most, self.addresses = most, dict[str, int]()

    def create_execution_context(self) -> Any:
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "input"
        self.shape = shape
        return shape[0] <= self.most

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        answer(self.shape, self.addresses["input"], self.addresses["probabilities"])
        return stream == 0


class ByNumber:
    """An engine of TensorRT 8.2, outputs before inputs."""

    num_bindings = 2

    def create_execution_context(self) -> Any:
        return self

    def get_binding_index(self, name: str) -> int:
        return {"probabilities": 0, "input": 1}[name]

    def set_binding_shape(self, number: int, shape: tuple[int, ...]) -> bool:
        assert number == 1
        self.shape = shape
        return True

    def execute_v2(self, bindings: list[int]) -> bool:
        answer(self.shape, bindings[1], bindings[0])
        return True


def tensorrt(version: str, engine: Any) -> Any:
    logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    loader = SimpleNamespace(deserialize_cuda_engine=lambda data: engine if data == b"plan" else None)
    return SimpleNamespace(__name__="tensorrt", __version__=version, Logger=logger, Runtime=lambda log: loader)


def built(made: Device, version: str = "8.2.1", **facts: Any) -> dict[str, Any]:
    """A bundle with an engine in work/."""
    (made.bundle / "work").mkdir(exist_ok=True)
    (made.bundle / "work" / "engine.plan").write_bytes(b"plan")
    body: dict[str, Any] = json.loads((made.bundle / "manifest.json").read_text())
    facts = {"tensorrt": version, "onnx_sha256": body["files"]["model.onnx"]["sha256"], **facts}
    (made.bundle / "work" / "engine.json").write_text(json.dumps(facts))
    return body


@pytest.mark.parametrize(
    ("target", "version", "engine"),
    [("jetson-nano", "8.2.1.8", ByNumber()), ("orin", "10.3.0.30", ByName()), ("thor", "11.4.1.7", ByName())],
)
def test_tensorrt_by_both_of_its_interfaces(
    target: str, version: str, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = device(tmp_path, target=target, variant="fp16")
    manifest = built(made, ".".join(version.split(".")[:3]))
    monkeypatch.setattr(runtime, "Cuda", HostCuda)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt(version, engine))
    loaded = runtime.load(str(made.bundle), manifest)
    assert np.abs(loaded.run(golden().inputs[:4]) - golden().outputs[:4]).max() < 1e-6
    assert np.abs(loaded.run(golden().inputs[4:]) - golden().outputs[4:]).max() < 1e-6
    speed = runtime.timed(loaded, golden().inputs, 2, 10, 5.0)
    assert speed["runs"] == 10


UNUSABLE: dict[str, tuple[dict[str, Any], str, Any, str]] = {
    "no engine": ({}, "8.2.1.8", ByNumber(), "no engine in work"),
    "built from another model": ({"onnx_sha256": "0" * 64}, "8.2.1.8", ByNumber(), "built from ONNX"),
    "built by another version": ({"tensorrt": "8.2.0"}, "8.2.1.8", ByNumber(), "built by TensorRT 8.2.0"),
    "a version that the bundle isn't for": ({"tensorrt": "8.5.2"}, "8.5.2.2", ByName(), "older than 8.3"),
    "an engine that doesn't load": ({"tensorrt": "8.2.1"}, "8.2.1.8", None, "can't load the engine"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_engines_that_are_not_used(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, version, engine, words = UNUSABLE[case]
    made = device(tmp_path, target="jetson-nano", variant="fp16")
    manifest = json.loads((made.bundle / "manifest.json").read_text())
    if facts:
        built(made, **{"version": "8.2.1", **facts} if "tensorrt" not in facts else {**facts, "version": facts["tensorrt"]})
    monkeypatch.setattr(runtime, "Cuda", HostCuda)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt(version, engine))
    with pytest.raises(runtime.Unusable, match=words):
        runtime.load(str(made.bundle), manifest)


TOOL = """#!{python}
import json, sys
import numpy as np
given = dict(a.partition("=")[::2] for a in sys.argv[1:])
assert given.pop("--loadEngine").endswith("work/engine.plan")
shape = [int(n) for n in given.pop("--shapes").partition(":")[2].split("x")]
if "--exportTimes" in given:
    if {major} >= 11:
        assert "--includeDataTransfers" in given
    times = [{{"latencyMs": 2.0 + i / 100, "computeMs": 1.0}} for i in range(int(given["--iterations"]))]
    json.dump(times, open(given["--exportTimes"], "w"))
else:
    inputs = np.fromfile(given["--loadInputs"].partition(":")[2], np.float32).reshape(shape[0], 4)
    e = np.exp(0.05 * inputs[:, :3]); p = e / e.sum(1, keepdims=True)
    found = [{{"name": "probabilities", "dimensions": "x".join(map(str, p.shape)), "values": p.ravel().tolist()}}]
    json.dump(found, open(given["--exportOutput"], "w"))
"""


@pytest.mark.parametrize(("target", "version"), [("jetson-nano", "8.2.1"), ("thor", "11.4.1")])
def test_trtexec_where_python_has_no_tensorrt(target: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = device(tmp_path, target=target, variant="fp16")
    manifest = built(made, version)
    tool = tmp_path / "trtexec"
    tool.write_text(TOOL.format(python=sys.executable, major=version.split(".")[0]))
    tool.chmod(0o755)
    monkeypatch.setenv("TRTEXEC", str(tool))
    loaded = runtime.load(str(made.bundle), manifest)
    assert isinstance(loaded, runtime.Trtexec)
    assert np.abs(loaded.run(golden().inputs) - golden().outputs).max() < 1e-6
    speed = runtime.timed(loaded, golden().inputs, 20, 50, 5.0)
    assert (speed["runs"], speed["p50_ms"], speed["p99_ms"], speed["protocol"].split(",")[0]) == (50, 2.24, 2.49, "trtexec")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("TRTEXEC")
    with pytest.raises(runtime.Unusable, match="neither the Python module tensorrt nor trtexec"):
        runtime.load(str(made.bundle), manifest)


def test_npy_is_what_numpy_reads() -> None:
    assert np.array_equal(np.load(io.BytesIO(bundle.npy(golden().inputs)), allow_pickle=False), golden().inputs)
