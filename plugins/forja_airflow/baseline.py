"""Tasks of the DAG security_baseline: assert, plan and apply, as ``./forja baseline`` does them."""

from __future__ import annotations

import datetime
import json
import logging
import uuid
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from forja.baseline.probes import Verdict
from forja.settings import Settings
from forja.sites import Site, load_site
from forja_airflow import clusters, runs
from forja_airflow.dag import START

if TYPE_CHECKING:
    from airflow.sdk import Context

log = logging.getLogger("forja.baseline")

CONNECTION = "forja_baseline"
RECORDS = "platform/baseline"
"""Folder in the lake of what each proof found."""

DOCS = {
    "assert_before": """### assert_before: how the controls stand before anything is changed.

**What it does:** calls that must succeed and twins that must be refused, for each control of each tenant; see *assert_after*. It
informs: a red verdict here is what the run is about to mend, and doesn't fail the task.

**When it fails:** the lake didn't take its record, or Airflow has no connection `forja_baseline`.
""",
    "plan": """### plan: what differs between the baseline and the cluster.

**What it does:** compares k8s/baseline, filled in from the site file, with the cluster by dry runs of server-side apply. The log shows
each field that differs; the XCom `facts` has the same. It doesn't look for tenants that left the site file, since its account
may not list namespaces: an administrator's `./forja baseline plan` does.

**When it fails:** the API server is away, or its 403 says which right the account of `forja_baseline` lacks (k8s/access/baseline.yaml).
""",
    "apply": """### apply: installs what is missing, mends what differs, deletes what is no longer wanted.

**What it does:** plans again and does it. Applying twice changes nothing.

**When it fails:** *403* on a namespace means that a tenant is new: an administrator runs `./forja baseline apply` once. *The baseline
can't be applied to* names objects that somebody else made: look at them, then `./forja baseline apply --adopt` or delete them.
""",
    "assert_after": """### assert_after: the proof; the run is green only when every control of every tenant passes.

**What it does:** Pod Security and quotas are asked with dry runs, the network with pods that call each other. *fail*: something got
through that must not, or was refused that must not be. *not proven*: a probe failed, a target was down, a refusal came from elsewhere;
that is tried again and is never a pass. The log names each such probe with what was called and what was answered; the record in the
lake under `platform/baseline/` has all of them.

**When it fails:** *network fail* for everything means that no network plugin enforces policies. *not proven* names the pod that didn't
start or the target that was down.
""",
}


def schedule() -> str | None:
    """Daily where there are tenants; where there are none, never by itself."""
    return "@daily" if load_site(Settings.from_env().site).tenants else None


def settings(*, doc_md: str | None) -> dict[str, Any]:
    """Further arguments of the DAG."""
    return {
        "description": "Proves that the tenants' security controls refuse, and mends them.", "doc_md": doc_md,
        "tags": ["platform", "security", "forja"], "start_date": START, "catchup": False,
        "max_active_runs": 1, "is_paused_upon_creation": schedule() is None,
        "default_args": {
            "owner": "platform", "retries": 1, "retry_delay": datetime.timedelta(seconds=10),
            "execution_timeout": datetime.timedelta(minutes=10),
        },
    }  # fmt: skip


class BaselineOperator(BaseOperator):
    """What the tasks have in common: their documentation, the site and the cluster."""

    ui_color = "#f3e8e8"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"doc_md": DOCS.get(kwargs["task_id"]), **kwargs})

    def site(self) -> Site:
        """The site whose tenants are secured; the task is skipped where there are none."""
        site = load_site(Settings.from_env().site)
        if not site.tenants:
            raise AirflowSkipException(f"site {site.name} has no tenants; set FORJA_SITE to the site of a cluster")
        return site


class AssertOperator(BaselineOperator):
    """Proves every control of every tenant.

    Args:
        strict: whether a verdict other than pass fails the task; ``fail`` at once, ``not proven`` after its retries.

    Its result is the record's path in the lake; the XCom ``facts`` has the table of verdicts.
    """

    def __init__(self, *, strict: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.strict = strict

    def execute(self, context: Context) -> str:
        """Prove, and keep the record."""
        from forja.baseline import report

        site, cluster = self.site(), clusters.connect(CONNECTION)
        with runs.airflow_errors():
            lake, _ = runs.lake()
            found = report.prove(cluster, site)
            for line in found.lines():
                log.info("%s", line)
            path = f"{RECORDS}/{found.started.replace(':', '')}-{uuid.uuid4().hex[:6]}.json"
            lake.create(path, json.dumps(found.facts(), indent=1).encode())
        log.info("%s in %.0f s; every probe: %s", found.verdict, found.seconds, path)
        facts = found.facts()
        context["ti"].xcom_push(
            "facts", {"table": facts["table"], "verdict": facts["verdict"], "record": path, "seconds": facts["seconds"]}
        )
        if self.strict and found.verdict is not Verdict.PASS:
            said = "; ".join(f"{team} {control}: {v}" for team, row in facts["table"].items() for control, v in row.items() if v != "pass")
            raise (AirflowFailException if found.verdict is Verdict.FAIL else AirflowException)(said)
        return path


class PlanOperator(BaselineOperator):
    """Shows what apply would change; the XCom ``facts`` has it too."""

    def execute(self, context: Context) -> None:
        """Plan."""
        from forja.baseline import plan

        site, cluster = self.site(), clusters.connect(CONNECTION)
        with runs.airflow_errors():
            tell(plan.plan(cluster, site), context)
        # Its account may list no namespaces (k8s/access/baseline.yaml), so nothing is asked that would be refused each time.
        log.info("! tenants that left the site file: not looked for; an administrator's ./forja baseline plan does")


class ApplyOperator(BaselineOperator):
    """Applies the baseline, as it is needed by now; the XCom ``facts`` has what was changed."""

    def execute(self, context: Context) -> None:
        """Plan again, and apply."""
        from forja.baseline import plan

        site, cluster = self.site(), clusters.connect(CONNECTION)
        with runs.airflow_errors():
            changes = plan.plan(cluster, site)
            plan.apply(cluster, changes)
            tell(changes, context)


def tell(changes: list[Any], context: Context) -> None:
    """Changes into the log and the XCom ``facts``."""
    for line in [line for change in changes for line in change.lines()] or ["no difference"]:
        log.info("%s", line)
    context["ti"].xcom_push("facts", [{"verb": c.verb, "object": c.name, "fields": list(c.fields)} for c in changes])
