"""export: one bundle for one edge target, signed, from the variant that the gate passed and the target runs.

What it does: picks the best variant that the target runs and the gate passed, takes its ONNX file or makes it again at the target's opset,
repeats the golden answers on ONNX Runtime, and writes the bundle as one archive, with the next version number of its line. What a device
would show (that its TensorRT takes the graph, speed, real precision) is not measured here; its own verify.py does that.

When it fails: a Refused says which variants the target runs and what the gate said of them, that answers differ, or that there is no
key to sign with (FORJA_EDGE_KEY). Nothing on any device changes: bundles are handed over by ./forja edge publish.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forja.edge import targets
from forja.edge.targets import Target
from forja.errors import BadInput
from forja.lake import sha256
from forja.receipts import Receipt
from forja.recipes.base import Cnn, Images, Mlp, Optimize, Recipe, Table
from forja.stages.base import Inputs, Outcome, Plan, Stage, Work

if TYPE_CHECKING:
    from forja.edge.bundle import Content, Golden, Sealed
    from forja.edge.remake import Judged, Made

STAGE = Stage(environment="ml", repeat="memoised", inputs=("gate", "model"), variants=True)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What export reads of the recipe, and what of Forja goes into a bundle."""

    dataset: Images | Table
    model: Cnn | Mlp
    optimize: Optimize
    target: Target
    files: str
    """Digest of the scripts that a bundle carries: they are data here, so the code's digest doesn't see them."""


def plan(recipe: Recipe, inputs: Inputs, variant: str = "") -> Plan[Parts]:
    """Plan of one target, which goes by the name of variant; BadInput for one that isn't in the catalogue."""
    if not variant:
        raise BadInput("edge target", value=variant, allowed=", ".join(targets.TARGETS), do="pass --variant TARGET")
    parts = Parts(
        dataset=recipe.dataset, model=recipe.model, optimize=recipe.optimize, target=targets.find(variant), files=scripts()
    )  # fmt: skip
    return Plan(stage="export", recipe=recipe.name, team=recipe.team, parts=parts, inputs=inputs, variant=variant)


@functools.cache
def scripts() -> str:
    """Digest of the scripts that a bundle carries."""
    from forja.edge.bundle import FILES, SCRIPTS

    digest = hashlib.sha256()
    for name in SCRIPTS:
        digest.update(name.encode() + b"\0" + hashlib.sha256((FILES / name).read_bytes()).digest())
    return digest.hexdigest()


def run(plan: Plan[Parts], work: Work) -> Outcome:
    """Make the bundle.

    Raises:
        BadInput: the gate judged another model than ``model``, or the recipe's classes aren't the dataset's.
        Refused: no variant for the target, answers that differ, or no key to sign with.
    """
    from forja.edge import bundle, depot, remake, signing

    signer = signing.from_env()  # first: without it all the rest would be for nothing
    gate, registered, judged = _judged(plan, work)
    remake.same_classes(work, judged.dataset, plan.parts.dataset)
    variant, made, golden, skipped = _made(plan, work, gate, judged)
    content = _content(plan, work, variant, made, golden, {"gate": gate, "register": registered, "optimize": judged.optimize[variant]})
    line = depot.Line(team=plan.team, recipe=plan.recipe, target=plan.parts.target.name)
    place = depot.allocate(work.lake, line, f"{work.key}:{signer.key_id}")
    sealed = bundle.seal(content, place, signer)
    outputs = depot.store(work.lake, line, place.version, sealed)
    work.say(f"bundle {line.folder}/{place.version:06d}, {len(sealed.archive):,} bytes, signed by {signer.key_id[:16]}")
    facts = {
        "target": line.target, "variant": variant, "version": place.version, "manifest_sha256": sealed.digest, "key_id": signer.key_id,
        "expires": place.expires, "made_again": made.again, "skipped": skipped, "device": "not measured",
    }  # fmt: skip
    metrics = {"parity": made.parity, "archive_bytes": float(len(sealed.archive)), "version": float(place.version)}
    if made.rounded is not None:
        metrics["parity_rounded"] = made.rounded
    return Outcome(
        outputs=outputs, metrics=metrics, facts=facts, report=_report(plan.parts.target, facts, metrics, sealed),
        versions=remake.versions(),
    )  # fmt: skip


