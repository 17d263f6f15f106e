"""engine.json: what a plan was built from, by what and for what; and the refusal to load it anywhere else.

A plan is good for one version of the library and one kind of GPU (TensorRT's support matrix), and TensorRT itself finds out late, or
not at all when only the model is another. So the document is compared before a byte of the plan is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from forja.engines import log
from forja.engines.host import Host
from forja.errors import BadInput, Refused
from forja.lake import sha256

SCHEMA = 1
FIELDS = (
    "schema", "onnx", "precision", "plan", "bytes", "backend", "library", "compute_capability", "gpu", "driver", "profiles", "flags",
    "settings", "layers", "layers_reason", "build_s", "timing_cache",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Built:
    """What the builder gave, and how it was set."""

    plan: bytes
    """Serialised engine."""
    input: str
    """Name of the model's input."""
    flags: tuple[str, ...]
    """Builder flags that were set."""
    settings: Mapping[str, Any]
    """Other settings of the builder."""
    report: str
    """The builder's list of the engine's layers; empty when it gave none."""
    cache: bytes | None = None
    """Timing cache after the build; None where none is kept."""
    reused: bool = False
    """Whether the timing cache that was given was taken."""
    seconds: float = field(default=0.0)
    """Parsing and building took this long."""


def dotted(capability: str) -> str:
    """Compute capability as NVIDIA writes it: ``SM86`` to ``8.6``, ``SM120`` to ``12.0``; empty stays empty."""
    digits = capability.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1]}" if digits else ""


def document(
    model: bytes, built: Built, place: Host, *, precision: str, profiles: Sequence[Sequence[int]], target: str,
    layers: Mapping[str, Any] | None, reason: str,
) -> dict[str, Any]:  # fmt: skip
    """The content of engine.json.

    Args:
        model: the ONNX file that the plan was built from.
        built: what the builder gave.
        place: where it was built.
        precision: what was asked for: a variant's name.
        profiles: smallest, best and largest shape of the input.
        target: compute capability that it was built for ahead of time, for example ``SM86``; empty for the GPU of ``place``. Ahead
            of time ``gpu`` and ``driver`` are null: any of that generation will do.
        layers: ``inspect.summary``, None when nothing says anything about layers.
        reason: why ``layers`` is None.
    """
    low, best, high = (list(shape) for shape in profiles)
    return {
        "schema": SCHEMA,
        "onnx": sha256(model),
        "precision": precision,
        "plan": sha256(built.plan),
        "bytes": len(built.plan),
        "backend": place.backend,
        "library": place.library,
        "compute_capability": dotted(target) or place.compute_capability,
        "gpu": None if target else place.gpu,
        "driver": None if target else place.driver,
        "profiles": [{"input": built.input, "min": low, "opt": best, "max": high}],
        "flags": list(built.flags),
        "settings": dict(built.settings),
        "layers": None if layers is None else dict(layers),
        "layers_reason": reason if layers is None else None,
        "build_s": round(built.seconds, 3),
        "timing_cache": None if built.cache is None else {"sha256": sha256(built.cache), "reused": built.reused},
    }


def parse(data: bytes, where: str = "engine.json") -> dict[str, Any]:
    """A document that was stored; BadInput for bytes that aren't one, or of another schema."""
    try:
        body = json.loads(data)
    except ValueError as error:
        raise BadInput(f"{where}: not JSON", value=data[:40]) from error
    if not isinstance(body, dict) or body.get("schema") != SCHEMA:
        raise BadInput(f"{where}: schema", value=body.get("schema") if isinstance(body, dict) else type(body).__name__, allowed=str(SCHEMA))
    if missing := [name for name in FIELDS if name not in body]:
        raise BadInput(f"{where}: fields that aren't there", value=missing)
    return body


def check(document: Mapping[str, Any], host: Host, *, plan: bytes, onnx: str, rebuild: str = "") -> None:
    """Whether a plan may be loaded at ``host``.

    The library's version must be equal to the last digit, and so must the compute capability. The GPU's name counts for a plan that
    was built on one: kernels were timed there. Its driver counts as the oldest that will do, since newer drivers run what older
    ones did.

    Args:
        document: engine.json of the plan.
        host: where it is to be loaded.
        plan: its bytes.
        onnx: SHA-256 of the ONNX file that it should have been built from.
        rebuild: command that builds it anew; the message ends with it.

    Raises:
        BadInput: the document is of another schema.
        Refused: something differs; the message names each field with both values.
    """
    if document.get("schema") != SCHEMA:
        raise BadInput("engine.json: schema", value=document.get("schema"), allowed=str(SCHEMA))
    if wrong := differences(document, host, plan=plan, onnx=onnx):
        names = ", ".join(wrong)
        raise Refused(
            f"engine: not to be loaded, {names} {'differs' if len(wrong) == 1 else 'differ'} from engine.json",
            value={name: found for name, (found, _) in wrong.items()},
            allowed=", ".join(f"{name} {wanted}" for name, (_, wanted) in wrong.items()),
            do=f"build it again: {rebuild}" if rebuild else "build it again where it is to run",
        )


def differences(document: Mapping[str, Any], host: Host, *, plan: bytes, onnx: str) -> dict[str, tuple[object, str]]:
    """What differs, see ``check``: by field, what was found and what engine.json wants."""
    found: dict[str, object] = {
        "plan": sha256(plan), "bytes": len(plan), "onnx": onnx, "backend": host.backend, "library": host.library,
        "compute_capability": host.compute_capability or "no GPU",
    }  # fmt: skip
    if document["gpu"] is not None:
        found["gpu"] = host.gpu or "no GPU"
    wrong = {name: (value, str(document[name])) for name, value in found.items() if value != document[name]}
    if document["driver"] is not None and _version(host.driver) < _version(document["driver"]):
        wrong["driver"] = (host.driver or "no driver", f"{document['driver']} or newer")
    return wrong


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", text))


def load(trt: ModuleType, plan: bytes, document: Mapping[str, Any], host: Host, *, onnx: str, rebuild: str = "") -> Any:
    """The engine of a plan, an ``ICudaEngine`` on the GPU of ``host``.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        plan: as in ``check``, like the others.

    Raises:
        BadInput, Refused: see ``check``; also Refused when the library doesn't take the plan, with its last messages.
    """
    check(document, host, plan=plan, onnx=onnx, rebuild=rebuild)
    logger = log.keeper(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        do = f"build it again: {rebuild}" if rebuild else ""
        raise Refused(f"engine: {host.backend} {host.library} doesn't take the plan", value=log.last(logger), do=do)
    return engine
