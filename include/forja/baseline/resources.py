"""Names of the GPU resources that a node can offer, so that a quota can name each of them.

What each GPU can be cut into is in ``forja.mig.tables``. Names drift between drivers and boards: what a node offers beside them,
``unnamed`` finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from forja.mig import tables
from forja.sites import Tenant

GPU = "nvidia.com/gpu"
"""Whole GPUs."""

VENDOR = "nvidia.com/"
"""What every GPU resource of a node begins with."""

SPELLINGS = ("3g.95gb", "4g.95gb", "7g.189gb", "1g.12gb", "1g.16gb", "2g.24gb", "2g.32gb", "4g.48gb")
"""Profiles of boards that the tables don't hold: GB200 with 189 GB, RTX PRO 5000 and 4500 (NVIDIA's MIG user guide)."""


def mig_resources() -> list[str]:
    """Names of all known MIG resources, sorted."""
    return sorted({p.resource for gpu in tables.GPUS.values() for p in gpu.profiles.values()} | {tables.resource(p) for p in SPELLINGS})


def granted(tenant: Tenant, more: Mapping[str, int]) -> dict[str, int]:
    """How many of each GPU resource a tenant may ask for; 0 of those that the site file doesn't grant.

    Args:
        more: of every tenant, by other names that this site's nodes use: ``resources`` of the site file's baseline.
    """
    mine = {tables.resource(profile): count for profile, count in tenant.mig.items()}
    return {GPU: tenant.gpus, **dict.fromkeys(mig_resources(), 0), **more, **mine}


def unnamed(nodes: Iterable[Mapping[str, Any]], named: Iterable[str], ignored: Iterable[str] = ()) -> dict[str, list[str]]:
    """GPU resources that nodes offer and no quota names, so that they are unlimited: the nodes that offer each.

    Args:
        nodes: Node objects.
        named: keys of a quota, ``requests.nvidia.com/gpu`` for example.
        ignored: resources that are no GPUs.
    """
    known, found = {*named, *(f"requests.{name}" for name in ignored)}, dict[str, list[str]]()
    for node in nodes:
        for name in (node.get("status") or {}).get("allocatable") or {}:
            if name.startswith(VENDOR) and f"requests.{name}" not in known:
                found.setdefault(name, []).append(str(node["metadata"]["name"]))
    return {name: sorted(found[name]) for name in sorted(found)}