def _judged(plan: Plan[Parts], work: Work) -> tuple[Receipt, Receipt, Judged]:
    """The gate, the registered model, and what they were made of; BadInput when they aren't of one model."""
    from forja.edge.remake import Judged

    gate, registered = work.receipt(plan.input("gate")), work.receipt(plan.input("model"))
    optimize = {r.variant: r for r in map(work.receipt, gate.inputs["optimize"])}
    given = registered.output("model.onnx").sha256
    for receipt in optimize.values():
        wanted = work.receipt(receipt.inputs["model"][0]).output("model.onnx").sha256
        if given != wanted:
            raise BadInput(
                "input model of export: not the model that the gate judged", value=f"{registered.path} (ONNX {given[:12]})",
                allowed=f"a register receipt of ONNX {wanted[:12]}", do="pass gate and model of one run",
            )  # fmt: skip
    training = work.receipt(registered.inputs["training"][0])
    return gate, registered, Judged(optimize=optimize, training=training, dataset=work.receipt(registered.inputs["dataset"][0]))


def _made(plan: Plan[Parts], work: Work, gate: Receipt, judged: Judged) -> tuple[str, Made, Golden, dict[str, str]]:
    """The best variant whose file bears the golden answers, and why better ones were left out."""
    from forja.edge import choice, remake
    from forja.errors import Refused

    parts, skipped = plan.parts, {}
    verdict = json.loads(work.load(gate, "verdict.json"))
    variants = choice.candidates(parts.target, verdict, gate.path)
    for variant in variants:
        golden = remake.golden(work, judged.optimize[variant])
        try:
            made = remake.make(work, parts.target, variant, judged, (parts.dataset, parts.model, parts.optimize), golden)
        except Refused as error:
            if variant == variants[-1]:
                raise
            skipped[variant] = str(error)
            work.say(f"{parts.target.name}: not {variant}: {error}")
            continue
        return variant, made, golden, skipped
    raise AssertionError("candidates gives one or more")


def _content(plan: Plan[Parts], work: Work, variant: str, made: Made, golden: Golden, receipts: dict[str, Receipt]) -> Content:
    from forja.edge import bundle, remake

    target, limits = plan.parts.target, plan.parts.target.tensorrt
    max_batch = min(target.max_batch, plan.parts.optimize.max_batch)
    plan_bytes, engine = b"", None
    if target.runtime == "tensorrt-rtx":
        plan_bytes, version, engine = remake.ahead_of_time(made.model, target, plan.parts.dataset.shape, variant, max_batch)
        major, minor, *_ = version.split(".")
        limits = (version, f"{major}.{int(minor) + 1}")
        work.say(f"{target.name}: plan of {len(plan_bytes):,} bytes by TensorRT-RTX {version} for {target.compute_capability}")
    facts: dict[str, Any] = {
        "model_version": str(receipts["register"].facts.get("version", "")),
        "receipts": {name: receipt.path for name, receipt in receipts.items()},
        "onnx": {"carries": targets.carried(target, variant), "made_again": made.again, "judged": _digest(receipts["optimize"])},
        "parity": made.parity, "validation": receipts["optimize"].metrics, "engine": engine,
        "not_measured": "whether the device's own runtime takes the graph, its speed and its real precision: verify.py there measures them",
    }  # fmt: skip
    return bundle.Content(
        team=plan.team, recipe=plan.recipe, target=target, variant=variant, dataset=plan.parts.dataset, model=made.model, golden=golden,
        max_batch=max_batch, plan=plan_bytes, tensorrt=limits, facts=facts,
    )  # fmt: skip


def _digest(receipt: Receipt) -> str:
    return receipt.output("model.onnx").sha256


def _report(target: Target, facts: dict[str, Any], metrics: dict[str, float], sealed: Sealed) -> list[str]:
    again = f"made again at opset {target.opset}" if facts["made_again"] else "the file that the gate judged"
    lines = [
        f"{target.name}: version {facts['version']}, {facts['variant']} ({again}), {len(sealed.archive) / 1e6:.2f} MB",
        f"golden answers differ by {metrics['parity']:.1e} at most on ONNX Runtime; on the device: not measured",
        f"manifest {sha256(sealed.manifest)[:16]}, signed by {facts['key_id'][:16]}, may be installed until {facts['expires']}",
    ]
    return lines + [f"not {variant}: {why}" for variant, why in facts["skipped"].items()]
