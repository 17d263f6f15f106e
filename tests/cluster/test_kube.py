"""The client of the Kubernetes API against a real API server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from forja.kube import ApiError, Kube


def config_map(namespace: str, **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"namespace": namespace, "name": "x"}, "data": data}


def test_an_object_from_its_making_to_its_end(kube: Kube, tenant: Callable[..., str]) -> None:
    namespace = tenant()
    assert kube.get("ConfigMap", "x", namespace) is None
    kube.create(config_map(namespace, a="1"), dry_run=True)
    assert kube.get("ConfigMap", "x", namespace) is None
    kube.create(config_map(namespace, a="1"))
    assert [o["data"] for o in kube.list("ConfigMap", namespace, fields="metadata.name=x")] == [{"a": "1"}]
    assert kube.list("ConfigMap", namespace, labels="none=such") == []
    assert kube.delete("ConfigMap", "x", namespace)
    assert not kube.delete("ConfigMap", "x", namespace)


def test_apply_owns_the_fields_that_it_names(kube: Kube, tenant: Callable[..., str]) -> None:
    namespace = tenant()
    kube.apply(config_map(namespace, a="1", b="1"), manager="one")
    kube.apply(config_map(namespace, c="2"), manager="two")
    made = kube.apply(config_map(namespace, a="3"), manager="one")
    assert made["data"] == {"a": "3", "c": "2"}  # b went with its manager's wish, c belongs to somebody else
    with pytest.raises(ApiError, match=r'conflict with "one".*\.data\.a') as raised:
        kube.apply(config_map(namespace, a="4"), manager="two", force=False)
    assert raised.value.status == 409


def test_a_patch_that_names_a_version_is_compare_and_swap(kube: Kube, tenant: Callable[..., str]) -> None:
    namespace = tenant()
    version = kube.create(config_map(namespace, a="1"))["metadata"]["resourceVersion"]
    change = {"metadata": {"resourceVersion": version}, "data": {"a": None, "b": "2"}}
    assert kube.patch("ConfigMap", "x", change, namespace)["data"] == {"b": "2"}
    with pytest.raises(ApiError, match="the object has been modified") as raised:
        kube.patch("ConfigMap", "x", change, namespace)
    assert (raised.value.status, raised.value.reason) == (409, "Conflict")


def test_acting_as_somebody_else_has_their_rights(kube: Kube, tenant: Callable[..., str]) -> None:
    namespace = tenant()
    user = f"system:serviceaccount:{namespace}:default"
    with pytest.raises(ApiError, match=f'User "{user}" cannot list resource "secrets"') as raised:
        kube.impersonating(user).list("Secret", namespace)
    assert (raised.value.status, raised.value.reason) == (403, "Forbidden")
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview", "metadata": {}}
    seen = kube.impersonating(user).create(review)["status"]["userInfo"]
    assert seen["username"] == user
    assert f"system:serviceaccounts:{namespace}" in seen["groups"]
