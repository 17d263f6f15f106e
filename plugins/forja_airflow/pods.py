"""A stage as a pod: the same stage, the same key and the same receipt, on a node that has what its profile asks for."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any, cast

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubernetes.client import models as k8s

from forja.errors import BadInput
from forja.profiles import Profile, Site
from forja.recipes.base import Recipe
from forja_airflow import runs
from forja_airflow.links import LINKS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from airflow.sdk import Context

SCRATCH = "/tmp"  # noqa: S108 - a volume of the pod's own
"""The only folder of the pod that can be written."""

SCRATCH_GIB = 50
"""Size limit of that volume."""

SAID = "/dev/termination-log"
"""File in which the stage names its receipt; the kubelet puts it into the pod's status, so no sidecar and no log is read."""

ONE_MACHINE = ("release",)
"""Stages that need the services of one machine; a pod has none of them."""

USER = 10001
"""User and group of the image's processes."""


class PodStageOperator(KubernetesPodOperator):
    """Runs one stage as a pod, or adopts what is there without one. See StageOperator for arguments and result.

    Receipts are how a pod's work becomes known, so pod and task must use one lake: see ``agree``.
    """

    template_fields: Sequence[str] = ("inputs", "variant")
    operator_extra_links: Collection[Any] = LINKS
    ui_color = "#e8f0ec"

    def __init__(self, *, verb: str, recipe: str, inputs: Mapping[str, Any] | None = None, variant: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.verb, self.recipe, self.inputs, self.variant = verb, recipe, dict(inputs or {}), variant
        self.receipt = self.mlflow = ""

    def execute(self, context: Context) -> str | None:
        """Adopt the receipt that is there, or start the pod and give the slot back until it has ended."""
        if self.verb in ONE_MACHINE:
            raise AirflowFailException(
                f"{self.verb} in a pod: the router and the slots that it moves are processes of one machine; routing in a cluster comes "
                f'with the Gateway API router; to do: until then end at the gate, or give the profile of {self.verb} runner = "local" '
                "where Airflow runs beside Envoy and Triton"
            )
        run = runs.begin(self.verb, self.recipe, self.inputs, self.variant)
        self.agree(run.settings.lake)
        # Whether a result made on other hardware counts is known only on the node.
        if run.prepared.receipt is not None and not run.prepared.stage.hardware:
            return self._result(runs.settle(self, run, run.prepared.receipt, context), context)
        self.arm(runs.arguments(run), run.prepared.key)
        super().execute(context)
        return None

    def agree(self, lake: str) -> None:
        """Have the pod use this task's lake, which its site file may name too, but no other.

        Raises:
            AirflowFailException: the site file names another one, or a pod can't reach the task's.
        """
        env = cast("dict[str, str]", self.env_vars)  # as pod() gives them
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
        self.labels = {**(self.labels or {}), "forja/key": key}

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> str:
        """The pod has ended: its receipt's path."""
        super().trigger_reentry(context, event)
        run = runs.begin(self.verb, self.recipe, self.inputs, self.variant)
        state = _ended(self.pod, self.base_container_name)
        said = (state.message or "").strip() if state else ""
        times = {"spawned": state.started_at.timestamp(), "ended": state.finished_at.timestamp()} if state else {}
        return self._result(runs.settle(self, run, runs.last(run, said), context, **times), context)

    def _result(self, path: str, context: Context) -> str:
        """Push the result: with the provider's do_xcom_push off, which would add a sidecar, Airflow doesn't."""
        context["ti"].xcom_push("return_value", path)
        return path

    def cleanup(self, pod: Any, remote_pod: Any, xcom_result: Any = None, context: Any = None) -> None:
        """As the provider's, but the stage's exit status says whether a retry can help."""
        try:
            super().cleanup(pod, remote_pod, xcom_result, context)
        except AirflowException as error:
            state = _ended(remote_pod, self.base_container_name)
            if state is None or not state.exit_code:
                raise
            lines = (state.message or str(error)).strip().splitlines()
            raise runs.failure(state.exit_code, lines[-1] if lines else "") from error


def _ended(pod: Any, container: str) -> Any:
    """The terminated state of a pod's container, None when it has none."""
    statuses = (pod.status.container_statuses if pod is not None and pod.status else None) or []
    return next((s.state.terminated for s in statuses if s.name == container and s.state), None)


def pod(profile: Profile, *, site: Site, recipe: Recipe, verb: str) -> dict[str, Any]:
    """Arguments of the operator for a profile: what the pod may use, and nothing beyond."""
    return {
        "name": f"forja-{recipe.name.replace('_', '-')}-{verb}",
        "namespace": site.tenant(recipe.team).namespace,
        "image": profile.image,
        "cmds": ["python", "-m", "forja.stages"],
        "env_vars": _env(profile, site.name),
        "env_from": [k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(name=name)) for name in profile.secrets],
        "container_resources": resources(profile),
        "node_selector": dict(profile.node_selector),
        "tolerations": [k8s.V1Toleration(key=key, operator="Exists", effect="NoSchedule") for key in profile.tolerations],
        "priority_class_name": profile.priority_class or None,
        "service_account_name": profile.service_account or None,
        "automount_service_account_token": profile.token,
        "security_context": k8s.V1PodSecurityContext(
            run_as_non_root=True, run_as_user=USER, run_as_group=USER, fs_group=USER,
            seccomp_profile=k8s.V1SeccompProfile(type="RuntimeDefault"),
        ),
        "container_security_context": k8s.V1SecurityContext(
            allow_privilege_escalation=False, privileged=False, read_only_root_filesystem=True,
            capabilities=k8s.V1Capabilities(drop=["ALL"]),
        ),
        **_volumes(profile),
        "labels": {"app.kubernetes.io/managed-by": "forja", "forja/recipe": recipe.name, "forja/stage": verb},
        "schedule_timeout_seconds": profile.queue_timeout_s,
        "startup_timeout_seconds": 600,
        # Airflow counts from the task's start, so the wait for a node is in it.
        "execution_timeout": datetime.timedelta(seconds=profile.queue_timeout_s + profile.run_timeout_s),
        "active_deadline_seconds": profile.queue_timeout_s + profile.run_timeout_s,
        "termination_grace_period": 30,
        "deferrable": True,
        "durable": True,
        "logging_interval": 60,
        "on_finish_action": "delete_pod",
        # The pod's spec never goes into a log: it names secrets and addresses.
        "log_pod_spec_on_failure": False,
        "log_events_on_startup": False,
        "log_events_on_failure": True,
        "termination_message_policy": "FallbackToLogsOnError",
        "container_name_log_prefix_enabled": False,
    }  # fmt: skip


