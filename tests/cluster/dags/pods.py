"""Stage pods for tests/cluster/test_pods*.py: one task in each DAG, whose stage is tests/cluster/stand_in.py."""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from airflow.sdk import DAG

from forja import recipes
from forja.sites import Tenant, load_site
from forja_airflow.pods.operator import PodStageOperator
from forja_airflow.pods.spec import pod

RECIPE = recipes.load("digits")
SITE = load_site("small-cluster")
NAMESPACE, CROWDED = "forja-test-pods", "forja-test-crowded"
"""Namespaces that tests/cluster/pods_fixtures.py makes; the second has a quota of one GPU."""
PROFILE = dataclasses.replace(
    SITE.profile("light"), environment="control", image="forja/control:0.1.0", cpus=0.2, memory_gib=0.5, disk_gib=1.0, run_timeout_s=240
)
START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
STAND_IN = (Path(__file__).parents[1] / "stand_in.py").read_text()


def make(name: str, *, namespace: str = NAMESPACE, retries: int = 0, brief_s: float = 3.0, late_s: int = 0, **changes: Any) -> None:
    """A DAG of one pod; its run's conf names the version of the raw table.

    Args:
        late_s: most seconds that the pod may live, when the profile isn't to say so.
        changes: of the profile.
    """
    profile = dataclasses.replace(PROFILE, **changes)
    site = dataclasses.replace(SITE, tenants={RECIPE.team: Tenant(team=RECIPE.team, namespace=namespace)})
    arguments = {**pod(profile, site=site, recipe=RECIPE, verb="transform"), "cmds": ["python", "-c", STAND_IN]}
    if late_s:
        arguments["active_deadline_seconds"] = late_s
    with DAG(name, schedule=None, start_date=START, is_paused_upon_creation=False, tags=["tests"]):
        task = PodStageOperator(
            task_id="transform", verb="transform", recipe="digits", inputs={"raw": "{{ dag_run.conf['raw'] }}"}, pool=profile.pool,
            retries=retries, retry_delay=datetime.timedelta(seconds=1), **arguments,
        )  # fmt: skip
        task.brief_s = brief_s


make("pods_once")
make("pods_again", retries=2)
make("pods_brief", retries=2, brief_s=60.0)
make("pods_image", image="10.99.0.1:7070/absent:1")
make("pods_gpu", gpus=9, queue_timeout_s=8)
make("pods_crowded", namespace=CROWDED, gpus=1, queue_timeout_s=60)
make("pods_too_many", namespace=CROWDED, gpus=2)
make("pods_memory", memory_gib=0.25)
make("pods_late", late_s=10)


with DAG(
    "pods_pair_pod",
    schedule=None,
    start_date=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    is_paused_upon_creation=False,
    tags=["tests"],
):
    # One half of tests/cluster/pod_pair.py: a stage that is soon done, since it finds nothing new.
    PodStageOperator(
        task_id="ingest", verb="ingest", recipe="digits",
        **pod(dataclasses.replace(SITE.profile("etl"), cpus=1.0), site=SITE, recipe=RECIPE, verb="ingest"),
    )  # fmt: skip
