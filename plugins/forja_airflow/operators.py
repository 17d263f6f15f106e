"""Operators that run on the worker's machine: a stage in a process of its own, and the admission of a run."""

from __future__ import annotations

import datetime
import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowSkipException

from forja import admission, envs, recipes
from forja.sites import load_site
from forja_airflow import runs
from forja_airflow.links import LINKS
from forja_airflow.process import Process
from forja_airflow.said import why

if TYPE_CHECKING:
    from airflow.sdk import Context

log = runs.log


class StageOperator(BaseOperator):
    """Runs one stage as a process of its environment, or adopts what is there.

    Args:
        verb: the stage.
        recipe: name of the recipe; its profile in the site file says what the process may use.
        inputs: reference, or list of them, for each input of the stage; results of other tasks as they are.
        variant: for stages that run once for each variant; ``.partial(...).expand(variant=[...])`` maps over them.

    Its result is the receipt's path; the XCom ``facts`` has seconds, metrics, and when its process began and ended.
    """

    template_fields: Collection[str] = ("inputs", "variant")
    operator_extra_links: Collection[Any] = LINKS
    ui_color = "#e8f0ec"

    def __init__(self, *, verb: str, recipe: str, inputs: Mapping[str, Any] | None = None, variant: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.verb, self.recipe, self.inputs, self.variant = verb, recipe, dict(inputs or {}), variant
        self.receipt = self.mlflow = ""
        self._process: Process | None = None

    def execute(self, context: Context) -> str:
        """Adopt the receipt that is there, or run the stage."""
        run = runs.begin(self.verb, self.recipe, self.inputs, self.variant)
        if run.prepared.receipt is not None:
            return runs.settle(self, run, run.prepared.receipt, context)
        spawned = time.time()
        said = self._run(run)
        return runs.settle(self, run, runs.last(run, said), context, spawned=spawned, ended=time.time())

    def _run(self, run: runs.Run) -> str:
        """Run the process to its end; the receipt that it named."""
        profile = load_site(run.settings.site).profile(getattr(recipes.load(self.recipe).profiles, self.verb))
        with runs.airflow_errors():
            python = envs.python(run.prepared.stage.environment, run.settings)
        said = reason = ""
        process = self._process = Process([str(python), "-m", "forja.stages", *runs.arguments(run)], runs.process_env(run, profile))
        try:
            for line in process.lines():
                log.info("%s", line)
                if line.startswith("receipt "):
                    said = line.removeprefix("receipt ").strip()
                reason = why(reason, line)
            code = process.wait()
        finally:
            process.stop()
        if code:
            # That of a gate that refused: it is evidence.
            self.receipt = runs.newest(run) if run.prepared.stage.repeat == "memoised" else ""
            raise runs.failure(code, reason)
        return said

    def on_kill(self) -> None:
        """End the stage with all that it started."""
        if self._process is not None:
            self._process.stop()


class AdmitOperator(BaseOperator):
    """Decides whether the run goes on, and pins the version of the raw table that it uses.

    Args:
        recipe: name of the recipe; its ``triggers`` say what data must be like to start a run.
        raw: version asked for by hand, ``<team>/<recipe>/raw@<version>``; empty for the event's, else the newest.

    Its result is the pinned reference; the XCom ``facts`` has the verdict and its reason, also when the run is skipped.
    """

    template_fields: Collection[str] = ("raw",)
    ui_color = "#f3ede0"
    CAUSES: ClassVar[Mapping[str, admission.Cause]] = {"asset_triggered": "new data", "scheduled": "schedule"}

    def __init__(self, *, recipe: str, raw: str = "{{ params.raw or '' }}", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe, self.raw = recipe, raw

    def execute(self, context: Context, event: Any = None) -> str:
        """Decide; a run that must wait for the end of the cool-down gives its slot back and comes here again."""
        run, recipe = context["dag_run"], recipes.load(self.recipe)
        with runs.airflow_errors():
            lake, _ = runs.lake()
            # After a cool-down the newest version is pinned: it holds all that came meanwhile.
            raw = self.raw or ("" if event else newest(context.get("triggering_asset_events") or {}))
            cause = self.CAUSES.get(str(getattr(run.run_type, "value", run.run_type)), "hand")
            asked = admission.Run(id=run.run_id, cause=cause, again=context["ti"].try_number > 1)
            decision = admission.admit(lake, recipe, asked, raw, time.time)
        candidate = decision.candidate
        log.info("%s: %s; %s, %d rows", decision.verdict, decision.reason, candidate.raw, candidate.rows)
        context["ti"].xcom_push("facts", {
            "verdict": decision.verdict, "reason": decision.reason, "raw": candidate.raw, "rows": candidate.rows, "cause": decision.cause,
        })  # fmt: skip
        if decision.verdict == "waiting":
            self._wait(decision.until)
        if decision.verdict == "skipped":
            raise AirflowSkipException(decision.reason)
        return candidate.raw

    def _wait(self, until: float) -> None:
        from airflow.providers.standard.triggers.temporal import DateTimeTrigger

        moment = datetime.datetime.fromtimestamp(until, datetime.UTC)
        log.info("goes on at %s", moment.isoformat(timespec="seconds"))
        self.defer(trigger=DateTimeTrigger(moment), method_name="execute")


def newest(events: Mapping[Any, Sequence[Any]]) -> str:
    """The highest version of the raw table among the events that started a run; empty when none names one."""
    refs = [str(event.extra["raw"]) for items in events.values() for event in items if (event.extra or {}).get("raw")]
    return max(refs, key=lambda ref: int(ref.rpartition("@")[2]), default="")
