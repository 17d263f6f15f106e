"""What differs between the baseline and the cluster, and the change that mends it.

Everything is applied server-side with one field manager, so that the API server knows what is ours: a difference is a field that
we own and somebody changed, others' fields are left alone, and an object that we never applied is not taken over unless told.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from forja.baseline import manifests
from forja.errors import Refused
from forja.kube import ApiError, Kube, Object
from forja.sites import Site

MANAGER = "forja-baseline"
"""Field manager of everything that is applied here."""

TENANT = "forja.dev/tenant"
"""Label of a tenant's namespace: its team."""

PRUNED = ("ServiceAccount", "RoleBinding", "ResourceQuota", "NetworkPolicy")
"""Kinds of which objects of ours that are no longer wanted are deleted."""

THREADS = 4
"""Questions to the API server at once."""

UNTOUCHED = ("managedFields", "resourceVersion", "generation", "uid", "creationTimestamp", "selfLink")
"""Metadata that the API server writes."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One object that the baseline would create, change or delete."""

    verb: Literal["create", "change", "delete", "refuse"]
    """``refuse``: it stays as it is, and nothing is applied while it does."""
    manifest: Object
    fields: tuple[str, ...] = ()
    """What differs, one line for each field: path, what is there, what is wanted."""

    @property
    def name(self) -> str:
        """Kind, namespace and name, for people."""
        meta = self.manifest["metadata"]
        return f"{self.manifest['kind']} {meta['namespace'] + '/' if meta.get('namespace') else ''}{meta['name']}"

    def lines(self) -> list[str]:
        """The change as a person reads it."""
        sign = {"create": "+", "change": "~", "delete": "-", "refuse": "!"}[self.verb]
        return [f"{sign} {self.name}", *(f"    {line}" for line in self.fields)]


def plan(kube: Kube, site: Site, team: str = "", *, adopt: bool = False) -> list[Change]:
    """What would be done to the cluster; empty when it is as the baseline wants it.

    Args:
        team: of this tenant only; of all when empty.
        adopt: take over objects of the same names that somebody else made.

    Raises:
        BadInput: the site has no baseline.
        ApiError, Unavailable: the API server's.
    """
    changes: list[Change] = []
    for tenant in manifests.tenants(site, team):
        wanted = manifests.render(site, tenant)
        there = kube.get("Namespace", tenant.namespace) is not None
        with ThreadPoolExecutor(THREADS) as pool:
            made = pool.map(partial(_change, kube, fresh=not there, adopt=adopt), wanted)
            changes += [change for change in made if change is not None]
        keep = {(m["kind"], m["metadata"]["name"]) for m in wanted}
        if there:
            old = [o for o in owned(kube, tenant.namespace) if (o["kind"], o["metadata"]["name"]) not in keep]
            changes += [Change(verb="delete", manifest=o) for o in old]
    return changes


def left(kube: Kube, site: Site) -> list[str]:
    """Namespaces that the baseline was applied to for tenants that the site file doesn't have any more: one line each, with what to do.

    Nobody keeps them, and they keep their labels and rights. The account of the DAG may not list namespaces: then the one line says so.

    Raises:
        ApiError, Unavailable: the API server's, other than a 403.
    """
    try:
        found = kube.list("Namespace", labels=TENANT)
    except ApiError as error:
        if error.status != 403:
            raise
        return [
            "! tenants that left the site file: not looked for, since this account may not list namespaces; an administrator's plan does"
        ]
    here = {t.namespace for t in site.tenants.values()}
    old = [(n["metadata"]["name"], n["metadata"]["labels"][TENANT]) for n in found if n["metadata"]["name"] not in here and ours(n)]
    return [
        f"! Namespace {name}: no tenant of site {site.name} has it, and nobody keeps its baseline: put [tenants.{team}] back as it was, "
        f"run ./forja baseline remove --tenant {team}, and take it out again; or delete the namespace"
        for name, team in old
    ]


