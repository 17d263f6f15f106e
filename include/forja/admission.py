"""Admission: whether a run of the pipeline goes on, and with which version of the raw table.

Every decision is a numbered object in the lake, ``<team>/<recipe>/admissions/<number>.json``, created if absent: of two
runs that decide at the same moment one writes its number first, and the other decides again with that in view.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from forja import keys, stages
from forja.errors import BadInput, Conflict
from forja.lake import Lake, canonical, sha256, split_table_ref, table_digest
from forja.recipes.base import Recipe, Triggers
from forja.stages.ingest import table_path

Cause = Literal["hand", "new data", "schedule"]

LOOK_BACK = 200
"""Decisions that a repeated run reads to find its own."""


CODE = ("transform", "train")
"""Stages whose code makes the model: with the same rows and recipe, other code of theirs is other work."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What a run would do: a version of the raw table, by this recipe and code."""

    raw: str
    """``<team>/<recipe>/raw@<version>``."""
    digest: str
    """Digest of its rows' content."""
    rows: int
    """Rows in it, bad ones included."""
    recipe: str = ""
    """Digest of the whole recipe; empty in decisions that were made before it was recorded."""
    code: str = ""
    """Digest of the code of the stages in CODE, their locks included."""

    def same_work(self, other: Candidate) -> bool:
        """Whether both would make the same model, whatever the versions' numbers."""
        return (self.digest, self.recipe, self.code) == (other.digest, other.recipe, other.code)

    def changed(self, since: Candidate) -> str:
        """What of recipe and code is another one, in words; empty for neither."""
        return " and ".join(n for n in ("recipe", "code") if getattr(self, n) != getattr(since, n))


@dataclass(frozen=True, kw_only=True)
class Run:
    """Who asks."""

    id: str
    """Airflow's run id, or any name that stays the same when the run is tried again."""
    cause: Cause
    """``hand`` always passes."""
    again: bool = False
    """Whether this run may have decided before: a retry keeps the admission that it has."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided, as it stands in the lake."""

    number: int
    run: str
    cause: Cause
    candidate: Candidate
    verdict: Literal["admitted", "skipped", "waiting"]
    """``waiting``: this run goes on when the cool-down is over, for all that came meanwhile."""
    reason: str
    at: float
    """Seconds since 1970, UTC."""
    last: int
    """Number of the newest admitted decision up to this one, 0 for none."""
    until: float = 0.0
    """End of the cool-down that a waiting run waits for, seconds since 1970."""
    waiter: str = ""
    """The run that waits for the end of the present cool-down."""


def decide(
    candidate: Candidate,
    run: Run,
    triggers: Triggers,
    *,
    now: float,
    number: int = 1,
    newest: Decision | None = None,
    admitted: Decision | None = None,
) -> Decision:
    """Decide; pure.

    Args:
        now: seconds since 1970.
        number: number of the decision to be made.
        newest: the decision before this one.
        admitted: the newest decision that admitted a run.
    """
    waiter = newest.waiter if newest and admitted and newest.number > admitted.number else ""
    verdict, reason, until = _verdict(candidate, run, triggers, now, admitted, waiter)
    last = number if verdict == "admitted" else (admitted.number if admitted else 0)
    waiter = {"admitted": "", "waiting": run.id, "skipped": waiter}[verdict]
    return Decision(
        number=number, run=run.id, cause=run.cause, candidate=candidate, verdict=verdict, reason=reason, at=now, last=last,
        until=until, waiter=waiter,
    )  # fmt: skip


