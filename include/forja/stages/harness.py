"""What is the same for every stage: inputs, key, claim, receipt.

``prepare`` finds out whether there is anything to do; Airflow calls it too, so that adopted work costs no process and no
pod. ``execute`` does the work under a claim.
"""

from __future__ import annotations

import datetime
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forja import claims, engines, keys, receipts, stages
from forja.errors import BadInput, Conflict, Refused
from forja.lake import Lake, sha256, split_table_ref, table_digest
from forja.receipts import Input, Receipt
from forja.recipes.base import Recipe
from forja.settings import Settings
from forja.stages.base import Outcome, Plan, Stage, Work
from forja.stages.ingest import table_path

Refs = Mapping[str, list[str]]
MAKER = {"dataset": "transform", "training": "train", "model": "register", "optimize": "optimize", "gate": "gate"}
"""Stage that makes each input; ``raw`` is a version of the table that ingest writes."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A stage, ready to run or to be adopted."""

    stage: Stage
    plan: Plan[Any]
    code: str
    key: str
    folder: str
    command: str
    receipt: Receipt | None
    """The receipt of this very work, when it is done and intact."""


def prepare(lake: Lake, verb: str, recipe: Recipe, refs: Refs, variant: str = "") -> Prepared:
    """Resolve inputs, plan, and look for a receipt.

    Raises:
        BadInput: an input that the stage doesn't know or that is missing, or a variant that the recipe doesn't make.
    """
    module = stages.load(verb)
    inputs = resolve(lake, module.STAGE, verb, recipe, refs)
    plan = module.plan(recipe, inputs, variant)
    code = keys.code_digest(f"forja.stages.{verb}", module.STAGE.environment)
    key = keys.stage_key(
        stage=verb, recipe=recipe.name, variant=plan.variant, parts=plan.parts, inputs=inputs, code=code,
        hardware=engines.signature() if module.STAGE.hardware else "",
    )  # fmt: skip
    folder = receipts.place(recipe.team, recipe.name, verb, key)
    receipt = existing(lake, folder) if module.STAGE.repeat == "memoised" else None
    return Prepared(
        stage=module.STAGE, plan=plan, code=code, key=key, folder=folder, receipt=receipt,
        command=command(verb, recipe.name, refs, plan.variant),
    )  # fmt: skip


def resolve(lake: Lake, stage: Stage, verb: str, recipe: Recipe, refs: Refs) -> dict[str, list[Input]]:
    """Digest of every input's content."""
    if set(refs) != set(stage.inputs):
        raise BadInput(
            f"inputs of {verb}", value=sorted(refs), allowed=", ".join(stage.inputs) or "none",
            do=f"pass {' '.join(f'--in {n}=REF' for n in stage.inputs)}",
        )  # fmt: skip
    inputs: dict[str, list[Input]] = {}
    for name in stage.inputs:
        if not refs[name] or (len(refs[name]) > 1 and name not in stage.many):
            raise BadInput(f"input {name} of {verb}", value=list(refs[name]), allowed="one reference")
        # Mapped tasks end in any order: the key must not depend on it.
        inputs[name] = [Input(ref=ref, digest=_digest(lake, recipe, name, ref)) for ref in sorted(refs[name])]
    return inputs


def _digest(lake: Lake, recipe: Recipe, name: str, ref: str) -> str:
    """Digest of one input, which must be of this recipe and of the stage that makes such an input."""
    if name == "raw":
        path, table = split_table_ref(ref)[0], table_path(recipe.team, recipe.name)
        if path != table:
            raise BadInput(f"input raw of {recipe.name}", value=ref, allowed=f"{table}@VERSION")
        return table_digest(lake, ref)
    receipt = receipts.load(lake, ref)
    if (receipt.team, receipt.recipe, receipt.stage) != (recipe.team, recipe.name, MAKER[name]):
        what = f"{receipt.stage} receipt of {receipt.team}/{receipt.recipe}"
        raise BadInput(f"input {name} of {recipe.name}", value=f"{ref}, a {what}", allowed=f"a {MAKER[name]} receipt of {recipe.name}")
    return receipt.digest


def existing(lake: Lake, folder: str) -> Receipt | None:
    """The receipt in ``folder`` when it is there and its outputs are."""
    path = f"{folder}/receipt.json"
    if lake.size(path) is None:
        return None
    receipt = receipts.load(lake, path)
    return receipt if receipts.intact(lake, receipt) else None


def command(verb: str, recipe: str, refs: Refs, variant: str) -> str:
    """The command that does this work again."""
    inputs = [f"--in {name}={ref}" for name, items in refs.items() for ref in items]
    return " ".join([f"./forja stage {verb} --recipe {recipe}", *inputs, *([f"--variant {variant}"] if variant else [])])


