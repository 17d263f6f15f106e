"""The Kubernetes API, as far as Forja needs it: whole objects as the API's JSON, and refusals that keep the API's own words.

The official client does the connecting (kubeconfig, tokens, certificates, in-cluster). Its models are left aside: server-side
apply sends the fields that a manifest names and no others, which models can't say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forja.errors import BadInput, Conflict, ForjaError, Refused, Unavailable

Object = dict[str, Any]
"""An object of the API as JSON."""

KINDS = {
    "Namespace": ("v1", "namespaces", False),
    "Node": ("v1", "nodes", False),
    "Pod": ("v1", "pods", True),
    "Service": ("v1", "services", True),
    "ServiceAccount": ("v1", "serviceaccounts", True),
    "Secret": ("v1", "secrets", True),
    "ConfigMap": ("v1", "configmaps", True),
    "Event": ("v1", "events", True),
    "ResourceQuota": ("v1", "resourcequotas", True),
    "LimitRange": ("v1", "limitranges", True),
    "ResourceClaim": ("resource.k8s.io/v1", "resourceclaims", True),
    "Deployment": ("apps/v1", "deployments", True),
    "ReplicaSet": ("apps/v1", "replicasets", True),
    "Job": ("batch/v1", "jobs", True),
    "NetworkPolicy": ("networking.k8s.io/v1", "networkpolicies", True),
    "PodDisruptionBudget": ("policy/v1", "poddisruptionbudgets", True),
    "PriorityClass": ("scheduling.k8s.io/v1", "priorityclasses", False),
    "Lease": ("coordination.k8s.io/v1", "leases", True),
    "EndpointSlice": ("discovery.k8s.io/v1", "endpointslices", True),
    "Role": ("rbac.authorization.k8s.io/v1", "roles", True),
    "RoleBinding": ("rbac.authorization.k8s.io/v1", "rolebindings", True),
    "ClusterRole": ("rbac.authorization.k8s.io/v1", "clusterroles", False),
    "ClusterRoleBinding": ("rbac.authorization.k8s.io/v1", "clusterrolebindings", False),
    "SubjectAccessReview": ("authorization.k8s.io/v1", "subjectaccessreviews", False),
    "SelfSubjectReview": ("authentication.k8s.io/v1", "selfsubjectreviews", False),
    "CustomResourceDefinition": ("apiextensions.k8s.io/v1", "customresourcedefinitions", False),
    "JobSet": ("jobset.x-k8s.io/v1alpha2", "jobsets", True),
    "GatewayClass": ("gateway.networking.k8s.io/v1", "gatewayclasses", False),
    "Gateway": ("gateway.networking.k8s.io/v1", "gateways", True),
    "HTTPRoute": ("gateway.networking.k8s.io/v1", "httproutes", True),
}
"""Kinds that Forja touches: API version, plural, whether they live in a namespace."""

TIMEOUT_S = 30.0
"""Longest wait for one answer of the API server."""


class ApiError(ForjaError):
    """The API server answered with an error: its status, reason and message as it gave them, the exit status of what it comes to."""

    def __init__(self, what: str, status: int, reason: str, message: str) -> None:
        super().__init__(what, value=f"{status} {reason}", allowed="", do=message)
        self.status, self.reason, self.message = status, reason, message
        alike: type[ForjaError] = Unavailable if self.passing else {403: Refused, 409: Conflict}.get(status, BadInput)
        self.exit_code, self.retry = alike.exit_code, alike.retry

    @property
    def passing(self) -> bool:
        """Whether the server was only too busy or not whole just now, so that the same request may pass later."""
        return self.status == 429 or self.status >= 500


class Kube:
    """A connection to one cluster as one identity.

    Args:
        client: a ``kubernetes.client.ApiClient``.
        headers: sent with every request.
    """

    def __init__(self, client: Any, headers: Mapping[str, str] | None = None) -> None:
        self._client, self._headers = client, dict(headers or {})

    def impersonating(self, user: str) -> Kube:
        """The same connection acting as somebody else, which the API server must allow (verb impersonate).

        The server adds the groups of a service account, ``system:serviceaccount:NAMESPACE:NAME``, by itself.
        """
        return Kube(self._client, {"Impersonate-User": user})

    def request(
        self, method: str, path: str, body: object = None, *, query: Mapping[str, object] | None = None, content: str = "application/json"
    ) -> Any:
        """One request; the answer's JSON, or its text when it is no JSON.

        Raises:
            ApiError: the server's own refusal or error.
            Unavailable: no answer.
        """
        import urllib3
        from kubernetes.client.exceptions import ApiException

        try:
            answer = self._client.call_api(
                path, method, query_params=[(k, v) for k, v in (query or {}).items()], body=body, auth_settings=["BearerToken"],
                header_params={"Accept": "application/json, */*", "Content-Type": content, **self._headers},
                _preload_content=False, _request_timeout=TIMEOUT_S, _return_http_data_only=True,
            )  # fmt: skip
            # The body comes only now, and a server that goes down may break it off. A log holds whatever a process wrote.
            text = answer.data.decode(errors="replace")
        except (ApiException, UnicodeDecodeError) as error:
            # The client takes an error's body for UTF-8: where it isn't, the error is what that failure happened to.
            told = error if isinstance(error, ApiException) else error.__context__
            if not isinstance(told, ApiException):
                raise
            raise _api_error(f"{method} {path}", told.status, told.reason, told.body) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Unavailable(f"the Kubernetes API doesn't answer {method} {path}", value=str(error)[:300], do="try again") from error
        try:
            return json.loads(text)
        except ValueError:
            return text

    def get(self, kind: str, name: str, namespace: str = "") -> Object | None:
        """An object; None when it isn't there."""
        try:
            found: Object = self.request("GET", f"{place(kind, namespace)}/{name}")
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return found

    def list(self, kind: str, namespace: str = "", *, labels: str = "", fields: str = "") -> list[Object]:
        """Objects of one kind, of all namespaces when none is named, by label and field selectors."""
        query = {"labelSelector": labels, "fieldSelector": fields}
        found = self.request("GET", place(kind, namespace), query={k: v for k, v in query.items() if v})
        return [{"kind": kind, "apiVersion": KINDS[kind][0], **item} for item in found["items"]]

    def create(self, manifest: Object, *, dry_run: bool = False) -> Object:
        """Create an object; with ``dry_run`` it passes all of admission and isn't stored."""
        kind, namespace = manifest["kind"], manifest["metadata"].get("namespace", "")
        query = {"dryRun": "All"} if dry_run else {}
        made: Object = self.request("POST", place(kind, namespace), manifest, query=query)
        return made

    def apply(self, manifest: Object, *, manager: str, dry_run: bool = False, force: bool = True) -> Object:
        """Server-side apply: the fields that ``manifest`` names become its manager's; others are left as they are."""
        meta = manifest["metadata"]
        query: dict[str, object] = {"fieldManager": manager, "force": str(force).lower()}
        if dry_run:
            query["dryRun"] = "All"
        path = f"{place(manifest['kind'], meta.get('namespace', ''))}/{meta['name']}"
        made: Object = self.request("PATCH", path, manifest, query=query, content="application/apply-patch+yaml")
        return made

    def patch(self, kind: str, name: str, change: Object, namespace: str = "", *, part: str = "") -> Object:
        """Merge ``change`` into an object; null removes a field. A ``resourceVersion`` in it makes this compare-and-swap.

        Args:
            part: subresource, for example ``status``.
        """
        path = f"{place(kind, namespace)}/{name}{'/' + part if part else ''}"
        made: Object = self.request("PATCH", path, change, content="application/merge-patch+json")
        return made

    def delete(self, kind: str, name: str, namespace: str = "", *, grace_s: int | None = None) -> bool:
        """Delete an object and what it owns; False when it wasn't there."""
        body: Object = {"propagationPolicy": "Background"}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        try:
            self.request("DELETE", f"{place(kind, namespace)}/{name}", body)
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True


