"""Whether an engine came out in the precision that was asked for.

Asking proves nothing: TensorRT 10 treated precision flags as hints, and a graph without the right types gives a good engine of
another precision. Three things tell: the ONNX file itself, the types of the engine's layers, and the plan's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from forja.engines.inspect import WIDTH
from forja.engines.weights import Weight, weights
from forja.lake import sha256

Value = Literal["proven", "wrong", "not measured"]
MAIN = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "int8", "mixed": "int8"}
"""Type of weights that makes a variant what it is."""
KERNELS = 8 << 20
"""Bytes of a plan that may be anything but weights. Seen with TensorRT-RTX 1.7: 0.5 MB for ResNet-18 in fp32 and fp16, 2.9 MB in int8."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is known of an engine's precision."""

    value: Value
    """``proven``: it is what was asked for; ``wrong``: it isn't; ``not measured``: nothing here could tell."""
    reason: str
    """How that is known, or why it isn't."""


def precision_verdict(document: Mapping[str, Any], model: bytes) -> Verdict:
    """Whether the engine is of the precision that ``document`` says was asked for.

    Args:
        document: engine.json.
        model: the ONNX file that it was built from.
    """
    asked = str(document["precision"])
    if sha256(model) != document["onnx"]:
        return Verdict(value="wrong", reason=f"built from another ONNX file than this one: {document['onnx']}")
    found = weights(model)
    if not found:
        return Verdict(value="not measured", reason="the model has no layers with constant weights")
    judged = [by_file(asked, found), by_layers(asked, found, document["layers"]), by_size(found, int(document["bytes"]))]
    for value in ("wrong", "proven"):
        if reasons := [v.reason for v in judged if v.value == value]:
            return Verdict(value=value, reason="; ".join(reasons))
    return Verdict(value="not measured", reason="; ".join(v.reason for v in judged))


def by_file(asked: str, found: Sequence[Weight]) -> Verdict:
    """What the ONNX file says: wrong when its weights aren't of the type that was asked for; it can't prove more."""
    main = MAIN[asked]
    others = [w.node for w in found if w.precision != main]
    if len(others) == len(found) or (asked == "fp32" and others):
        return Verdict(value="wrong", reason=f"the ONNX file isn't {asked}: {_some(others)} of {len(found)} layers are of another type")
    return Verdict(value="not measured", reason=f"{len(found) - len(others)} of {len(found)} layers are {main} in the ONNX file")


def by_layers(asked: str, found: Sequence[Weight], layers: Mapping[str, Any] | None) -> Verdict:
    """What the engine's layers say: each layer with weights must compute in the type that its nodes have in the file.

    Proof takes half of the file's layers or more: a report that leaves most of them out proves nothing.
    """
    judged = _judged(found, layers["weighted"]) if layers else []
    if layers is None or not judged:
        return Verdict(value="not measured", reason="layers: nothing says in which types they compute")
    said = "the inspector" if layers["source"] == "inspector" else "the builder's report of the plan, which no GPU has loaded"
    shown = f"layers, by {said}"
    if off := [f"{name} in {precision}" for name, precision, types in judged if precision not in types]:
        what = f"{_some(off)} of {len(judged)} with weights compute in another type than the file's"
        return Verdict(value="wrong", reason=f"{shown}: {what}")
    right = sum(precision == MAIN[asked] for _, precision, _ in judged)
    if not right:
        return Verdict(value="wrong", reason=f"{shown}: none of {len(judged)} with weights computes in {MAIN[asked]}")
    if len(judged) < len(found) / 2:
        return Verdict(value="not measured", reason=f"{shown}: only {len(judged)} of the file's {len(found)} with weights are in it")
    return Verdict(value="proven", reason=f"{shown}: {right} of {len(judged)} with weights compute in {MAIN[asked]}")


def _judged(found: Sequence[Weight], weighted: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, set[str]]]:
    """Layers that the file's weights went into: name for people, type, and the types that the file has for it."""
    wanted = {w.node: w.precision for w in found if w.node}
    # Nodes without a name get one from TensorRT: then any type that the file has will do.
    named = any(wanted.keys() & set(item["nodes"]) for item in weighted)
    judged = []
    for item in weighted:
        nodes = [n for n in item["nodes"] if n in wanted]
        types = {wanted[n] for n in nodes} if named and item["nodes"] else {w.precision for w in found}
        if types and item["precision"]:  # without types it is a table that no layer of the file multiplies with
            judged.append((" + ".join(nodes) or item["name"], item["precision"], types))
    return judged


def by_size(found: Sequence[Weight], size: int) -> Verdict:
    """What the plan's size says, where weights dominate; a small network's plan is mostly kernels.

    In the file's types the weights take A bytes, each in the next wider type B. A plan smaller than A can't hold them. One that is
    closer to A than to B holds most of them in the file's types, whatever its kernels take; one of B or more doesn't, unless its
    kernels take more than KERNELS. For float32, which has no wider type, half of A takes B's place.

    Args:
        found: the weights of the ONNX file.
        size: bytes of the plan.
    """
    found = list({w.tensor: w for w in found}.values())  # layers may share their weights
    fits = sum(w.elements * WIDTH[w.stored] for w in found) // 8
    plain = all(WIDTH[w.stored] == 32 for w in found)
    wider = sum(w.elements * min(32, 2 * WIDTH[w.stored]) for w in found) // 8
    shown = f"size: {size / 1e6:.2f} MB for weights of {fits / 1e6:.2f} MB in the file's types"
    if size < fits:
        return Verdict(value="wrong", reason=f"{shown}: they can't be in it")
    if plain:
        if size - fits // 2 > KERNELS and size - fits <= KERNELS:
            return Verdict(value="proven", reason=f"{shown}: in 16 bits {(size - fits // 2) / 1e6:.1f} MB of it would be kernels")
        return Verdict(value="not measured", reason=f"{shown} tells no 16 from 32 bits")
    if size >= wider and size - fits > KERNELS:
        return Verdict(value="wrong", reason=f"{shown}, enough for {wider / 1e6:.2f} MB: they are in a wider type")
    share = (wider - size) / (wider - fits)
    if share > 0.5:
        return Verdict(value="proven", reason=f"{shown}: {share:.0%} of them or more can't be in a wider type")
    return Verdict(value="not measured", reason=f"{shown} is mostly kernels")


def _some(names: Sequence[str], most: int = 3) -> str:
    """A count with the first few names."""
    return f"{len(names)} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"
