"""Profiles: where one stage runs, and with what. A site (``forja.sites``) names those of its place.

Only the standard library may be imported here: DAG files read profiles while Airflow parses them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from forja.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where one stage runs, and with what."""

    name: str
    runner: Literal["local", "kubernetes"]
    """``local``: a process on the Airflow worker's machine. ``kubernetes``: a pod."""
    environment: Literal["control", "ml"]
    """Environment of the process, or target of the image."""
    cpus: float = 1.0
    """CPU cores: the pod's request and limit; threads of a local process."""
    memory_gib: float = 2.0
    """Memory in GiB: the pod's request and limit."""
    disk_gib: float = 50.0
    """Local disk of a pod in GiB, its temporary files included: its request and limit."""
    nodes: int = 1
    """Pods that train together as one gang, each with all of the resources below; above 1 only with the kubernetes runner."""
    gpus: int = 0
    """Whole GPUs."""
    mig: str = ""
    """MIG slice instead of whole GPUs, for example ``1g.10gb``."""
    shm_gib: float = 0.0
    """Size of /dev/shm in GiB; 0 leaves the container runtime's default of 64 MiB."""
    image: str = ""
    """Container image with a version tag or digest; needed by the kubernetes runner."""
    service_account: str = ""
    """Service account of the pod."""
    token: bool = False
    """Whether the pod gets its service account's token: only a stage that asks the cluster's API something, as release does."""
    secrets: tuple[str, ...] = ()
    """Kubernetes Secrets whose keys become environment variables of the pod."""
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Plain environment variables: addresses, never secrets."""
    node_selector: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tolerations: tuple[str, ...] = ()
    """Keys of node taints that the pod tolerates (operator Exists, effect NoSchedule)."""
    priority_class: str = ""
    pool: str = "cpu"
    """Airflow pool, one for each class of device."""
    slots: int = 1
    """Slots of the pool that the stage takes."""
    queue_timeout_s: int = 600
    """Seconds that a pod may wait for a node."""
    run_timeout_s: int = 3600
    """Seconds that the stage may run."""
    retries: int = 2
    """Further tries after a failure that a retry can mend."""

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, allowed: str) -> None:
            if not ok:
                raise BadInput(f"profile {self.name}: field {field}", value=getattr(self, field), allowed=allowed)

        check(self.runner in ("local", "kubernetes"), "runner", "local or kubernetes")
        check(self.environment in ("control", "ml"), "environment", "control or ml")
        check(self.cpus > 0, "cpus", "above 0")
        check(self.memory_gib > 0, "memory_gib", "above 0")
        check(self.disk_gib > 0, "disk_gib", "above 0")
        check(self.gpus >= 0, "gpus", "0 or more")
        check(not (self.gpus and self.mig), "mig", "either gpus or mig")
        check(self.slots >= 1, "slots", "1 or more")
        check(self.queue_timeout_s > 0, "queue_timeout_s", "above 0")
        check(self.run_timeout_s > 0, "run_timeout_s", "above 0")
        check(self.retries >= 0, "retries", "0 or more")
        check(self.nodes == 1 or (self.nodes > 1 and self.runner == "kubernetes"), "nodes", "1, or more with the kubernetes runner")
        if self.runner == "kubernetes":
            tag = self.image.rpartition("/")[2].partition(":")[2]
            check(bool(tag) and tag != "latest", "image", "an image with a version tag or digest, not latest")
