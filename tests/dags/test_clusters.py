"""Airflow's connections to a cluster are read as Airflow's own provider reads them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException, AirflowNotFoundException
from kubernetes import config

from forja_airflow import clusters

SECRET = "a-token-that-is-a-secret"  # noqa: S105 - of nothing


def kubeconfig() -> dict[str, Any]:
    """Two clusters; the first is the current one."""
    names = ("one", "two")
    return {
        "apiVersion": "v1", "kind": "Config", "current-context": "one",
        "clusters": [{"name": n, "cluster": {"server": f"https://{n}:6443"}} for n in names],
        "users": [{"name": "u", "user": {"token": SECRET}}],
        "contexts": [{"name": n, "context": {"cluster": n, "user": "u"}} for n in names],
    }  # fmt: skip


def connect(extra: Any, monkeypatch: pytest.MonkeyPatch, name: str = "forja_mig") -> str:
    """Address of the cluster that a connection with this extra leads to."""

    def get(conn_id: str) -> Any:
        if extra is None:
            raise AirflowNotFoundException(conn_id)
        return SimpleNamespace(extra_dejson=extra)

    monkeypatch.setattr(clusters.BaseHook, "get_connection", get)
    return str(clusters.connect(name)._client.configuration.host)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kubeconfig, which is this process's default too."""
    found = tmp_path / "kubeconfig"
    found.write_text(json.dumps(kubeconfig()))
    for module in (config, config.kube_config):
        monkeypatch.setattr(module, "KUBE_CONFIG_DEFAULT_LOCATION", str(found))
    return str(found)


OLD = "extra__kubernetes__"


def test_what_the_connection_says_is_done(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for extra, host in (
        ({"kube_config_path": path}, "one"),
        ({"kube_config_path": path, "cluster_context": "two"}, "two"),
        ({f"{OLD}kube_config_path": path, f"{OLD}cluster_context": "two"}, "two"),
        ({"kube_config": json.dumps(kubeconfig()), "cluster_context": "two"}, "two"),
        ({"kube_config": kubeconfig(), "in_cluster": False, "kube_config_path": ""}, "one"),
        ({}, "one"),
        ({"cluster_context": "two"}, "two"),
    ):
        assert connect(extra, monkeypatch) == f"https://{host}:6443"
    assert connect(None, monkeypatch, "kubernetes_default") == "https://one:6443"
    with pytest.raises(AirflowNotFoundException):
        connect(None, monkeypatch)


def test_a_pods_own_account_comes_before_the_default_file(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def own(client_configuration: Any) -> None:
        client_configuration.host = "https://own"

    monkeypatch.setattr(config, "load_incluster_config", own)
    assert connect({}, monkeypatch) == connect({"in_cluster": True}, monkeypatch) == "https://own"
    assert connect({"kube_config_path": path}, monkeypatch) == "https://one:6443"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"in_cluster": True, "kube_config_path": "x"}, "got ['in_cluster', 'kube_config_path']; allowed: one of them"),
        ({"in_cluster": True}, "field in_cluster: got True; allowed: true in a pod alone"),
        ({"disable_verify_ssl": True}, "field disable_verify_ssl: got True; allowed: false"),
        ({"kube_config": f"{{{SECRET}"}, "field kube_config; allowed: a kubeconfig as JSON"),
        ({"kube_config": json.dumps([SECRET])}, "field kube_config; allowed: a kubeconfig as JSON"),
        ({"kube_config": {**kubeconfig(), "contexts": []}}, "field kube_config; allowed: a kubeconfig as JSON"),
    ],
)
def test_what_cannot_be_done_is_refused_without_telling_secrets(extra: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AirflowFailException) as raised:
        connect(extra, monkeypatch)
    assert said in str(raised.value)
    assert SECRET not in str(raised.value)
