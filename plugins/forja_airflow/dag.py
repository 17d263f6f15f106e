"""What DAG files have in common. The arrows stand in the files."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from airflow.sdk import Asset, AssetWatcher, BaseOperator, Param

from forja.recipes.base import Recipe
from forja.settings import Settings
from forja.sites import load_site
from forja.stages import ingest
from forja_airflow import runbook
from forja_airflow.operators import AdmitOperator, StageOperator
from forja_airflow.trigger import Doorbell

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def settings(recipe: Recipe, *, doc_md: str | None) -> dict[str, Any]:
    """Arguments of both DAGs of a recipe.

    ``max_active_runs`` keeps Airflow's default of 16 but for ingest: with one run at a time, events of a burst are left lying
    until another comes. The doorbell rings again, so ingest can live with that; new versions of the raw table can't.
    """
    return {
        "description": recipe.description, "doc_md": doc_md, "tags": [recipe.team, recipe.name, "forja"], "start_date": START,
        "catchup": False, "is_paused_upon_creation": False, "default_args": {"owner": recipe.owner},
    }  # fmt: skip


def raw_asset(recipe: Recipe) -> Asset:
    """The raw table; each event names a version of it."""
    return Asset(name=f"{recipe.name}_raw", uri=f"forja://{ingest.table_path(recipe.team, recipe.name)}", group=recipe.team)


def doorbell(recipe: Recipe) -> Asset:
    """What rings when Kafka holds records that ingest has not read."""
    trigger = Doorbell(topic=recipe.source.topic, group=ingest.group(recipe.name))
    watcher = AssetWatcher(name=f"{recipe.name}_doorbell", trigger=trigger)
    return Asset(name=f"{recipe.name}_events", uri=f"forja-events://{recipe.source.topic}", group=recipe.team, watchers=[watcher])


def schedule(recipe: Recipe) -> Any:
    """New data, and the recipe's clock when it has one."""
    if recipe.triggers.schedule is None:
        return [raw_asset(recipe)]
    from airflow.sdk import AssetOrTimeSchedule, CronTriggerTimetable  # croniter takes its time, in every task

    clock = CronTriggerTimetable(recipe.triggers.schedule, timezone="UTC")
    return AssetOrTimeSchedule(timetable=clock, assets=[raw_asset(recipe)])


def params(recipe: Recipe) -> dict[str, Param]:
    """The form that a person sees who starts the DAG."""
    table = ingest.table_path(recipe.team, recipe.name)
    return {
        "raw": Param(
            None, type=["null", "string"], title="Version of the raw table", pattern=f"^{table}@[0-9]+$",
            description_md=f"Leave empty for the newest. Otherwise `{table}@VERSION`: the same version gives the same model again.",
        )
    }  # fmt: skip


def admit(recipe: Recipe) -> AdmitOperator:
    """The task that lets a run pass, and pins its raw table."""
    return AdmitOperator(
        task_id="admit", recipe=recipe.name, doc_md=runbook.ADMIT, retries=2, retry_delay=datetime.timedelta(seconds=5),
        execution_timeout=datetime.timedelta(minutes=10),
    )  # fmt: skip


def stage(verb: str, recipe: Recipe, *, variants: Sequence[str] = (), outlets: Sequence[Asset] = (), **inputs: Any) -> Any:
    """The task of a stage, with the operator that its profile's runner asks for.

    Args:
        variants: maps the task over these.
        outlets: assets that the stage updates.
        inputs: the stage's inputs: tasks, references, or lists of references.

    Returns:
        A StageOperator, a PodStageOperator or, of several nodes, a GangStageOperator; any of them mapped.
    """
    site = load_site(Settings.from_env().site)
    profile = site.profile(getattr(recipe.profiles, verb))
    given = {name: value.output if _is_task(value) else value for name, value in inputs.items()}
    arguments: dict[str, Any] = {
        "task_id": verb, "verb": verb, "recipe": recipe.name, "inputs": given, "doc_md": runbook.of(verb), "pool": profile.pool,
        "pool_slots": profile.slots, "retries": profile.retries, "retry_delay": datetime.timedelta(seconds=5),
        "retry_exponential_backoff": True, "max_retry_delay": datetime.timedelta(minutes=5),
        "execution_timeout": datetime.timedelta(seconds=profile.run_timeout_s),
    }  # fmt: skip
    if outlets:
        # An inlet too: the task asks what was announced last.
        arguments |= {"outlets": list(outlets), "inlets": list(outlets)}
    operator: type[BaseOperator] = StageOperator
    if profile.runner == "kubernetes":
        from forja_airflow.pods.operator import PodStageOperator  # five seconds of imports, only where pods run
        from forja_airflow.pods.spec import pod

        operator = PodStageOperator
        arguments |= pod(profile, site=site, recipe=recipe, verb=verb)
    if profile.nodes > 1:
        from forja_airflow.gang.operator import GangStageOperator, gang

        operator = GangStageOperator
        arguments |= gang(profile, site=site, recipe=recipe, verb=verb)
    if variants:
        return operator.partial(map_index_template="{{ task.variant }}", **arguments).expand(variant=list(variants))
    return operator(**arguments)


def _is_task(value: object) -> bool:
    from airflow.sdk.definitions.mappedoperator import MappedOperator

    return isinstance(value, BaseOperator | MappedOperator)