def connect(config: Path | None = None, context: str = "") -> Kube:
    """A connection by a kubeconfig file; without one by ``KUBECONFIG``, ``~/.kube/config`` or the pod's own service account.

    Raises:
        BadInput: none of them is there, or the file can't be read.
    """
    import kubernetes
    import yaml
    from kubernetes.config.config_exception import ConfigException

    client = kubernetes.client.Configuration()
    try:
        if config is not None:
            kubernetes.config.load_kube_config(str(config), context=context or None, client_configuration=client)
        else:
            # A pod's own account knows no contexts, and its loader refuses the argument.
            kubernetes.config.load_config(client_configuration=client, **({"context": context} if context else {}))
    except (ConfigException, OSError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise BadInput(
            "connection to the cluster", value=str(config or "kubeconfig"), allowed=f"a kubeconfig ({why})", do="set KUBECONFIG"
        ) from None
    client.retries = False  # who calls decides
    client.connection_pool_maxsize = 16  # kept for the next request; more at once are closed after theirs
    return Kube(kubernetes.client.ApiClient(client))


def place(kind: str, namespace: str = "") -> str:
    """Path of a kind's collection in the API."""
    version, plural, namespaced = KINDS[kind]
    root = f"/api/{version}" if "/" not in version else f"/apis/{version}"
    return f"{root}/namespaces/{namespace}/{plural}" if namespaced and namespace else f"{root}/{plural}"


def _api_error(what: str, status: int, reason: str, body: object) -> ApiError:
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    try:
        said = json.loads(text)
        return ApiError(what, status, str(said.get("reason") or reason), str(said.get("message") or text))
    except (ValueError, AttributeError):
        return ApiError(what, status, reason, text[:500])
