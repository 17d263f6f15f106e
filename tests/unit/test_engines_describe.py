"""engine.json, and the plans that it keeps from being loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from forja.engines import describe, host
from forja.engines.describe import Built
from forja.engines.host import Host
from forja.errors import BadInput, Refused
from forja.lake import sha256

PLAN, MODEL = b"plan", b"model"
A100 = Host(
    backend="tensorrt", library="11.4.0.106", compute_capability="8.0", gpu="NVIDIA A100-SXM4-80GB", driver="570.86.15"
)  # fmt: skip
BARE = Host(backend="tensorrt-rtx", library="1.7.1.116")
ADA = Host(backend="tensorrt-rtx", library="1.7.1.116", compute_capability="8.9", gpu="NVIDIA RTX 4000", driver="580.65.06")
COMMAND = "./forja stage optimize --recipe digits --variant fp16 --in dataset=a --in model=b"


def document(place: Host, target: str = "", **changes: Any) -> dict[str, Any]:
    built = dataclasses.replace(
        Built(plan=PLAN, input="input", flags=("TF32",), settings={"optimization_level": 3}, report="", seconds=1.23456), **changes
    )  # fmt: skip
    return describe.document(
        MODEL, built, place, precision="fp16", profiles=[(1, 4), (8, 4), (32, 4)], target=target, layers=None, reason="nothing loaded it"
    )


def test_the_document_of_a_plan_for_the_gpu_at_hand() -> None:
    made = document(A100, cache=b"times", reused=True)
    assert made == {
        "schema": 1, "onnx": sha256(MODEL), "precision": "fp16", "plan": sha256(PLAN), "bytes": 4, "backend": "tensorrt",
        "library": "11.4.0.106", "compute_capability": "8.0", "gpu": "NVIDIA A100-SXM4-80GB", "driver": "570.86.15",
        "profiles": [{"input": "input", "min": [1, 4], "opt": [8, 4], "max": [32, 4]}], "flags": ["TF32"],
        "settings": {"optimization_level": 3}, "layers": None, "layers_reason": "nothing loaded it", "build_s": 1.235,
        "timing_cache": {"sha256": sha256(b"times"), "reused": True},
    }  # fmt: skip
    assert describe.parse(json.dumps(made).encode()) == made


def test_ahead_of_time_no_gpu_and_no_driver_are_named() -> None:
    made = document(BARE, target="SM89")
    assert (made["compute_capability"], made["gpu"], made["driver"], made["timing_cache"]) == ("8.9", None, None, None)


@pytest.mark.parametrize(("name", "wanted"), [("SM75", "7.5"), ("SM120", "12.0"), ("SM121", "12.1"), ("", "")])
def test_compute_capability_as_nvidia_writes_it(name: str, wanted: str) -> None:
    assert describe.dotted(name) == wanted


BAD: dict[str, bytes] = {
    "not JSON": b"plan",
    "not a document": b"[]",
    "another schema": b'{"schema": 2}',
    "a field missing": json.dumps({k: v for k, v in document(A100).items() if k != "library"}).encode(),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_document(name: str) -> None:
    with pytest.raises(BadInput, match=r"engine\.json"):
        describe.parse(BAD[name])


GOOD: dict[str, tuple[dict[str, Any], Host]] = {
    "where it was built": (document(A100), A100),
    "a newer driver": (document(A100), dataclasses.replace(A100, driver="580.65.06")),
    "a newer driver with fewer digits": (document(A100), dataclasses.replace(A100, driver="571.2")),
    "ahead of time, any GPU of the generation": (document(BARE, target="SM89"), ADA),
}


@pytest.mark.parametrize("name", GOOD)
def test_loads(name: str) -> None:
    made, place = GOOD[name]
    describe.check(made, place, plan=PLAN, onnx=sha256(MODEL))


REFUSED: dict[str, tuple[Host, dict[str, Any], str, str, str]] = {
    "another model": (A100, {"onnx": sha256(b"other")}, "onnx", sha256(b"other"), sha256(MODEL)),
    "another plan of the same size": (A100, {"plan": b"PLAN"}, "plan", sha256(b"PLAN"), sha256(PLAN)),
    "a plan cut short": (A100, {"plan": b"pla"}, "plan, bytes", "'bytes': 3", "bytes 4"),
    "an older TensorRT": (dataclasses.replace(A100, library="10.16.1.11"), {}, "library", "10.16.1.11", "11.4.0.106"),
    "another build of the same version": (dataclasses.replace(A100, library="11.4.0.107"), {}, "library", "11.4.0.107", "11.4.0.106"),
    "the other library": (dataclasses.replace(A100, backend="tensorrt-rtx"), {}, "backend", "tensorrt-rtx", "tensorrt"),
    "another generation": (dataclasses.replace(A100, compute_capability="9.0"), {}, "compute_capability", "9.0", "8.0"),
    "another GPU of the generation": (dataclasses.replace(A100, gpu="NVIDIA A30"), {}, "gpu", "NVIDIA A30", "NVIDIA A100-SXM4-80GB"),
    "an older driver": (dataclasses.replace(A100, driver="570.86.9"), {}, "driver", "570.86.9", "570.86.15 or newer"),
    "an older driver that sorts behind as text": (dataclasses.replace(A100, driver="99.1"), {}, "driver", "99.1", "570.86.15 or newer"),
    "a driver that can't be read": (dataclasses.replace(A100, driver="unknown"), {}, "driver", "unknown", "570.86.15 or newer"),
    "no GPU": (Host(backend="tensorrt", library="11.4.0.106"), {}, "compute_capability, gpu, driver", "no GPU", "8.0"),
}
"""Host, what else differs, the fields that the message must name, what it must say is here, and what it must want."""


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_a_plan_that_does_not_belong(name: str) -> None:
    place, given, fields, here, wanted = REFUSED[name]
    with pytest.raises(Refused) as caught:
        describe.check(document(A100), place, **{"plan": PLAN, "onnx": sha256(MODEL), "rebuild": COMMAND, **given})
    error = caught.value
    assert isinstance(error.value, Mapping)
    assert list(error.value) == fields.split(", ")
    for word in (*fields.split(", "), here, wanted, COMMAND):
        assert word in str(error), word


def test_refuses_ahead_of_time_on_another_generation() -> None:
    with pytest.raises(Refused, match="compute_capability differs"):
        describe.check(document(BARE, target="SM86"), ADA, plan=PLAN, onnx=sha256(MODEL))


def test_refuses_a_document_of_another_schema() -> None:
    with pytest.raises(BadInput, match="schema"):
        describe.check({**document(A100), "schema": 2}, A100, plan=PLAN, onnx=sha256(MODEL))


def tensorrt(engine: object, said: str = "") -> ModuleType:
    """A stand-in for the module: its runtime logs ``said`` and gives ``engine``."""

    class Logger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        def __init__(self) -> None:
            pass

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> object:
            assert plan == PLAN
            self.logger.log(Logger.INFO, "loaded engine size")
            self.logger.log(Logger.ERROR, said)
            return engine

    made: Any = SimpleNamespace(ILogger=Logger, Runtime=Runtime)
    return made  # type: ignore[no-any-return]


def test_load_gives_the_engine() -> None:
    engine = object()
    assert describe.load(tensorrt(engine), PLAN, document(A100), A100, onnx=sha256(MODEL)) is engine


def test_load_says_what_tensorrt_said() -> None:
    with pytest.raises(Refused, match=r"11\.4\.0\.106 doesn't take the plan.*serialization assertion.*build it again: make") as caught:
        describe.load(tensorrt(None, "serialization assertion"), PLAN, document(A100), A100, onnx=sha256(MODEL), rebuild="make it")
    assert "loaded engine size" not in str(caught.value)


def test_load_checks_before_tensorrt_sees_the_plan() -> None:
    with pytest.raises(Refused, match="plan differs"):
        describe.load(tensorrt(object()), b"PLAN", document(A100), A100, onnx=sha256(MODEL))


KEYS = {
    "a name with spaces and signs": (
        dataclasses.replace(A100, gpu="NVIDIA H100 80GB HBM3 MIG 1g.10gb"),
        "nvidia-h100-80gb-hbm3-mig-1g-10gb",
    ),
    "a plain one": (A100, "nvidia-a100-sxm4-80gb"),
}


@pytest.mark.parametrize("name", KEYS)
def test_timing_cache_lies_by_team_library_and_gpu(name: str) -> None:
    place, gpu = KEYS[name]
    assert host.timing_key("vision", place) == f"vision/timing/tensorrt-11.4.0.106-{gpu}.cache"


@pytest.mark.parametrize("place", [BARE, ADA, Host(backend="tensorrt", library="11.4.0.106")])
def test_no_timing_cache_where_none_is_kept(place: Host) -> None:
    assert host.timing_key("vision", place) == ""
