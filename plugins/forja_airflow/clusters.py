"""Connections of Airflow to Kubernetes, for tasks that look at the cluster themselves rather than through a pod."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from forja import kube
from forja.errors import BadInput
from forja_airflow import runs

WAYS = ("in_cluster", "kube_config_path", "kube_config")
"""Fields of a connection that say how to connect; at most one of them."""

DEFAULT = "kubernetes_default"
"""The one connection that needn't be there: it is then the pod's own account, or the kubeconfig of this process."""


def connect(conn_id: str) -> kube.Kube:
    """The cluster of an Airflow connection of type ``kubernetes``, read as the provider reads it, for one cluster must be meant by both.

    Raises:
        AirflowFailException: the connection names nothing that can be used.
        AirflowNotFoundException: there is no such connection.
    """
    try:
        extra = BaseHook.get_connection(conn_id).extra_dejson
    except AirflowNotFoundException:
        if conn_id != DEFAULT:
            raise
        extra = {}
    with runs.airflow_errors():
        return _connect(conn_id, extra)


def _connect(conn_id: str, extra: Mapping[str, Any]) -> kube.Kube:
    def field(name: str) -> Any:
        return (extra[name] if name in extra else extra.get(f"extra__kubernetes__{name}")) or None

    ways = [name for name in WAYS if field(name)]
    if len(ways) > 1:
        raise BadInput(f"connection {conn_id}", value=ways, allowed="one of them")
    if str(field("disable_verify_ssl")).lower() in ("true", "1"):
        raise BadInput(
            f"connection {conn_id}: field disable_verify_ssl", value=field("disable_verify_ssl"), allowed="false",
            do="put the cluster's certificate into the kubeconfig",
        )  # fmt: skip
    context = str(field("cluster_context") or "")
    if path := field("kube_config_path"):
        return kube.connect(Path(path), context)
    if given := field("kube_config"):
        return _given(conn_id, given, context)
    return _own(conn_id) if field("in_cluster") else _own(conn_id, or_else=context)


def _given(conn_id: str, given: Any, context: str) -> kube.Kube:
    """By a kubeconfig that the connection holds as JSON."""
    from kubernetes import client, config

    made = client.Configuration()
    try:
        content = json.loads(given) if isinstance(given, str) else given
        config.load_kube_config_from_dict(content, context=context or None, client_configuration=made)
    except (config.ConfigException, ValueError, TypeError, AttributeError):
        # Neither the value nor the parser's words: they hold credentials.
        raise BadInput(f"connection {conn_id}: field kube_config", allowed="a kubeconfig as JSON") from None
    return _kube(made)


def _own(conn_id: str, or_else: str | None = None) -> kube.Kube:
    """By the pod's own account, ``or_else`` by the default kubeconfig with this context."""
    from kubernetes import client, config

    made = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=made)
    except config.ConfigException as error:
        if or_else is None:
            raise BadInput(f"connection {conn_id}: field in_cluster", value=True, allowed=f"true in a pod alone ({error})") from None
        return kube.connect(None, or_else)
    return _kube(made)


def _kube(configuration: Any) -> kube.Kube:
    from kubernetes import client

    configuration.retries = False  # as for kube.connect
    configuration.connection_pool_maxsize = 16
    return kube.Kube(client.ApiClient(configuration))
