"""Connections of Airflow to Kubernetes, for tasks that look at the cluster themselves rather than through a pod."""

from __future__ import annotations

from pathlib import Path

from airflow.sdk import BaseHook

from forja import kube
from forja_airflow import runs


def connect(conn_id: str) -> kube.Kube:
    """The cluster of an Airflow connection of type ``kubernetes``, read as the provider reads it: ``kube_config_path`` or ``in_cluster``.

    Raises:
        AirflowFailException: the connection names nothing that can be used.
    """
    extra = BaseHook.get_connection(conn_id).extra_dejson
    path = extra.get("kube_config_path") or extra.get("extra__kubernetes__kube_config_path")
    with runs.airflow_errors():
        return kube.connect(Path(path) if path else None, str(extra.get("cluster_context") or ""))
