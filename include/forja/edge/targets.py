"""The catalogue of edge devices: what each reads, and how an engine is built on it.

Only the standard library may be imported here: recipes name targets.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of device."""

    name: str
    title: str
    """For people."""
    opset: int
    """Newest ONNX opset that its parser takes."""
    ir: int
    """Newest ONNX IR version that it takes."""
    precisions: tuple[str, ...]
    """Variants that it runs, best first."""
    python: tuple[int, int] = (3, 10)
    """Oldest Python on it: the bundle's scripts keep to its syntax."""
    tensorrt: str = ""
    """Version of TensorRT on it; empty for ONNX Runtime."""


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            name="jetson-nano", title="Jetson Nano, JetPack 4.6", opset=13, ir=7, precisions=("fp16", "fp32"), python=(3, 6),
            tensorrt="8.2",
        ),
        Target(name="cpu", title="any x86-64 or arm64 Linux, ONNX Runtime", opset=17, ir=8, precisions=("fp32",), python=(3, 10)),
    )
}  # fmt: skip
"""By name."""