def apply(kube: Kube, changes: Sequence[Change]) -> None:
    """Do what a plan says.

    Raises:
        Refused: the plan meets objects of somebody else's; nothing was done then.
        ApiError, Unavailable: the API server's, what came before is done.
    """
    foreign = [c for c in changes if c.verb == "refuse"]
    if foreign:
        raise Refused(
            "the baseline can't be applied to", value="; ".join(f"{c.name}: {', '.join(c.fields)}" for c in foreign),
            allowed="objects that the baseline made", do="look at them: --adopt takes over what has somebody else's name, or delete them",
        )  # fmt: skip
    for change in changes:
        meta = change.manifest["metadata"]
        if change.verb == "delete":
            kube.delete(change.manifest["kind"], meta["name"], meta["namespace"])
        else:
            kube.apply(change.manifest, manager=MANAGER)


def remove(kube: Kube, site: Site, team: str = "", *, namespaces: bool = False) -> list[str]:
    """Take off what apply installed; gives the names of what was removed.

    Args:
        team: of this tenant only; of all when empty.
        namespaces: delete the tenants' namespaces too, with all that is in them. Without it they stay, less our labels.
    """
    gone = []
    for tenant in manifests.tenants(site, team):
        live = kube.get("Namespace", tenant.namespace)
        if live is None:
            continue
        for found in reversed(list(owned(kube, tenant.namespace))):
            kube.delete(found["kind"], found["metadata"]["name"], tenant.namespace)
            gone.append(Change(verb="delete", manifest=found).name)
        if namespaces and ours(live):
            kube.delete("Namespace", tenant.namespace)
            gone.append(f"Namespace {tenant.namespace}")
        elif ours(live):
            # Applied without any field, so that those of ours go.
            kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": tenant.namespace}}, manager=MANAGER)
            gone.append(f"labels of Namespace {tenant.namespace}")
    return gone


def owned(kube: Kube, namespace: str) -> Iterator[Object]:
    """Objects in a namespace that the baseline applied."""
    for kind in PRUNED:
        yield from (o for o in kube.list(kind, namespace) if ours(o))


def ours(live: Object) -> bool:
    """Whether the baseline applied an object: the API server remembers, labels could be anybody's."""
    fields = live["metadata"].get("managedFields") or []
    return any(f.get("manager") == MANAGER and f.get("operation") == "Apply" and f.get("fieldsV1") for f in fields)


def _change(kube: Kube, manifest: Object, *, fresh: bool, adopt: bool) -> Change | None:
    """What one object needs, None when nothing; ``fresh`` when its namespace isn't there yet."""
    meta = manifest["metadata"]
    live = None if fresh else kube.get(manifest["kind"], meta["name"], meta.get("namespace", ""))
    if live is None:
        return Change(verb="create", manifest=manifest)
    if not ours(live) and not adopt:
        named = f" (no label {TENANT})" if manifest["kind"] == "Namespace" and TENANT not in (live["metadata"].get("labels") or {}) else ""
        return Change(verb="refuse", manifest=manifest, fields=(f"it is there and the baseline didn't make it{named}",))
    try:
        then = kube.apply(manifest, manager=MANAGER, dry_run=True)
    except ApiError as error:
        if error.status != 422:
            raise
        # A field that can't change, as the role of a binding.
        return Change(verb="refuse", manifest=manifest, fields=(error.message,))
    fields = tuple(difference(_plain(live), _plain(then)))
    return Change(verb="change", manifest=manifest, fields=fields) if fields or not ours(live) else None


def difference(before: Any, after: Any, path: str = "") -> Iterable[str]:
    """Fields that differ, as ``path: before -> after``; of lists the items that go and come."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from difference(before.get(key), after.get(key), f"{path}.{key}" if path else key)
    elif isinstance(before, list) and isinstance(after, list) and (items := _items(before, after)):
        yield from (f"{path}: {item}" for item in items)
    elif before != after:
        yield f"{path}: {_short(before)} -> {_short(after)}"


def _items(before: list[Any], after: list[Any]) -> list[str]:
    return [f"- {json.dumps(i)}" for i in before if i not in after] + [f"+ {json.dumps(i)}" for i in after if i not in before]


def _short(value: Any) -> str:
    return "nothing" if value is None else str(value)


def _plain(live: Object) -> Object:
    """What people decide about: no status, none of the API server's own metadata."""
    meta = {k: v for k, v in live["metadata"].items() if k not in UNTOUCHED}
    return {**{k: v for k, v in live.items() if k != "status"}, "metadata": meta}
