"""A recipe's whole chain through Airflow's scheduler: what ``forja run`` does and its benchmark measures."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from forja import receipts
from forja.errors import ForjaError
from forja.lake import Lake
from forja.receipts import Receipt
from forja.recipes.base import Recipe
from forja.services.airflow_api import Airflow, TaskRun
from forja.settings import Settings

LIMIT_S = 3 * 3600.0
VERBS = ("ingest", "admit", "transform", "train", "register", "optimize", "gate", "release")
"""Order in which people read the tasks of both DAGs."""
PATH = VERBS[1:]
"""Tasks on the only path of a recipe's DAG; of the mapped ones the last to end counts."""


class Watch(Protocol):
    """Is told about the tasks of a run as they change."""

    def __call__(self, dag: str, tasks: list[TaskRun]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class ChainRun:
    """One run of both DAGs that ended well."""

    recipe: str
    run_id: str
    tasks: list[TaskRun]
    """Of the ingest DAG, then of the recipe's own."""
    facts: dict[str, dict[str, Any]]
    """What each task pushed, by ``task`` or ``task[label]``: seconds, spawned, ended, adopted, metrics."""
    release: Receipt
    started: str
    ended: str


def name(task: TaskRun) -> str:
    """A task's name, with the label of its member when it is mapped."""
    return f"{task.task}[{task.label or task.map_index}]" if task.map_index >= 0 else task.task


def run(settings: Settings, recipe: Recipe, watch: Watch, say: Callable[[str], None]) -> ChainRun:
    """Ingest what Kafka has, then run the recipe on that version of the raw table.

    Raises:
        ForjaError: a task failed; the message names it and holds the end of its log.
    """
    run_id = f"hand-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S%f}"
    ingest, lake = f"{recipe.name}_ingest", Lake(settings.lake)
    with Airflow(settings) as api:
        for dag in (ingest, recipe.name):
            api.wait_for_dag(dag)
        first = _one(api, ingest, run_id, {}, watch)
        # Skipped or not: a run that found nothing new names the receipt of the one that found what is there.
        ingested = receipts.load(lake, next(api.xcom(ingest, run_id, t, "facts")["receipt"] for t in first))
        say(f"{ingested.facts['raw']}: {ingested.report[0]}")
        second = _one(api, recipe.name, run_id, {"raw": ingested.facts["raw"]}, watch)
        facts = {name(t): api.xcom(d, run_id, t, "facts") or {} for d, tasks in ((ingest, first), (recipe.name, second)) for t in tasks}
        ended = api.run(recipe.name, run_id)
        release = next(api.xcom(recipe.name, run_id, t) for t in second if t.task == "release")
    return ChainRun(
        recipe=recipe.name, run_id=run_id, tasks=first + second, facts=facts,
        release=receipts.load(lake, release), started=ended["start_date"], ended=ended["end_date"],
    )  # fmt: skip


def _one(api: Airflow, dag: str, run_id: str, conf: dict[str, Any], watch: Watch) -> list[TaskRun]:
    api.trigger(dag, run_id, conf)
    state = api.follow(dag, run_id, lambda tasks: watch(dag, sort(tasks)), limit_s=LIMIT_S)
    tasks = sort(api.tasks(dag, run_id))
    watch(dag, tasks)
    if state == "success":
        return tasks
    failed = [t for t in tasks if t.state == "failed"]
    lines = [line for t in failed[:1] for line in api.log(dag, run_id, t)[-15:]]
    raise ForjaError(
        f"{dag}: {', '.join(name(t) for t in failed) or 'the run'} failed", value="\n".join(lines), do=f"look at {api.page(dag, run_id)}"
    )


def sort(tasks: list[TaskRun]) -> list[TaskRun]:
    """Tasks in the order of the chain."""
    return sorted(tasks, key=lambda t: (VERBS.index(t.task) if t.task in VERBS else len(VERBS), t.map_index))


def overhead(done: ChainRun) -> float:
    """Seconds that the scheduler adds per task: (wall time - the stages' own processes, spawn to exit) / tasks on the path.

    The wall time is that of the recipe's DAG, from the start of the run to its end.
    """
    started, ended = (datetime.datetime.fromisoformat(t) for t in (done.started, done.ended))
    busy = 0.0
    for verb in PATH:
        facts = [done.facts[name(t)] for t in done.tasks if t.task == verb]
        spans = [(f["ended"], f["ended"] - f["spawned"]) for f in facts if f.get("spawned") is not None]
        busy += max(spans, default=(0.0, 0.0))[1]
    return round(((ended - started).total_seconds() - busy) / len(PATH), 3)
