"""What every runner does around a stage: its environment and key, adoption before it, the receipt and facts after it."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowNotFoundException, AirflowSkipException

from forja import errors, receipts, recipes
from forja.errors import ForjaError
from forja.lake import Lake
from forja.profiles import Profile
from forja.receipts import Receipt
from forja.settings import ROOT, Settings
from forja.stages import harness

if TYPE_CHECKING:
    from airflow.sdk import Context

log = logging.getLogger("forja.stage")

CONNECTIONS = ("forja_lake", "forja_kafka", "forja_mlflow")
"""Airflow connections whose extra ``{"env": {...}}`` becomes environment variables of the stages."""

PRIVATE = ("AIRFLOW", "_AIRFLOW", "PYTHON")
"""First letters of this process's variables that a stage never gets: Airflow's own secrets, and its Python path."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One try of one stage."""

    lake: Lake
    settings: Settings
    env: Mapping[str, str]
    refs: Mapping[str, list[str]]
    variant: str
    prepared: harness.Prepared


def environment() -> dict[str, str]:
    """Environment variables that the connections carry; a connection that isn't there carries none."""
    found: dict[str, str] = {}
    for name in CONNECTIONS:
        try:
            extra = BaseHook.get_connection(name).extra_dejson
        except AirflowNotFoundException:
            continue
        found.update({str(k): str(v) for k, v in extra.get("env", {}).items()})
    return found


def lake() -> tuple[Lake, Settings]:
    """The lake and the settings of this task's process."""
    # The S3 credentials are read from the process's environment; a task has a process of its own.
    os.environ.update(environment())
    settings = Settings.from_env()
    return Lake(settings.lake), settings


def begin(verb: str, recipe: str, inputs: Mapping[str, Any], variant: str) -> Run:
    """Find the work's key and what is there of it.

    Raises:
        AirflowFailException: inputs that no retry mends.
    """
    with airflow_errors():
        store, settings = lake()
        refs = {name: references(value) for name, value in inputs.items()}
        prepared = harness.prepare(store, verb, recipes.load(recipe), refs, variant)
    return Run(lake=store, settings=settings, env=dict(os.environ), refs=refs, variant=variant, prepared=prepared)


def references(value: Any) -> list[str]:
    """An input as Airflow renders it, one reference or the sequence of a mapped task's, as a list."""
    if isinstance(value, str):
        return [value]
    return [str(item) for item in value] if isinstance(value, Iterable) else []


def arguments(run: Run) -> list[str]:
    """Arguments of ``python -m forja.stages``."""
    plan = run.prepared.plan
    inputs = [word for name, items in run.refs.items() for ref in items for word in ("--in", f"{name}={ref}")]
    variant = ["--variant", plan.variant] if plan.variant else []
    return [plan.stage, "--recipe", plan.recipe, *inputs, *variant, "--code", run.prepared.code]


def process_env(run: Run, profile: Profile) -> dict[str, str]:
    """Whole environment of a stage's process on this machine."""
    settings = run.settings
    env = {k: v for k, v in run.env.items() if not k.startswith(PRIVATE)}
    env.update(dict.fromkeys(THREADS, str(max(1, int(profile.cpus)))))
    env.update(profile.env)
    env.update({
        "FORJA_LAKE": settings.lake, "FORJA_KAFKA": settings.kafka, "MLFLOW_TRACKING_URI": settings.mlflow,
        "FORJA_ENDPOINT": settings.endpoint, "FORJA_STATE": str(settings.state), "FORJA_CACHE": str(settings.cache),
        "FORJA_SITE": settings.site, "PYTHONPATH": str(ROOT / "include"), "PYTHONUNBUFFERED": "1",
    })  # fmt: skip
    return env


def last(run: Run, said: str = "") -> Receipt:
    """The receipt that the stage left: the one that it ``said``, else the newest of this very work.

    Raises:
        AirflowException: the stage ended well and left none.
    """
    folder = run.prepared.folder
    # Only the host that did it knows the key of work that depends on a GPU: its folder is beside the one that was reckoned here.
    mine = folder.rpartition("/")[0] if run.prepared.stage.hardware else folder
    path = said if said.startswith(f"{mine}/") else newest(run)
    if not path:
        raise AirflowException(f"the stage ended well but left no receipt in {folder}; to do: clear this task")
    with airflow_errors():
        return receipts.load(run.lake, path)


