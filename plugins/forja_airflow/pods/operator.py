"""A stage as a pod: the same stage, the same key and the same receipt, on a node that has what its profile asks for."""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.cncf.kubernetes.triggers.pod import KubernetesPodTrigger
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred
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

ADOPTED = "adopted"
"""Key of a trigger's event: the pod is one that an earlier try left."""


class PodStageOperator(KubernetesPodOperator):
    """Runs one stage as a pod, or adopts what is there without one. See StageOperator for arguments and result.

    Receipts are how a pod's work becomes known, so pod and task must use one lake: see ``agree``. A person who ends the task ends its
    pod, unless in the second or two between the task's deferral and the triggerer's first look: Airflow then tells nobody, and the
    pod goes on to its own end.

    A person who clears a deferred task starts a try that may find the old pod before the triggerer has deleted it. So a pod that was
    adopted and is then taken away is no failure: the try goes on with a pod of its own.
    """

    template_fields: Sequence[str] = ("inputs", "variant")
    operator_extra_links: Collection[Any] = LINKS
    ui_color = "#e8f0ec"
    # A pod outlives many restarts of what stands between it and Airflow.
    MAX_REDEFER_ATTEMPTS = 20
    brief_s = 20.0
    """Seconds that the task itself waits for a pod: a quick stage costs no second process and no trigger."""
    what = "pod"
    """What the task starts, for people."""

    def __init__(self, *, verb: str, recipe: str, inputs: Mapping[str, Any] | None = None, variant: str = "", **kwargs: Any) -> None:
        super().__init__(**{**FIXED, **kwargs})
        self.verb, self.recipe, self.inputs, self.variant = verb, recipe, dict(inputs or {}), variant
        self.receipt = self.mlflow = self.reason = ""
        self.pod: Any = None
        self._fresh = self._adopted = self._again = self._waiting = self._told = False
        self._status, self._queue_s = "", 0

    @cached_property
    def hook(self) -> Any:
        """As the provider's, but patient: one look that fails is no reason to give a pod up."""
        hook = super().hook
        hook.get_pod = create.patient(hook.get_pod)  # type: ignore[method-assign]
        return hook

    def execute(self, context: Context, event: Any = None) -> str | None:
        """Adopt the receipt that is there, or start the pod; when it takes its time, give the slot back until it has ended.

        Args:
            event: given when the task had waited for room in the tenant's quota.
        """
        return self._begin(context)

    def _begin(self, context: Context) -> str | None:
        # Airflow wants nobody but itself to call execute.
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
        """The pod that an earlier try of this task left, running or ended, else a new one."""
        self._waiting = self._fresh = True
        self.pod = create.left(self, context)
        self._adopted = self.pod is not None and not self._again
        self.heed(context)
        return self.pod or create.create(self, pod_request_obj, context)

    def convert_config_file_to_dict(self) -> None:
        """Nothing of a kubeconfig goes into a trigger, whose arguments lie in Airflow's database: the triggerer reads the connection."""
        self._config_dict = None

    def invoke_defer_method(self, last_log_time: Any = None, context: Context | None = None) -> None:
        """Give the slot back, unless the pod ends before that is worth it."""
        self._waiting = True
        try:
            if context is not None:
                taken = self._fresh and self._wait()
                self._fresh = False
                self.heed(context)
                if taken and self._adopted:
                    self._anew(context)
                    return
                # What it waited already, for room in the quota or for an old pod's end, is of the same time-out.
                self._queue_s = max(1, round(self.schedule_timeout_seconds - create.waited_s(context)))
            if self._adopted:
                self.trigger_kwargs = {**(self.trigger_kwargs or {}), ADOPTED: True}
            super().invoke_defer_method(last_log_time, context)
        except TaskDeferred:
            if context is not None:
                self.heed(context)  # the last moment: a signal that comes later finds no task
            raise
        finally:
            self._waiting = False

    def defer(self, *, trigger: Any, **kwargs: Any) -> NoReturn:
        """With the house's trigger in place of the provider's."""
        if type(trigger) is KubernetesPodTrigger:
            arguments = {**trigger.serialize()[1], "connection_extras": None, "config_dict": None}
            arguments["schedule_timeout"] = self._queue_s or arguments["schedule_timeout"]
            trigger = PodTrigger(**arguments)
        super().defer(trigger=trigger, **kwargs)

    def _wait(self) -> bool:
        """Look at the pod until it has ended, has no node, or took ``brief_s`` seconds; whether it was taken away meanwhile."""
        deadline = time.monotonic() + self.brief_s
        try:
            while not self._told and time.monotonic() < deadline and self.pod.status.phase in ("Pending", "Running", None):
                if self.pod.status.phase == "Pending" and reason.waits(self.pod):
                    break
                if self._adopted and self.pod.metadata.deletion_timestamp:
                    return True
                time.sleep(LOOK_S)
                self.pod = self.hook.get_pod(self.pod.metadata.name, self.pod.metadata.namespace)
        except (ApiException, HTTPError) as error:
            if getattr(error, "status", 0) == 404:
                return True
            self.log.info("the pod can't be seen now: %s", error)  # the trigger goes on
        return False

    def _anew(self, context: Context) -> str | None:
        """Go on without what was adopted: by its receipt, or with a pod of this try's own, so that this comes once in a try."""
        self.log.info("the %s that was adopted is taken away: this try goes on without it", self.what)
        self._again, self._adopted = True, False
        self.pod = self.pod_request_obj = None
        self.trigger_kwargs = {k: v for k, v in (self.trigger_kwargs or {}).items() if k != ADOPTED}
        return self._begin(context)

    def on_kill(self) -> None:
        """Delete the pod, unless it is only this process that is told to end."""
        self._told = True
        # While a pod is looked for, made or waited for, it is asked first who wants it: see heed.
        if not self._waiting:
            self.end()

    def end(self) -> None:
        """Delete the pod."""
        super().on_kill()

    def heed(self, context: Context) -> None:
        """Heed a signal that came: a person who ends the task ends its pod; a worker that is stopped leaves the pod to the next one.

        Raises:
            AirflowException: a person ended the task.
        """
        if not self._told:
            return
        if runs.is_running(context):
            self.log.info("this process is told to end; the %s goes on", self.what)
            return
        self.end()
        raise AirflowException(f"the task was ended by hand, and its {self.what} with it")

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> str | None:
        """The pod has ended: its receipt's path."""
        self._adopted, self._status = bool(event.get(ADOPTED)), event["status"]
        try:
            super().trigger_reentry(context, event)
        except (AirflowException, ApiException) as error:
            gone = self.pod is None and (not isinstance(error, ApiException) or error.status == 404)
            # What a stage says for good counts, whoever was about to delete its pod.
            doomed = self.pod is not None and self.pod.metadata.deletion_timestamp and not isinstance(error, AirflowFailException)
            if self._adopted and (gone or doomed):
                return self._anew(context)
            if not gone:
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
        # Whether a result made on other hardware counts is known only on the node: the next try's pod adopts it there.
        if run.prepared.receipt is not None and not run.prepared.stage.hardware:
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
        late = ""
        if pod.status.reason == "DeadlineExceeded":
            late = f"ended after the run's time-out, {pod.spec.active_deadline_seconds} s on its node: "
        elif self._status == "timeout" and not pod.metadata.deletion_timestamp:
            if pod.status.phase != "Pending":
                late = "ended after the task's time-out: "
            elif pod.spec.node_name:
                late = f"not started within {self.startup_timeout_seconds} s on its node: "
            else:
                late = f"no node within {self.schedule_timeout_seconds} s: "
        return late + self.reason


def _ended(pod: Any, container: str) -> Any:
    """The terminated state of a pod's container, None when it has none."""
    statuses = (pod.status.container_statuses if pod is not None and pod.status else None) or []
    return next((s.state.terminated for s in statuses if s.name == container and s.state), None)
