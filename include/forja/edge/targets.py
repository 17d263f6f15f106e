"""The catalogue of edge devices: what each reads, and how an engine is built on it.

Only the standard library may be imported here: recipes name targets.

int8 has targets of its own: nothing here has measured on a device whether it beats float16, so it is asked for by name, and receipts of
both targets tell. bf16 is nobody's: ONNX Runtime can't run it on a CPU, so a bundle of it couldn't be proven before it is sent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from forja.errors import BadInput

Runtime = Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of device."""

    name: str
    title: str
    """For people."""
    runtime: Runtime
    """What answers there: ``tensorrt`` builds its engine on the device, ``tensorrt-rtx`` gets it ahead of time."""
    opset: int
    """Newest ONNX opset that its parser takes."""
    ir: int
    """Newest ONNX IR version that it takes."""
    precisions: tuple[str, ...]
    """Variants that it runs, best first."""
    python: tuple[int, int]
    """Python on it. The bundle's scripts keep to 3.6, the oldest of all."""
    max_batch: int
    """Largest batch of its engine; a recipe's own limit may be smaller."""
    tensorrt: tuple[str, str] = ("", "")
    """Oldest version of its TensorRT, and the first that is too new; empty for ONNX Runtime."""
    weak: bool = False
    """Whether precision is a flag of the builder and not in the file alone: TensorRT before 10.12, where strong typing became whole."""
    compute_capability: str = ""
    """Generation of its GPU."""
    models: tuple[str, ...] = ()
    """Words of which /proc/device-tree/model has one; empty when the device has no such file."""
    modes: tuple[str, ...] = ()
    """Power modes of nvpmodel by name, fastest first."""
    nvpmodel: int | None = None
    """Number of the first of them where NVIDIA documents a single one; setup.sh believes the device's /etc/nvpmodel.conf first."""
    swap_mib: int = 0
    """Swap that building an engine needs, in MiB; 0 for none."""
    workspace_mib: int = 1024
    """Scratch memory that a kernel of the engine may use, in MiB."""
    dla: str = ""
    """What is known of its deep-learning accelerators, for people; no bundle uses them."""