def newest(run: Run) -> str:
    """Path of the newest receipt of this very work; empty when there is none, or when its key depends on hardware that isn't known here."""
    folder = run.prepared.folder
    if run.prepared.stage.hardware:
        return ""
    if run.prepared.stage.repeat == "reconciled":
        return next(reversed(harness.numbered(run.lake, folder)), "")
    path = f"{folder}/receipt.json"
    return path if run.lake.size(path) is not None else ""


def settle(operator: Any, run: Run, receipt: Receipt, context: Context, *, spawned: float | None = None, ended: float | None = None) -> str:
    """Tell Airflow what the stage left: links, facts, and the asset that it updates; gives the receipt's path.

    Args:
        spawned: when the stage's process began, seconds since 1970; None when it was adopted without one.
        ended: when it ended.

    Raises:
        AirflowFailException: the receipt is that of a gate that refused.
        AirflowSkipException: the stage has an outlet and found nothing new.
    """
    operator.receipt, operator.mlflow = receipt.path, mlflow_url(run.settings, receipt)
    if spawned is None:
        log.info("adopted: %s", receipt.path)
        for line in receipt.report:
            log.info("  %s", line)
    context["ti"].xcom_push("facts", {
        "receipt": receipt.path, "adopted": spawned is None or _moment(receipt.finished) < spawned, "seconds": receipt.seconds,
        "spawned": spawned, "ended": ended,
        "metrics": receipt.metrics, "report": receipt.report, "mlflow": operator.mlflow,
    })  # fmt: skip
    with airflow_errors():
        harness.refuse(receipt)
    for asset in operator.outlets:
        announce(receipt, context, asset)
    return receipt.path


def _moment(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()


def mlflow_url(settings: Settings, receipt: Receipt) -> str:
    """Page of the receipt's run in MLflow, empty when it has none."""
    run_id = receipt.facts.get("mlflow_run")
    return f"{settings.mlflow}/#/runs/{run_id}" if run_id else ""


def failure(code: int, line: str) -> AirflowException:
    """What an exit status of a stage means for Airflow: fail at once when no retry can mend it.

    Args:
        line: what the stage said last about its error.
    """
    kind = errors.BY_EXIT_CODE.get(code)
    if kind is not None and not kind.retry:
        return AirflowFailException(line or kind.__doc__)
    signal = f" (signal {code - 128})" if code > 128 else ""
    return AirflowException(f"stage ended with status {code}{signal}: {line}")


@contextlib.contextmanager
def airflow_errors() -> Iterator[None]:
    """Turn a ForjaError into the exception that makes Airflow retry, or not."""
    try:
        yield
    except ForjaError as error:
        raise failure(error.exit_code, f"{type(error).__name__}: {error}") from error


def is_running(context: Context) -> bool:
    """Whether Airflow still wants this task to run: not when a person ended or cleared it; yes when Airflow doesn't answer."""
    ti = context["ti"]
    name = ti.task_id if ti.map_index is None or ti.map_index < 0 else f"{ti.task_id}_{ti.map_index}"
    try:
        states = ti.get_task_states(dag_id=ti.dag_id, task_ids=[ti.task_id], run_ids=[ti.run_id], map_index=ti.map_index)
    except Exception as error:
        log.info("Airflow doesn't say how this task is: %s", error)
        return True
    return str(states.get(ti.run_id, {}).get(name)) == "running"


def announce(receipt: Receipt, context: Context, asset: Any) -> None:
    """Tell the DAGs that wait for the raw table about its version, once for each version.

    What was told last is asked from Airflow rather than from this try, so that a task which died between writing rows and
    telling about them is made good by its retry.

    Raises:
        AirflowSkipException: this version was told already, so nothing is new.
    """
    raw = receipt.facts["raw"]
    events = list(context["inlet_events"][asset].ascending(False).limit(1))
    if events and (events[0].extra or {}).get("raw") == raw:
        raise AirflowSkipException(f"nothing new: {raw} was announced before")
    context["outlet_events"][asset].extra = {"raw": raw, "rows": receipt.metrics.get("rows")}