def _verdict(
    candidate: Candidate, run: Run, triggers: Triggers, now: float, admitted: Decision | None, waiter: str
) -> tuple[Literal["admitted", "skipped", "waiting"], str, float]:
    if run.cause == "hand":
        return "admitted", "started by hand", 0.0
    if admitted is None:
        return "admitted", "the first run", 0.0
    if candidate.same_work(admitted.candidate):
        return "skipped", f"run {admitted.run} was admitted with the same rows ({admitted.candidate.raw}), recipe and code", 0.0
    if run.cause == "schedule":
        return "admitted", "by schedule", 0.0
    fresh = candidate.rows - admitted.candidate.rows
    changed = candidate.changed(admitted.candidate)
    if fresh < triggers.min_new_rows and not changed:
        return "skipped", f"{fresh} new rows since {admitted.candidate.raw}; the recipe asks for {triggers.min_new_rows}", 0.0
    until = admitted.at + triggers.cooldown_s
    if now >= until:
        reason = f"{fresh} new rows since {admitted.candidate.raw}"
        return "admitted", f"{reason}; since run {admitted.run} changed: {changed}" if changed else reason, 0.0
    if waiter not in ("", run.id):
        return "skipped", f"run {waiter} waits for the end of the cool-down and will take these rows too", 0.0
    ago = f"run {admitted.run} was admitted {now - admitted.at:.0f} s ago"
    return "waiting", f"{ago}; the recipe's cool-down is {triggers.cooldown_s} s", until


def admit(lake: Lake, recipe: Recipe, run: Run, raw: str, clock: Callable[[], float]) -> Decision:
    """Decide and record it.

    Args:
        raw: version of the raw table, from the run's configuration or its event; empty for the newest version at this moment.

    Raises:
        BadInput: ``raw`` is no version of this recipe's table, or there is no table yet.
        Conflict: a hundred others decided meanwhile.
    """
    candidate = pin(lake, recipe, raw)
    for _ in range(100):
        newest = _newest(lake, recipe)
        admitted = _load(lake, recipe, newest.last) if newest and newest.last else None
        if run.again and newest and (own := _own(lake, recipe, newest, run.id)):
            return own
        number = newest.number + 1 if newest else 1
        decision = decide(candidate, run, recipe.triggers, now=clock(), number=number, newest=newest, admitted=admitted)
        if lake.create(_path(recipe, number), json.dumps(dataclasses.asdict(decision), indent=1, sort_keys=True).encode()):
            return decision
    raise Conflict(f"admissions of {recipe.name}: others decided at the same moment, a hundred times")


def pin(lake: Lake, recipe: Recipe, raw: str = "") -> Candidate:
    """A version of the raw table with its digest, the recipe's and the code's; its newest version when ``raw`` is empty."""
    table = table_path(recipe.team, recipe.name)
    version: int | None = None
    if raw:
        path, version = split_table_ref(raw)
        if path != table:
            raise BadInput(f"raw table of {recipe.name}", value=raw, allowed=f"{table}@VERSION")
    delta = lake.table(table, version)
    ref = f"{table}@{delta.version()}"
    code = [keys.code_digest(f"forja.stages.{verb}", stages.load(verb).STAGE.environment) for verb in CODE]
    return Candidate(
        raw=ref, digest=table_digest(lake, ref), rows=int(delta.count()), recipe=sha256(canonical(keys.plain(recipe))),
        code=sha256(canonical(code)),
    )  # fmt: skip


def _own(lake: Lake, recipe: Recipe, newest: Decision, run: str) -> Decision | None:
    """The admission that this run has already; a skip is decided again, since somebody asked again."""
    for number in range(newest.number, max(0, newest.number - LOOK_BACK), -1):
        decision = _load(lake, recipe, number)
        if decision.run == run and decision.verdict == "admitted":
            return decision
    return None


def _newest(lake: Lake, recipe: Recipe) -> Decision | None:
    paths = list(lake.list(_folder(recipe)))
    return _parse(lake.get(paths[-1])) if paths else None


def _load(lake: Lake, recipe: Recipe, number: int) -> Decision:
    return _parse(lake.get(_path(recipe, number)))


def _parse(data: bytes) -> Decision:
    body = json.loads(data)
    return Decision(**{**body, "candidate": Candidate(**body["candidate"])})


def _folder(recipe: Recipe) -> str:
    return f"{recipe.team}/{recipe.name}/admissions"


def _path(recipe: Recipe, number: int) -> str:
    return f"{_folder(recipe)}/{number:08d}.json"