# Opsets: onnx-tensorrt docs/operators.md, branches release/8.2-GA (13) and release/8.5-GA (17); for 10.3 the support matrix (9 to 20), for
# 10.16 the same (9 to 24). IR 7 for 8.2: that it takes a newer one isn't known. Versions: NVIDIA's pages of JetPack 4.6, 5.1.x, 6.2 and
# 7.2.2; TensorRT 11.4.1 "Migrating Jetson" for the SBSA package.
# DLA: TensorRT's "Working with DLA" (10.7 is the last 10.x with it; 11.4.1 has it on AGX Orin with JetPack 7.2.2, Thor has none).
_NANO = Target(
    name="jetson-nano", title="Jetson Nano, JetPack 4.6", runtime="tensorrt", opset=13, ir=7, precisions=("fp16", "fp32"), python=(3, 6),
    # sm_53 has no int8 instructions (TensorRT 8.2 support matrix, "hardware and precision").
    tensorrt=("8.2", "8.3"), weak=True, compute_capability="SM53", max_batch=4, models=("Jetson Nano",), modes=("MAXN",), nvpmodel=0,
    swap_mib=4096, dla="none on this chip",
)  # fmt: skip
_XAVIER_NX = Target(
    name="xavier-nx", title="Jetson Xavier NX, JetPack 5", runtime="tensorrt", opset=17, ir=8, precisions=("fp16", "fp32"), python=(3, 8),
    # Mode 8: "Supported Modes and Power Efficiency" of the Jetson Linux 35 developer guide.
    tensorrt=("8.5", "8.6"), weak=True, compute_capability="SM72", max_batch=8, models=("Xavier NX",), modes=("MODE_20W_6CORE",),
    nvpmodel=8, swap_mib=2048, dla="two; float16 and int8 only, layers that they lack fall back to the GPU",
)  # fmt: skip
_ORIN = Target(
    name="orin", title="Jetson Orin (Nano, NX, AGX), JetPack 6", runtime="tensorrt", opset=20, ir=9, precisions=("fp16", "fp32"),
    # MAXN_SUPER is mode 2 on an Orin Nano and 0 on an Orin NX (JetPack 6.2): by name alone.
    python=(3, 10), tensorrt=("10.3", "10.4"), weak=True, compute_capability="SM87", max_batch=16, models=("Orin",),
    modes=("MAXN_SUPER", "MAXN"), dla="two on Orin NX and AGX Orin, none on Orin Nano; usable up to TensorRT 10.7",
)  # fmt: skip
_AGX_ORIN = Target(
    name="agx-orin", title="Jetson AGX Orin, JetPack 7", runtime="tensorrt", opset=24, ir=10, precisions=("fp16", "fp32"),
    python=(3, 12), tensorrt=("10.16", "11.5"), compute_capability="SM87", max_batch=16, models=("AGX Orin",), modes=("MAXN",), nvpmodel=0,
    dla="two; with TensorRT 11.4.1 on JetPack 7.2.2 only, not with 10.16",
)  # fmt: skip
_THOR = Target(
    name="thor", title="Jetson AGX Thor, JetPack 7", runtime="tensorrt", opset=24, ir=10, precisions=("fp16", "fp32"),
    python=(3, 12), tensorrt=("10.16", "11.5"), compute_capability="SM110", max_batch=16, models=("Thor",), modes=("MAXN",), nvpmodel=0,
    dla="none on this chip",
)  # fmt: skip
_RTX = Target(
    name="rtx-ampere", title="RTX workstation, Ampere (RTX 30, A-series), TensorRT-RTX", runtime="tensorrt-rtx", opset=17, ir=8,
    # A plan loads with the library that built it: export narrows this to the version that it built with.
    precisions=("fp16", "fp32"), python=(3, 10), tensorrt=("1.0", "2.0"), compute_capability="SM86", max_batch=32, dla="none",
)  # fmt: skip
_CPU = Target(
    name="cpu", title="any x86-64 or arm64 Linux, ONNX Runtime 1.12 or newer", runtime="onnxruntime", opset=17, ir=8, precisions=("fp32",),
    python=(3, 8), max_batch=32, dla="none",
)  # fmt: skip


def _int8(target: Target) -> Target:
    # The file of the mixed variant holds its precisions itself, so only a strongly typed builder keeps them.
    precisions = ("int8",) if target.weak else ("int8", "mixed")
    return replace(target, name=f"{target.name}-int8", title=f"{target.title}, int8", precisions=precisions)


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        _NANO, _XAVIER_NX, _int8(_XAVIER_NX), _ORIN, _int8(_ORIN), _AGX_ORIN, _int8(_AGX_ORIN), _THOR, _int8(_THOR), _RTX,
        replace(_RTX, name="rtx-ada", title="RTX workstation, Ada (RTX 40), TensorRT-RTX", compute_capability="SM89"),
        replace(_RTX, name="rtx-blackwell", title="RTX workstation, Blackwell (RTX 50), TensorRT-RTX", compute_capability="SM120"),
        _CPU,
    )
}  # fmt: skip
"""By name."""


def find(name: str) -> Target:
    """The target called ``name``; BadInput when there is none."""
    if name not in TARGETS:
        raise BadInput("edge target", value=name, allowed=", ".join(TARGETS))
    return TARGETS[name]


def carried(target: Target, variant: str) -> str:
    """The variant whose ONNX file goes into a bundle: for float16 by a builder's flag it is the float32 one.

    A float16 file is no help to a weakly typed builder: it may still choose float32 for any layer, and the casts stay in the graph.
    """
    return "fp32" if target.weak and variant == "fp16" else variant


def flags(target: Target, variant: str) -> tuple[str, ...]:
    """Precision flags of trtexec before 11, which has none: there the file alone says it."""
    # TF32 has ten bits of mantissa: an engine that is called fp32 shall be one (TensorRT turns TF32 on by default).
    exact = ("--noTF32",) if variant == "fp32" else ()
    if target.runtime != "tensorrt":
        return ()
    if not target.weak:
        return ("--stronglyTyped", *exact)
    return {"fp32": exact, "fp16": ("--fp16",), "int8": ("--int8", "--fp16")}[variant]