def resources(profile: Profile) -> k8s.V1ResourceRequirements:
    """Requests equal to limits, so that the pod is of the class Guaranteed."""
    memory = f"{round(profile.memory_gib * 1024)}Mi"
    wanted = {"cpu": f"{round(profile.cpus * 1000)}m", "memory": memory, "ephemeral-storage": f"{SCRATCH_GIB}Gi"}
    if profile.gpus:
        wanted["nvidia.com/gpu"] = str(profile.gpus)
    if profile.mig:
        wanted[f"nvidia.com/mig-{profile.mig}"] = "1"
    return k8s.V1ResourceRequirements(requests=wanted, limits=dict(wanted))


def _env(profile: Profile, site: str) -> dict[str, str]:
    folders = {"HOME": SCRATCH, "TMPDIR": SCRATCH, "FORJA_STATE": f"{SCRATCH}/state", "FORJA_CACHE": f"{SCRATCH}/cache"}
    threads = dict.fromkeys(runs.THREADS, str(max(1, int(profile.cpus))))
    return {**threads, **folders, **profile.env, "FORJA_SITE": site, "FORJA_RECEIPT_FILE": SAID, "PYTHONUNBUFFERED": "1"}


def _volumes(profile: Profile) -> dict[str, Any]:
    volumes = [k8s.V1Volume(name="scratch", empty_dir=k8s.V1EmptyDirVolumeSource(size_limit=f"{SCRATCH_GIB}Gi"))]
    mounts = [k8s.V1VolumeMount(name="scratch", mount_path=SCRATCH)]
    if profile.shm_gib:
        size = f"{round(profile.shm_gib * 1024)}Mi"
        volumes.append(k8s.V1Volume(name="shm", empty_dir=k8s.V1EmptyDirVolumeSource(medium="Memory", size_limit=size)))
        mounts.append(k8s.V1VolumeMount(name="shm", mount_path="/dev/shm"))  # noqa: S108
    return {"volumes": volumes, "volume_mounts": mounts}
