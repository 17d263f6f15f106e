"""Releases of small models on the cluster, by the rights of the release stage's own service account."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from cluster import access
from cluster.kit.places import ROOT
from cluster.platform import Platform
from integration.releases import MODEL, Serving

from forja import kube as k8s
from forja.baseline import plan
from forja.kube import Kube, Object
from forja.serving.router import Route
from forja.sites import Site, load_site
from forja.stages import release

LABELS = f"app.kubernetes.io/managed-by=forja,forja.dev/recipe={MODEL}"
RULES = {rule["resources"][0]: set(rule["verbs"]) for rule in access.documents("release")[0]["rules"]}
"""Verbs of the role, by resource."""
VERBS = {"POST": {"create"}, "PATCH": {"patch"}, "DELETE": {"delete"}, "PUT": {"update"}}
PATH = re.compile(r".*/namespaces/[^/]+/(?P<kind>[^/]+)(?P<one>/[^/]+)?(?P<part>/log)?")


class Recorded(Kube):
    """A connection that keeps which verbs of which resources it needs."""

    asked: ClassVar[dict[str, set[str]]] = {}

    def request(self, method: str, path: str, body: object = None, **named: Any) -> Any:
        """See ``Kube``."""
        match = PATH.fullmatch(path)
        assert match is not None, path
        verbs = VERBS.get(method) or {"get" if match["one"] else "list"}
        if "apply" in named.get("content", ""):
            verbs = {"create", "patch"}  # the API server asks for both: what is applied may not be there yet
        self.asked.setdefault(f"{match['kind']}{match['part'] or ''}", set()).update(verbs)
        return super().request(method, path, body, **named)


@dataclass(kw_only=True)
class ClusterServing(Serving):
    """The platform of a cluster, and models to release in one tenant's namespace."""

    namespace: str
    kube: Kube
    """The cluster as its administrator."""
    kubeconfig: Path
    """That of the release stage's service account."""

    def deployments(self) -> dict[str, Object]:
        """The model's Deployments that aren't being deleted, by name."""
        found = self.kube.list("Deployment", self.namespace, labels=LABELS)
        return {d["metadata"]["name"]: d for d in found if not d["metadata"].get("deletionTimestamp")}

    def pods(self, name: str) -> list[Object]:
        """Pods of a Deployment that aren't being deleted."""
        identity = self.deployments()[name]["metadata"]["labels"]["forja.dev/release"]
        found = self.kube.list("Pod", self.namespace, labels=f"forja.dev/release={identity}")
        return [p for p in found if not p["metadata"].get("deletionTimestamp")]

    def image(self, name: str) -> str:
        """Triton's image in a Deployment."""
        return str(self.deployments()[name]["spec"]["template"]["spec"]["containers"][0]["image"])

    def live(self) -> str:
        """The Deployment that gets the requests."""
        return str(self.router.read(MODEL).live)

    def clean(self) -> None:
        """Nothing of the model is left."""
        self.kube.delete("HTTPRoute", MODEL, self.namespace)
        for name in self.deployments():
            self.kube.delete("Deployment", name, self.namespace)
        for pod in self.kube.list("Pod", self.namespace, labels=LABELS):
            self.kube.delete("Pod", pod["metadata"]["name"], self.namespace, grace_s=0)

    def spawn(self, seed: int) -> subprocess.Popen[str]:
        """A release in a process of its own."""
        inputs = [word for name, path in self.gate(seed).items() for word in ("--in", f"{name}={path}")]
        command = [sys.executable, "-m", "forja.stages", "release", "--recipe", MODEL, *inputs]
        env = {**self.stack.env, "PYTHONPATH": str(ROOT / "include"), "KUBECONFIG": str(self.kubeconfig)}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def account(kube: Kube, admin: Path, namespace: str, name: str, folder: Path) -> Path:
    """A kubeconfig file with a fresh token of a service account of any namespace."""
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
    token = kube.request("POST", f"{k8s.place('ServiceAccount', namespace)}/{name}/token", request)["status"]["token"]
    config = yaml.safe_load(admin.read_text())
    config["users"] = [{"name": config["users"][0]["name"], "user": {"token": token}}]
    path = folder / f"{namespace}-{name}.kubeconfig"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(config))
    return path


def apply_traffic(kube: Kube) -> None:
    """k8s/serving/traffic.yaml: what an administrator says about all routes of the gateway."""
    for manifest in yaml.safe_load_all((ROOT / "k8s" / "serving" / "traffic.yaml").read_text()):
        meta, plural = manifest["metadata"], manifest["kind"].lower().removesuffix("y") + "ies"
        path = f"/apis/{manifest['apiVersion']}/namespaces/{meta['namespace']}/{plural}/{meta['name']}"
        query = {"fieldManager": access.MANAGER, "force": "true"}
        kube.request("PATCH", path, manifest, query=query, content="application/apply-patch+yaml")


def secure(kube: Kube, site: Site) -> None:
    """``./forja baseline apply``: its service account and role are what a release in a pod acts with, its policies are in force."""
    plan.apply(kube, plan.plan(kube, site, adopt=True))


def at_rest(platform: Platform) -> bool:
    """Whether no run goes on: new data start one of their own beside the one by hand."""
    runs = platform.airflow._ask("GET", "/api/v2/dags/~/dagRuns?state=running&state=queued")["dag_runs"]
    return not any(found["dag_id"] in ("digits", "digits_ingest") for found in runs)


def claimed(route: Route) -> Route:
    """A route after a candidate was taken down: nothing changed but the version, which nobody can swap from any more."""
    return dataclasses.replace(route, version=route.version + 1)


def elsewhere(monkeypatch: pytest.MonkeyPatch, start_s: int = 120, **gateway: Any) -> None:
    """A site whose gateway differs, and whose pods get so many seconds to start."""

    def load(name: str) -> Site:
        site = load_site(name)
        assert site.gateway is not None
        profiles = {key: dataclasses.replace(profile, queue_timeout_s=start_s) for key, profile in site.profiles.items()}
        return dataclasses.replace(site, gateway=dataclasses.replace(site.gateway, **gateway), profiles=profiles)

    monkeypatch.setattr(release, "load_site", load)
