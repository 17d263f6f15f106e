"""A stage as a pod: the same stage, the same key and the same receipt, on a node that has what its profile asks for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.cncf.kubernetes.triggers.pod import KubernetesPodTrigger
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from forja.errors import BadInput
from forja.settings import Settings
from forja.sites import load_site
from forja_airflow import runs
from forja_airflow.links import LINKS
from forja_airflow.pods import create, log, reason
from forja_airflow.pods.spec import pod
from forja_airflow.pods.trigger import PodTrigger

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from airflow.sdk import Context

__all__ = ["PodStageOperator", "pod"]

LOOK_S = 0.3
"""Seconds between two looks at the pod meanwhile."""

LOG_S = 5
"""Seconds between two reads of the log while the task has given its slot back."""

FIXED: dict[str, Any] = {
    "deferrable": True,
    "durable": True,
    "logging_interval": LOG_S,
    "poll_interval": 1.0,
    "startup_check_interval_seconds": 2,
    "on_finish_action": "delete_pod",
    "on_kill_action": "delete_pod",
    # The pod's spec never goes into a log: it names secrets and addresses.
    "log_pod_spec_on_failure": False,
    # Each look would list the namespace's events; what a pending pod waits for stands in its status.
    "log_events_on_startup": False,
    "log_events_on_failure": False,
}
"""Arguments of KubernetesPodOperator that are the same for every stage."""


class PodStageOperator(KubernetesPodOperator):
    """Runs one stage as a pod, or adopts what is there without one. See StageOperator for arguments and result.

    Receipts are how a pod's work becomes known, so pod and task must use one lake: see ``agree``. A person who ends the task ends its
    pod, unless in the second or two between the task's deferral and the triggerer's first look: Airflow then tells nobody, and the
    pod goes on to its own end.
    """

    template_fields: Sequence[str] = ("inputs", "variant")
    operator_extra_links: Collection[Any] = LINKS
    ui_color = "#e8f0ec"
    # A pod outlives many restarts of what stands between it and Airflow.
    MAX_REDEFER_ATTEMPTS = 20
    brief_s = 20.0
    """Seconds that the task itself waits for a pod that it started: a quick stage costs no second process and no trigger."""

    def __init__(self, *, verb: str, recipe: str, inputs: Mapping[str, Any] | None = None, variant: str = "", **kwargs: Any) -> None:
        super().__init__(**{**FIXED, **kwargs})
        self.verb, self.recipe, self.inputs, self.variant = verb, recipe, dict(inputs or {}), variant
        self.receipt = self.mlflow = self.reason = ""
        self.pod: Any = None
        self._mine = self._waiting = self._told = False

    def execute(self, context: Context, event: Any = None) -> str | None:
        """Adopt the receipt that is there, or start the pod; when it takes its time, give the slot back until it has ended.

        Args:
            event: given when the task had waited for room in the tenant's quota.
        """
        site = load_site(Settings.from_env().site)
        if self.verb == "release" and site.gateway is None:
            raise AirflowFailException(
                f"release in a pod: site {site.name} has no gateway, and the router of one machine is out of a pod's reach; to do: add "
                f'[gateway] to include/sites/{site.name}.toml, or give the profile of release runner = "local"'
            )
        run = runs.begin(self.verb, self.recipe, self.inputs, self.variant)
        self.agree(run.settings.lake)
        # Whether a result made on other hardware counts is known only on the node.
        if run.prepared.receipt is not None and not run.prepared.stage.hardware:
            create.remove(self, context)
            return self._result(runs.settle(self, run, run.prepared.receipt, context), context)
        self.arm(runs.arguments(run), run.prepared.key)
        self.name = self._set_name(self.name)
        self.execute_async(context)
        return None

    def agree(self, lake: str) -> None:
        """Have the pod use this task's lake, which its site file may name too, but no other.

        Raises:
            AirflowFailException: the site file names another one, or a pod can't reach the task's.
        """
        # As pod() gives them, or as Airflow renders them.
        env = self.env_vars if isinstance(self.env_vars, dict) else {v.name: v.value for v in self.env_vars}
        there = env.get("FORJA_LAKE") or lake
        with runs.airflow_errors():
            if there.rstrip("/") != lake.rstrip("/"):
                raise BadInput(
                    "FORJA_LAKE of the pods", value=there, allowed=f"{lake}, that of this task",
                    do="name one lake in the site file and in the connection forja_lake",
                )  # fmt: skip
            if not lake.startswith("s3://"):
                raise BadInput(
                    "lake for stages in pods", value=lake, allowed="s3://bucket/prefix, which pods and Airflow reach",
                    do="set it in the connection forja_lake",
                )  # fmt: skip
        self.env_vars = {**env, "FORJA_LAKE": lake}

    def arm(self, arguments: list[str], key: str) -> None:
        """Give the pod its stage's arguments and the label that finds it by its work's key."""
        self.arguments = arguments
        self.labels = {**(self.labels or {}), create.KEY: key}

    def get_or_create_pod(self, pod_request_obj: Any, context: Context) -> Any:
        """The pod that an earlier try of this task left, running or ended, else a new one; never two."""
        found = create.left(self, context)
        if found is None:
            found, self._mine = create.create(self, pod_request_obj, context), True
        return found

    def invoke_defer_method(self, last_log_time: Any = None, context: Context | None = None) -> None:
        """Give the slot back, unless the pod ends before that is worth it."""
        if context is not None and self._mine:
            self._mine = False
            self._wait(context)
        super().invoke_defer_method(last_log_time, context)

    def defer(self, *, trigger: Any, **kwargs: Any) -> NoReturn:
        """With the house's trigger in place of the provider's."""
        if type(trigger) is KubernetesPodTrigger:
            trigger = PodTrigger(**trigger.serialize()[1])
        super().defer(trigger=trigger, **kwargs)

    def _wait(self, context: Context) -> None:
        """Look at the pod until it has ended, has no node, or took ``brief_s`` seconds."""
        self._waiting = True
        try:
            deadline = time.monotonic() + self.brief_s
            while time.monotonic() < deadline and self.pod.status.phase in ("Pending", "Running", None):
                if self._told:
                    self._heed(context)
                    break
                if self.pod.status.phase == "Pending" and reason.waits(self.pod):
                    break
                time.sleep(LOOK_S)
                self.pod = self.hook.get_pod(self.pod.metadata.name, self.pod.metadata.namespace)
        except (ApiException, HTTPError) as error:
            self.log.info("the pod can't be seen now: %s", error)  # the trigger goes on
        finally:
            self._waiting = False

    def on_kill(self) -> None:
        """Delete the pod, unless it is only this process that is told to end."""
        self._told = True
        # In the middle of the wait it is asked first who wants it: see _heed.
        if not self._waiting:
            super().on_kill()

    def _heed(self, context: Context) -> None:
        """A signal came: a person who ends the task ends its pod; a worker that is stopped leaves the pod to the next one."""
        if runs.is_running(context):
            self.log.info("this process is told to end; the pod goes on")
            return
        super().on_kill()
        raise AirflowException("the task was ended by hand, and its pod with it")

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> str:
        """The pod has ended: its receipt's path."""
        try:
            super().trigger_reentry(context, event)
        except (AirflowException, ApiException) as error:
            if self.pod is not None or (isinstance(error, ApiException) and error.status != 404):
                raise
            return self._gone(context, event)
        run = runs.begin(self.verb, self.recipe, self.inputs, self.variant)
        state = _ended(self.pod, self.base_container_name)
        said = (state.message or "").strip() if state else ""
        times = {"spawned": state.started_at.timestamp(), "ended": state.finished_at.timestamp()} if state else {}
        return self._result(runs.settle(self, run, runs.last(run, said), context, **times), context)

    def _gone(self, context: Context, event: dict[str, Any]) -> str:
        """The pod was taken away: what it left, when it had done its work."""
        name, namespace = event["name"], event["namespace"]
        run = runs.begin(self.verb, self.recipe, self.inputs, self.variant)
        if run.prepared.receipt is not None:
            return self._result(runs.settle(self, run, run.prepared.receipt, context), context)
        self.reason = reason.vanished(create.events(self, name, namespace))
        raise AirflowException(f"pod {namespace}/{name}: {self.reason}") from None

    def _write_logs(self, pod: Any, follow: bool = False, since_time: Any = None) -> None:  # type: ignore[override]
        """Tell the lines of the log that weren't told before."""
        after = log.moment(since_time)
        lines = self.client.read_namespaced_pod_log(
            name=pod.metadata.name, namespace=pod.metadata.namespace, container=self.base_container_name, timestamps=True,
            since_seconds=log.since_seconds(after), _preload_content=False,
        )  # fmt: skip
        for _, text in log.new((line.decode(errors="replace") for line in lines), after):
            runs.log.info("%s", text)

    def _result(self, path: str, context: Context) -> str:
        """Push the result: with the provider's do_xcom_push off, which would add a sidecar, Airflow doesn't."""
        context["ti"].xcom_push("return_value", path)
        return path

    def cleanup(self, pod: Any, remote_pod: Any, xcom_result: Any = None, context: Any = None) -> None:
        """As the provider's, but the error is the reason, and the stage's exit status says whether a retry can help."""
        if remote_pod is not None and remote_pod.status.phase != "Succeeded":
            events = create.events(self, remote_pod.metadata.name, remote_pod.metadata.namespace)
            self.reason = reason.vanished(events) if remote_pod.metadata.deletion_timestamp else reason.why(remote_pod, events)
        try:
            super().cleanup(pod, remote_pod, xcom_result, context)
        except AirflowException:
            state = _ended(remote_pod, self.base_container_name)
            if state is not None and state.exit_code and not remote_pod.status.reason:
                raise runs.failure(state.exit_code, self.reason) from None
            raise AirflowException(f"pod {remote_pod.metadata.namespace}/{remote_pod.metadata.name}: {self._late(remote_pod)}") from None

    def _late(self, pod: Any) -> str:
        """The reason, with the time-out that it ran into."""
        if pod.status.phase == "Pending" and not pod.spec.node_name:
            return f"no node within {self.schedule_timeout_seconds} s: {self.reason}"
        return self.reason


def _ended(pod: Any, container: str) -> Any:
    """The terminated state of a pod's container, None when it has none."""
    statuses = (pod.status.container_statuses if pod is not None and pod.status else None) or []
    return next((s.state.terminated for s in statuses if s.name == container and s.state), None)