def execute(settings: Settings, verb: str, recipe: Recipe, refs: Refs, *, variant: str = "", code: str = "") -> tuple[Receipt, bool]:
    """Do the work of a stage, or adopt it.

    Args:
        code: digest that the caller's code gave; another one here is refused, so that an old image can't do new work.

    Returns:
        The receipt, and whether this call wrote it.

    Raises:
        ForjaError: see the stage.
    """
    lake = Lake(settings.lake)
    prepared = prepare(lake, verb, recipe, refs, variant)
    print(prepared.command, flush=True)
    if code and code != prepared.code:
        raise BadInput(f"code of stage {verb}", value=prepared.code, allowed=code, do="build the image from the commit that Airflow runs")
    memoised = prepared.stage.repeat == "memoised"

    def done() -> bool:
        return memoised and existing(lake, prepared.folder) is not None

    receipt, written = _claimed(settings, lake, prepared, done)
    refuse(receipt)
    return receipt, written


def refuse(receipt: Receipt) -> None:
    """Raise Refused for the receipt of a gate that said no, adopted or not."""
    if reason := receipt.facts.get("refused"):
        raise Refused(f"{receipt.stage} of {receipt.recipe}: {reason}", do=f"see ./forja show {receipt.path}")


def _claimed(settings: Settings, lake: Lake, prepared: Prepared, done: Callable[[], bool]) -> tuple[Receipt, bool]:
    claim = claims.take(lake, prepared.folder, done=done, say=lambda text: print(text, flush=True))
    if claim is None:
        return receipts.load(lake, f"{prepared.folder}/receipt.json"), False
    try:
        return _under_claim(settings, lake, prepared, claim)
    finally:
        claim.release()


def _under_claim(settings: Settings, lake: Lake, prepared: Prepared, claim: claims.Claim) -> tuple[Receipt, bool]:
    if prepared.stage.repeat == "memoised":
        found = existing(lake, prepared.folder)
        if found is not None:
            return found, False
    scratch = _scratch(lake, prepared)
    work = Work(
        settings=settings, lake=lake, folder=prepared.folder, key=prepared.key, scratch=scratch, check=claim.check,
        previous=last(lake, prepared.folder),
    )  # fmt: skip
    started, clock = _now(), time.monotonic()
    try:
        outcome = stages.load(prepared.plan.stage).run(prepared.plan, work)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    receipt = _receipt(prepared, outcome, started, time.monotonic() - clock)
    written = _write(lake, prepared, receipt, work)
    for path in outcome.obsolete:
        lake.delete(path)
    return written


def _scratch(lake: Lake, prepared: Prepared) -> Path:
    """An empty folder of this very work: what a killed try left in it is removed by the next."""
    folder = Path(tempfile.gettempdir()) / f"forja-{prepared.plan.stage}-{prepared.key[:16]}-{sha256(lake.root.encode())[:8]}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


def _write(lake: Lake, prepared: Prepared, receipt: Receipt, work: Work) -> tuple[Receipt, bool]:
    """First receipt wins; the loser adopts it and discards its own bytes."""
    if prepared.stage.repeat == "reconciled":
        return _append(lake, prepared.folder, receipt)
    path = f"{prepared.folder}/receipt.json"
    damaged = lake.size(path) is not None and existing(lake, prepared.folder) is None
    if damaged:
        # Its outputs are gone: the work was done again, so the record is written again.
        lake.delete(path)
    if lake.create(path, receipt.to_json()):
        return receipts.load(lake, path), True
    winner = receipts.load(lake, path)
    kept = {o.path for o in winner.outputs.values()}
    for extra in set(work.written) - kept:
        lake.delete(extra)
    return winner, False


def _append(lake: Lake, folder: str, receipt: Receipt) -> tuple[Receipt, bool]:
    """Receipts of a reconciled stage are numbered; when the facts are the last one's, nothing changed and it is adopted."""
    for _ in range(100):
        past = numbered(lake, folder)
        if past:
            last = receipts.load(lake, past[-1])
            if last.facts == receipt.facts and last.outputs == receipt.outputs:
                return last, False
        number = int(past[-1].rpartition("-")[2].removesuffix(".json")) + 1 if past else 1
        path = f"{folder}/receipt-{number:06d}.json"
        if lake.create(path, receipt.to_json()):
            return receipts.load(lake, path), True
    raise Conflict(f"receipts of {folder}: others wrote at the same moment, a hundred times")


def numbered(lake: Lake, folder: str) -> list[str]:
    """Receipts of a reconciled stage, oldest first."""
    return [p for p in lake.list(folder) if p.rpartition("/")[2].startswith("receipt-")]


def last(lake: Lake, folder: str) -> Receipt | None:
    """What a reconciled stage did last, when its outputs are still there."""
    past = numbered(lake, folder)
    receipt = receipts.load(lake, past[-1]) if past else None
    return receipt if receipt is not None and receipts.intact(lake, receipt) else None


def _receipt(prepared: Prepared, outcome: Outcome, started: str, seconds: float) -> Receipt:
    plan = prepared.plan
    facts = {**outcome.facts, "refused": outcome.refused} if outcome.refused else outcome.facts
    return Receipt(
        stage=plan.stage, recipe=plan.recipe, team=plan.team, variant=plan.variant, key=prepared.key, code=prepared.code,
        command=prepared.command, inputs={k: list(v) for k, v in plan.inputs.items()}, outputs=outcome.outputs,
        metrics=outcome.metrics, facts=facts, report=outcome.report, versions=outcome.versions,
        started=started, finished=_now(), seconds=round(seconds, 3),
    )  # fmt: skip


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
