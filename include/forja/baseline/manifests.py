"""What the baseline installs for a tenant: the files of k8s/baseline, filled in from the site file.

A value that is exactly ``${name}`` is replaced by a value of any kind, a list or a map too; inside other text ``${name}`` is replaced by
text. ``namespace``, ``team``, ``gateway``, ``gpus`` and ``platform`` are known everywhere, ``stage`` in stage.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forja.baseline import resources
from forja.errors import BadInput
from forja.kube import Object
from forja.mig.probe import NAMESPACE as MIG
from forja.settings import ROOT
from forja.sites import Allow, Baseline, Gateway, Site, Tenant

FOLDER = ROOT / "k8s" / "baseline"
FILES = ("namespace.yaml", "accounts.yaml", "quota.yaml", "network.yaml")
"""In the order in which they are applied."""

PLATFORM = "forja"
"""Namespace of the accounts that Airflow acts as, see k8s/access."""

HOLE = re.compile(r"\$\{(\w+)\}")


def render(site: Site, tenant: Tenant) -> list[Object]:
    """All objects of one tenant, in the order in which they are applied.

    Raises:
        BadInput: the site has no baseline or no gateway, or a file names a value that there is none of.
    """
    baseline, gateway = parts(site)
    values = {
        "namespace": tenant.namespace, "team": tenant.team, "gateway": gateway.namespace,
        "gpus": {f"requests.{name}": str(count) for name, count in resources.granted(tenant, baseline.resources).items()},
        "platform": [rule(a) for a in baseline.allow if not a.stage],
    }  # fmt: skip
    found = [fill(document, values, file) for file in FILES for document in _documents(FOLDER / file)]
    for stage in sorted({a.stage for a in baseline.allow if a.stage}):
        mine = {**values, "stage": stage, "platform": [rule(a) for a in baseline.allow if a.stage == stage]}
        found += [fill(document, mine, "stage.yaml") for document in _documents(FOLDER / "stage.yaml")]
    return found


def parts(site: Site) -> tuple[Baseline, Gateway]:
    """The site's baseline and gateway.

    Raises:
        BadInput: it lacks one of them, or has no tenants; or two of all these would share a namespace.
    """
    for name in ("tenants", "gateway", "baseline"):
        if not getattr(site, name):
            raise BadInput(
                f"security baseline of site {site.name}", value=f"no {name}", allowed="a site of a cluster",
                do=f"set FORJA_SITE, or add {name} to include/sites/{site.name}.toml",
            )  # fmt: skip
    assert site.baseline is not None and site.gateway is not None  # noqa: S101, PT018 - the loop has seen to it
    names = [PLATFORM, MIG, site.gateway.namespace, site.baseline.probe_namespace, *(t.namespace for t in site.tenants.values())]
    shared = sorted({name for name in names if names.count(name) > 1})
    if shared:
        raise BadInput(
            f"namespaces of site {site.name}",
            value=", ".join(shared),
            allowed="one for each tenant, the gateway, the probes and Forja itself",
        )
    return site.baseline, site.gateway


def standard(site: Site, tenant: Tenant) -> str:
    """Pod Security Standard that is enforced, with its version, as refusals name it: ``restricted:v1.36``."""
    labels = next(o for o in render(site, tenant) if o["kind"] == "Namespace")["metadata"]["labels"]
    return ":".join(str(labels[f"pod-security.kubernetes.io/{key}"]) for key in ("enforce", "enforce-version"))


def tenants(site: Site, team: str = "") -> list[Tenant]:
    """The site's tenants, or the one of ``team``."""
    return [site.tenant(team)] if team else [site.tenants[name] for name in sorted(site.tenants)]


def rule(allow: Allow) -> Object:
    """Egress rule of a NetworkPolicy for one thing that tenants may reach."""
    if allow.cidr:
        peer: Object = {"ipBlock": {"cidr": allow.cidr}}
    else:
        peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": allow.namespace}}}
        if allow.pods:
            peer["podSelector"] = {"matchLabels": dict(allow.pods)}
    return {"to": [peer], "ports": [{"protocol": "TCP", "port": allow.port}]}


def fill(value: Any, values: Mapping[str, Any], where: str) -> Any:
    """``value`` with every hole in it filled; BadInput names a hole that nothing fills."""
    if isinstance(value, dict):
        return {fill(k, values, where): fill(v, values, where) for k, v in value.items()}
    if isinstance(value, list):
        return [fill(v, values, where) for v in value]
    if not isinstance(value, str):
        return value
    missing = [name for name in HOLE.findall(value) if name not in values]
    if missing:
        raise BadInput(f"k8s/baseline/{where}: value", value=missing[0], allowed=", ".join(sorted(values)))
    whole = HOLE.fullmatch(value)
    return values[whole[1]] if whole else HOLE.sub(lambda m: str(values[m[1]]), value)


def _documents(path: Path) -> list[Object]:
    import yaml

    return [document for document in yaml.safe_load_all(path.read_text()) if document]
