"""Gangs for tests/cluster/test_gang.py: digits in two pods, long enough to be killed meanwhile, and gangs that end badly at once."""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from airflow.sdk import DAG
from kubernetes.client import models as k8s

import forja.recipes
from forja import recipes
from forja.sites import Tenant, load_site
from forja_airflow.gang.operator import GangStageOperator, gang

FOLDER = Path(__file__).parents[1] / "recipes"
if str(FOLDER) not in forja.recipes.__path__:
    forja.recipes.__path__.append(str(FOLDER))
RECIPE = recipes.load("slow")
NAMESPACE, RECIPES = "forja-test-gang", "recipes"
"""Namespace and ConfigMap that the tests make."""
TENANTS = {RECIPE.team: Tenant(team=RECIPE.team, namespace=NAMESPACE, gpus=12)}
SITE = dataclasses.replace(load_site("small-cluster"), tenants=TENANTS)
STEP_S = 15
PROFILE = dataclasses.replace(SITE.profile("training"), nodes=2, env={**SITE.profile("training").env, "FORJA_STEP_S": str(STEP_S)})


def make(name: str, *, says: str = "", **changes: Any) -> None:
    """A DAG of one gang; its run's conf names the dataset.

    Args:
        says: shell commands that each member runs instead of the stage.
        changes: of the profile.
    """
    arguments = gang(dataclasses.replace(PROFILE, **changes), site=SITE, recipe=RECIPE, verb="train")
    # The image knows the product's recipes alone.
    arguments["volumes"].append(k8s.V1Volume(name="recipe", config_map=k8s.V1ConfigMapVolumeSource(name=RECIPES)))
    mount = k8s.V1VolumeMount(name="recipe", mount_path="/opt/forja/include/forja/recipes/slow.py", sub_path="slow.py", read_only=True)
    arguments["volume_mounts"].append(mount)
    if says:
        arguments["cmds"] = ["sh", "-c", says]
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    with DAG(name, schedule=None, start_date=start, is_paused_upon_creation=False, tags=["tests"]):
        GangStageOperator(
            task_id="train", verb="train", recipe="slow", inputs={"dataset": "{{ dag_run.conf['dataset'] }}"}, pool=PROFILE.pool,
            retries=1, retry_delay=datetime.timedelta(seconds=1), **arguments,
        )  # fmt: skip


make("gang_train", retries=3)
# Both are within the quota and not within the node's eight GPUs: only the second one waits, for a node and nothing else.
make("gang_gpu", says="sleep 60", gpus=6, cpus=0.1, memory_gib=0.1, queue_timeout_s=8)
make("gang_quota", says="sleep 60", gpus=8, cpus=0.1, memory_gib=0.1, queue_timeout_s=8)
make("gang_refused", says="echo BadInput: what it was given is wrong; exit 2", cpus=0.1, memory_gib=0.1, retries=2)
make("gang_broken", says="echo it broke; exit 1", cpus=0.1, memory_gib=0.1, retries=1)
