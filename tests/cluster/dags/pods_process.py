"""The other half of tests/cluster/pod_pair.py: the same stage as a process, in a file that imports nothing of Kubernetes."""

import datetime

from airflow.sdk import DAG

from forja_airflow.operators import StageOperator

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)

with DAG("pods_pair_process", schedule=None, start_date=START, is_paused_upon_creation=False, tags=["tests"]):
    StageOperator(task_id="ingest", verb="ingest", recipe="digits", pool="cpu")
