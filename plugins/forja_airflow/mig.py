"""The tasks of the DAG mig_layout: each is one step of ``forja.mig.change``, made by the run that it belongs to."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseBranchOperator, BaseOperator, Param, TriggerRule
from airflow.sdk.exceptions import AirflowSkipException

from forja.errors import BadInput, ForjaError
from forja.mig import layouts
from forja.mig.change import Change, Times
from forja_airflow import runs
from forja_airflow.dag import START

if TYPE_CHECKING:
    from airflow.sdk import Context

    from forja.kube import Kube

log = runs.log

CONNECTION = "forja_mig"
OWNER = "platform"

DOCS = {
    "assert": "Looks whether the layout is in force already, by what the node offers. Then the run ends here, as a success.",
    "plan": "Draws the layout slice by slice, and names the pods that will have to go. Nothing is changed. The log has the drawing, "
    "the lake an SVG under `platform/mig/`.",
    "cordon": "Makes the node unschedulable and writes on it, in the same moment, who changes it and what was there before. Refused while "
    "another change of the node is under way.",
    "drain": "Evicts the pods that use a GPU of the node. Budgets are kept: when one lets a pod not go until the deadline, the run takes "
    "itself back. Nothing is evicted before each single eviction would be allowed.",
    "apply": "Sets the label `nvidia.com/mig.config` and waits for mig-manager's answer.",
    "verify": "Looks at what the node offers and runs a pod that asks for one of each slice. The label's word alone counts for nothing.",
    "uncordon": "Removes the record and the cordon, if this run set it. When it fails the layout is in force and the node still cordoned: "
    "clear it.",
    "revert": "Runs when a step failed: brings back the layout before, the operator's pods and the node's schedulability. It ends as a "
    "success when the node is as it was; the run itself counts as failed.",
}  # fmt: skip
FAILS = """**When it fails:** the last line of the log says why. Clearing the task is safe: each step may be done again. When a step
up to `verify` has failed, `revert` runs by itself. If the whole run was ended by hand, wait until it has shown no sign of life for five
minutes; then take it back with `./forja mig revert --node NODE`, or start another run of this DAG, which takes the change over."""


def settings(*, doc_md: str | None) -> dict[str, Any]:
    """Arguments of the DAG. One node is changed at a time, so that a cluster never loses more than one to a bad layout."""
    return {
        "description": "Changes how the GPUs of a node are cut", "doc_md": doc_md, "tags": ["platform", "mig", "forja"],
        "start_date": START, "catchup": False, "max_active_runs": 1, "is_paused_upon_creation": False, "default_args": {"owner": OWNER},
    }  # fmt: skip


def params() -> dict[str, Param]:
    """The form that a person sees who starts the DAG."""
    node = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"
    return {
        "node": Param("", type="string", minLength=1, pattern=node, title="Node", description_md="Name of a node with GPUs."),
        "layout": Param(
            "all-disabled", type="string", enum=list(layouts.load()), title="Layout",
            description_md="`all-disabled` are whole GPUs. The others are in `k8s/mig/layouts.yaml`; `./forja mig plan` draws them.",
        ),
        "everything": Param(False, type="boolean", title="Drain all pods", description_md="For nodes that mig-manager may reboot."),
        "force": Param(
            False, type="boolean", title="Drain pods that nothing starts again",
            description_md="Otherwise a pod without a controller that isn't one of Forja's stops the run before anything is evicted.",
        ),
    }  # fmt: skip


def step(name: str) -> BaseOperator:
    """The task of one step."""
    times = Times.from_env()
    longest = {"drain": times.drain_s, "apply": times.apply_s, "verify": times.verify_s, "revert": 2 * times.revert_s + 3 * times.verify_s}
    arguments: dict[str, Any] = {
        "task_id": name, "doc_md": f"### {name}\n\n{DOCS[name]}\n\n{FAILS}", "pool": "cpu", "retries": 2,
        "retry_delay": datetime.timedelta(seconds=10), "execution_timeout": datetime.timedelta(seconds=longest.get(name, 0) + 300),
    }  # fmt: skip
    if name == "assert":
        return AssertOperator(**arguments)
    if name in ("uncordon", "revert"):
        # Twice as often: they are what stands between a node and its being used again.
        arguments["retries"] = 4
    if name == "revert":
        arguments["trigger_rule"] = TriggerRule.ONE_FAILED
    return StepOperator(step=name, **arguments)


class AssertOperator(BaseBranchOperator):
    """Goes on with ``plan`` unless the layout is in force already."""

    template_fields: Collection[str] = ("node", "layout")
    ui_color = "#f3ede0"

    def __init__(self, *, node: str = "{{ params.node }}", layout: str = "{{ params.layout }}", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.node, self.layout = node, layout

    def choose_branch(self, context: Context) -> str | None:
        """The task to go on with, or none."""
        from forja.mig import node as nodes

        with runs.airflow_errors():
            found = nodes.look(_kube(), self.node)
            why = nodes.differs(found, self.layout, layouts.load())
        for line in why or [f"layout {self.layout} is in force on {found.title}: nothing to do"]:
            log.info("%s", line)
        context["ti"].xcom_push("facts", {"in_force": not why, "differs": why, "simulated": found.simulated})
        return "plan" if why else None


class StepOperator(BaseOperator):
    """One step of the change that its run makes. Its result, where it has one, is what the step found or did."""

    template_fields: Collection[str] = ("node", "layout", "everything", "force")
    ui_color = "#e8ecf3"

    def __init__(
        self, *, step: str, node: str = "{{ params.node }}", layout: str = "{{ params.layout }}",
        everything: str = "{{ params.everything }}", force: str = "{{ params.force }}", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        self.step, self.node, self.layout, self.everything, self.force = step, node, layout, everything, force

    def execute(self, context: Context) -> Any:
        """Do the step, told line by line in the log."""
        from forja.mig import change as steps
        from forja.mig import probe, revert
        from forja.settings import Settings
        from forja.sites import load_site

        run, pod = context["dag_run"].run_id, probe.Probe.of_site(load_site(Settings.from_env().site))
        change = Change(
            node=self.node, layout=self.layout, holder=f"airflow/{self.dag_id}/{run}", known=layouts.load(), times=Times.from_env(),
            everything=self.everything == "True", force=self.force == "True", probe=pod,
        )  # fmt: skip
        with runs.airflow_errors():
            kube = _kube()
            if self.step == "plan":
                return self._plan(kube, change, run)
            do = revert.revert if self.step == "revert" else getattr(steps, self.step)
            result = do(kube, change, _say)
        if self.step == "revert" and not result:
            raise AirflowSkipException("nothing to take back")
        if self.step in ("uncordon", "revert"):
            self._keep(kube, change, run, {"uncordon": "changed", "revert": "reverted"}[self.step])
        return result

    def _plan(self, kube: Kube, change: Change, run: str) -> dict[str, Any]:
        """Draw the layout and name the pods that will go."""
        from forja.mig import drain, picture
        from forja.mig import node as nodes

        found = nodes.look(kube, change.node)
        bars = nodes.bars(found, change.layout, change.known)
        title = f"{found.title}: {change.layout}"
        offer = nodes.wanted(found, change.layout, change.known)
        pods = [drain.name(p) for p in drain.victims(nodes.pods_on(kube, change.node), everything=change.everything)]
        for line in (*picture.text(title, bars), "", f"offers {nodes.said(found.offers)}", f"will offer {nodes.said(offer)}"):
            log.info("%s", line)
        log.info("pods that must go: %s", ", ".join(pods) or "none")
        path = _write(f"{change.node}/{_safe(run)}.svg", picture.svg(title, bars).encode())
        plan = [{"gpus": name, "pairs": layout.pairs} for name, layout in bars]
        return {"plan": plan, "offers": dict(found.offers), "will_offer": offer, "pods": pods, "simulated": found.simulated, "svg": path}

    def _keep(self, kube: Kube, change: Change, run: str, outcome: str) -> None:
        """Leave a record of what became of the node in the lake."""
        from forja.mig import node as nodes

        try:
            found = nodes.look(kube, change.node)
        except BadInput as error:  # put back while the labels of gpu-feature-discovery are still away
            log.info("record: not kept: %s", error)
            return
        body = {
            "schema": 1, "node": change.node, "gpu": found.gpu.name, "simulated": found.simulated, "asked": change.layout,
            "outcome": outcome, "layout": found.label, "offers": dict(found.offers), "unschedulable": found.unschedulable, "run": run,
            "times": dataclasses.asdict(change.times), "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        log.info("record: %s", _write(f"{change.node}/{_safe(run)}.json", json.dumps(body, indent=1, sort_keys=True).encode()))


def _kube() -> Kube:
    from forja_airflow import clusters

    return clusters.connect(CONNECTION)


def _say(line: str) -> None:
    log.info("%s", line)


def _safe(run: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", run)


def _write(name: str, data: bytes) -> str:
    """Put something under platform/mig in the lake; its path, or why not. A lake that is down is no reason to leave a node half done."""
    try:
        lake, _ = runs.lake()
        lake.replace(f"platform/mig/{name}", data)
    except ForjaError as error:
        return f"not kept: {error}"
    return f"platform/mig/{name}"
