"""The cluster's API for the kit itself: server-side apply of any kind, with the standard library alone."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from cluster.kit import ClusterError
from cluster.kit.versions import NODE_IP

Object = dict[str, Any]
TIMEOUT_S = 30.0


def documents(text: str) -> list[Object]:
    """The objects of a file of manifests."""
    return [d for d in yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if d]


class Refusal(ClusterError):
    """The API answered with an error.

    Args:
        status: of HTTP.
        answer: the API's own words.
    """

    def __init__(self, request: str, status: int, answer: str) -> None:
        super().__init__(f"{request}: {status} {answer[:600]}")
        self.status = status


class Api:
    """The API as the administrator of ``kubeconfig``; the caller is in the cluster's network."""

    def __init__(self, kubeconfig: Path) -> None:
        user = json.loads(kubeconfig.read_text())
        authority = base64.b64decode(user["clusters"][0]["cluster"]["certificate-authority-data"]).decode()
        self._tls = ssl.create_default_context(cadata=authority)
        with tempfile.NamedTemporaryFile("wb") as pair:  # ssl reads a client's pair from a file only
            for part in ("client-certificate-data", "client-key-data"):
                pair.write(base64.b64decode(user["users"][0]["user"][part]))
            pair.flush()
            self._tls.load_cert_chain(pair.name)
        self._plurals: dict[tuple[str, str], tuple[str, bool]] = {}

    def request(self, method: str, path: str, body: object = None, *, content: str = "application/json") -> Any:
        """One request; the answer as JSON, or text when it isn't.

        Raises:
            Refusal: the API said no.
            OSError: no answer.
        """
        connection = http.client.HTTPSConnection(NODE_IP, 6443, timeout=TIMEOUT_S, context=self._tls)
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, path, payload, {"Content-Type": content, "Accept": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        if answer.status >= 400:
            raise Refusal(f"{method} {path}", answer.status, text)
        try:
            return json.loads(text)
        except ValueError:
            return text

    def apply(self, manifests: Iterable[Mapping[str, Any]]) -> None:
        """Server-side apply, in order. Waits a little for what a kind or a webhook needs to come up first."""
        for manifest in manifests:
            end = time.monotonic() + TIMEOUT_S
            while True:
                try:
                    query = "?fieldManager=kit&force=true"
                    self.request("PATCH", self.path(manifest) + query, manifest, content="application/apply-patch+yaml")
                    break
                except (Refusal, OSError) as error:
                    final = isinstance(error, Refusal) and error.status not in (404, 409, 429, 500, 503)
                    if final or time.monotonic() > end:
                        raise
                    time.sleep(0.1)

    def path(self, manifest: Mapping[str, Any]) -> str:
        """Path of one object."""
        version, meta = manifest["apiVersion"], manifest["metadata"]
        plural, namespaced = self._kind(version, manifest["kind"])
        place = f"/namespaces/{meta.get('namespace', 'default')}" if namespaced else ""
        return f"{_root(version)}{place}/{plural}/{meta['name']}"

    def get(self, path: str) -> Object | None:
        """An object by its path; None when it, or the API itself, isn't there yet."""
        try:
            found: Object = self.request("GET", path)
        except (Refusal, OSError):
            return None
        return found if isinstance(found, dict) else None

    def ready(self) -> bool:
        """Whether the API server says that it's ready."""
        try:
            return bool(self.request("GET", "/readyz") == "ok")
        except (Refusal, OSError):
            return False

    def _kind(self, version: str, kind: str) -> tuple[str, bool]:
        if (version, kind) not in self._plurals:
            for resource in self.request("GET", _root(version))["resources"]:
                if "/" not in resource["name"]:
                    self._plurals[version, resource["kind"]] = (resource["name"], resource["namespaced"])
        if (version, kind) not in self._plurals:
            raise Refusal(f"{version} {kind}", 404, "no such kind yet")
        return self._plurals[version, kind]


def _root(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"
