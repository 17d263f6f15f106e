"""The pod of a stage, from its profile: what it may use, and nothing beyond."""

from __future__ import annotations

import datetime
import re
from typing import Any

from kubernetes.client import models as k8s

from forja.errors import BadInput
from forja.profiles import Profile
from forja.recipes.base import Recipe
from forja.sites import Site
from forja_airflow import runs
from forja_airflow.pods.times import GRACE_S, STARTUP_S

SCRATCH = "/tmp"  # noqa: S108 - a volume of the pod's own
"""Folder of the stage's temporary files. It, the cache and /dev/shm are all of the pod that can be written."""

CACHE = "/var/cache/forja"
"""Folder of what libraries keep for later: compiled kernels, fonts."""

CACHE_GIB = 5
"""Size limit of the cache's volume."""

SAID = "/dev/termination-log"
"""File in which the stage names its receipt; the kubelet puts it into the pod's status, so no sidecar and no log is read."""

USER = 10001
"""User and group of the image's processes."""

LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
"""Value of a label in Kubernetes."""


def pod(profile: Profile, *, site: Site, recipe: Recipe, verb: str) -> dict[str, Any]:
    """Arguments of PodStageOperator for a profile.

    Raises:
        BadInput: a recipe whose name can't be a label, by which its pods are found.
    """
    if not LABEL.fullmatch(recipe.name):
        raise BadInput(
            "name of a recipe whose stages are pods", value=recipe.name, allowed="a letter or a digit at its end", do="rename the recipe"
        )
    return {
        "name": f"forja-{recipe.name.replace('_', '-')}-{verb}",
        "namespace": site.tenant(recipe.team).namespace,
        "image": profile.image,
        "image_pull_policy": "IfNotPresent",
        "cmds": ["python", "-m", "forja.stages"],
        "env_vars": environment(profile, site.name),
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
        **volumes(profile),
        "labels": {"app.kubernetes.io/managed-by": "forja", "forja/recipe": recipe.name, "forja/stage": verb},
        "termination_grace_period": GRACE_S,
        "termination_message_policy": "FallbackToLogsOnError",
        **limits(profile),
    }  # fmt: skip


def limits(profile: Profile) -> dict[str, Any]:
    """Time-outs: one for the wait for a node, one for the start there, one for the run."""
    whole = profile.queue_timeout_s + STARTUP_S + profile.run_timeout_s
    return {
        "schedule_timeout_seconds": profile.queue_timeout_s,
        "startup_timeout_seconds": STARTUP_S,
        # Airflow counts from the task's start, the kubelet from the pod's arrival on its node.
        "execution_timeout": datetime.timedelta(seconds=whole),
        "active_deadline_seconds": STARTUP_S + profile.run_timeout_s,
    }


def resources(profile: Profile) -> k8s.V1ResourceRequirements:
    """Requests equal to limits, so that the pod is of the class Guaranteed."""
    wanted = {
        "cpu": f"{round(profile.cpus * 1000)}m",
        "memory": f"{round(profile.memory_gib * 1024)}Mi",
        "ephemeral-storage": f"{round(profile.disk_gib * 1024)}Mi",
    }
    if profile.gpus:
        wanted["nvidia.com/gpu"] = str(profile.gpus)
    if profile.mig:
        wanted[f"nvidia.com/mig-{profile.mig}"] = "1"
    return k8s.V1ResourceRequirements(requests=wanted, limits=dict(wanted))


def environment(profile: Profile, site: str) -> dict[str, str]:
    """Plain environment variables: folders that can be written, threads, and the profile's own."""
    # FORJA_CACHE stays what the image says: the environments are in it.
    folders = {"HOME": SCRATCH, "TMPDIR": SCRATCH, "XDG_CACHE_HOME": CACHE, "FORJA_STATE": f"{SCRATCH}/state"}
    threads = dict.fromkeys(runs.THREADS, str(max(1, int(profile.cpus))))
    return {**threads, **folders, **profile.env, "FORJA_SITE": site, "FORJA_RECEIPT_FILE": SAID, "PYTHONUNBUFFERED": "1"}


def volumes(profile: Profile) -> dict[str, Any]:
    """Volumes and their mounts: scratch, cache, and /dev/shm of the size that the profile asks for."""
    kinds = {
        "scratch": (SCRATCH, k8s.V1EmptyDirVolumeSource(size_limit=f"{round(profile.disk_gib * 1024)}Mi")),
        "cache": (CACHE, k8s.V1EmptyDirVolumeSource(size_limit=f"{CACHE_GIB}Gi")),
    }
    if profile.shm_gib:
        size = f"{round(profile.shm_gib * 1024)}Mi"
        kinds["shm"] = ("/dev/shm", k8s.V1EmptyDirVolumeSource(medium="Memory", size_limit=size))  # noqa: S108
    return {
        "volumes": [k8s.V1Volume(name=name, empty_dir=source) for name, (_, source) in kinds.items()],
        "volume_mounts": [k8s.V1VolumeMount(name=name, mount_path=path) for name, (path, _) in kinds.items()],
    }
