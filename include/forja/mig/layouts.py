"""Layouts of whole nodes in mig-parted's v1 format, read as strictly as mig-parted reads them.

A layout's name is what the node label ``nvidia.com/mig.config`` says. Each of its entries cuts the GPUs that its ``devices`` and
its ``device-filter`` match. https://github.com/NVIDIA/mig-parted/blob/main/api/spec/v1/spec.go is what a reader must refuse.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from forja.errors import BadInput
from forja.mig import planner
from forja.mig.tables import GPUS, Gpu
from forja.settings import ROOT

PATH = ROOT / "k8s" / "mig" / "layouts.yaml"
KEY = "config.yaml"
"""Key of the ConfigMap that the GPU operator's mig-manager reads."""

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
"""Value of a node label."""

FILTER = re.compile(r"0x[0-9A-Fa-f]{8}")
WHOLE = "nvidia.com/gpu"
"""Resource of GPUs that aren't cut."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """How some GPUs of a node are cut."""

    devices: tuple[int, ...] | None
    """Indexes of GPUs; None for all."""
    enabled: bool
    """Whether MIG is on."""
    instances: Mapping[str, int]
    """Instances of each profile on each of the GPUs."""
    filter: tuple[str, ...] = ()
    """PCI devices that it is for; empty for any."""

    def matches(self, gpu: Gpu) -> bool:
        """Whether it is for GPUs of this kind. A filter that names some of their boards counts: labels don't tell boards apart."""
        return not self.filter or any(f.upper() in {d.upper() for d in gpu.devices} for f in self.filter)


Layouts = Mapping[str, tuple[Entry, ...]]
"""Layouts by name."""


@cache
def load(path: Path = PATH) -> Layouts:
    """Read and check a file: plain configuration of mig-parted, or a ConfigMap that holds it under ``config.yaml``.

    Raises:
        BadInput: no such file, not the format, a field that the format doesn't have, or a layout that a GPU can't have.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise BadInput("file of MIG layouts", value=str(path), allowed="a file that can be read", do=str(error)) from error
    return parse(text, str(path))


def parse(text: str, where: str = "layouts") -> Layouts:
    """Read and check the text of a file; see ``load``."""
    body = _yaml(text, where)
    if isinstance(body, dict) and body.get("kind") == "ConfigMap":
        data = body.get("data")
        if not isinstance(data, dict) or list(data) != [KEY] or not isinstance(data[KEY], str):
            raise BadInput(f"{where}: data of the ConfigMap", value=list(data or {}), allowed=f"the key {KEY} alone, a text")
        where = f"{where}: {KEY}"
        body = _yaml(data[KEY], where)
    _fields(where, body, {"version", "mig-configs"}, {"version", "mig-configs"})
    if body["version"] != "v1":
        raise BadInput(f"{where}: version", value=body["version"], allowed="v1")
    configs = body["mig-configs"]
    if not isinstance(configs, dict) or not configs:
        raise BadInput(f"{where}: mig-configs", value=configs, allowed="layouts by name")
    found = {}
    for name, entries in configs.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise BadInput(f"{where}: name of a layout", value=name, allowed="the value of a label: at most 63 letters, digits, - _ .")
        if not isinstance(entries, list) or not entries:
            raise BadInput(f"{where}: {name}", value=entries, allowed="a list of one entry or more")
        found[name] = tuple(_entry(f"{where}: {name}[{i}]", entry) for i, entry in enumerate(entries))
    for name, entries in found.items():
        check(f"{where}: {name}", entries)
    return found


def check(where: str, entries: Sequence[Entry]) -> None:
    """Check a layout against the rules of every kind of GPU that it is for.

    Raises:
        BadInput: an entry that matches no known GPU, a profile that a GPU of it doesn't have, instances that don't fit, or two
            entries for one GPU.
    """
    for i, entry in enumerate(entries):
        kinds = [gpu for gpu in GPUS.values() if entry.matches(gpu)]
        if not kinds:
            raise BadInput(f"{where}[{i}].device-filter", value=list(entry.filter), allowed="device and vendor of a known GPU")
        for gpu in kinds:
            unknown = [n for n in entry.instances if n not in gpu.profiles]
            if unknown:
                raise BadInput(
                    f"{where}[{i}]: profile on {gpu.name}", value=unknown[0], allowed=", ".join(gpu.profiles),
                    do="add a device-filter that leaves this GPU out",
                )  # fmt: skip
            fit = planner.fits(gpu, entry.instances)
            if fit.layout is None:
                raise BadInput(f"{where}[{i}]: instances on {gpu.name}", value=dict(entry.instances), allowed=fit.reason)
    for gpu in GPUS.values():
        mine = [entry for entry in entries if entry.matches(gpu)]
        indexes = Counter(d for e in mine for d in (("all",) if e.devices is None else e.devices))
        if (indexes["all"] and len(mine) > 1) or any(n > 1 for n in indexes.values()):
            raise BadInput(where, value=f"two entries for one {gpu.name}", allowed="one entry for each GPU")


def of_gpus(where: str, entries: Sequence[Entry], gpu: Gpu, count: int) -> list[Entry]:
    """The entry of each GPU of a node.

    Raises:
        BadInput: the layout says nothing about one of them.
    """
    mine = [entry for entry in entries if entry.matches(gpu)]
    found = []
    for index in range(count):
        entry = next((e for e in mine if e.devices is None or index in e.devices), None)
        if entry is None:
            raise BadInput(f"layout {where}", value=f"GPU {index} of {count} x {gpu.name}", allowed="GPUs that the layout has an entry for")
        found.append(entry)
    return found


def resources(where: str, entries: Sequence[Entry], gpu: Gpu, count: int) -> dict[str, int]:
    """What a node has to offer under ``mig.strategy`` mixed when the layout is in force: resource to number, none of them 0."""
    total: Counter[str] = Counter()
    for entry in of_gpus(where, entries, gpu, count):
        if not entry.enabled:
            total[WHOLE] += 1
        for name, number in entry.instances.items():
            total[gpu.profiles[name].resource] += number
    return dict(sorted((+total).items()))


def pick(layouts: Layouts, name: str) -> tuple[Entry, ...]:
    """The layout called ``name``; BadInput when there is none."""
    if name not in layouts:
        raise BadInput(
            "MIG layout", value=name, allowed=", ".join(layouts), do="add it to k8s/mig/layouts.yaml and to the cluster's ConfigMap"
        )
    return layouts[name]


def _entry(where: str, body: Any) -> Entry:
    _fields(where, body, {"devices", "mig-enabled"}, {"device-filter", "devices", "mig-enabled", "mig-devices"})
    enabled, devices = body["mig-enabled"], body["devices"]
    if not isinstance(enabled, bool):
        raise BadInput(f"{where}.mig-enabled", value=enabled, allowed="true or false")
    if devices != "all" and (not isinstance(devices, list) or not all(_count(d) for d in devices) or len(set(devices)) != len(devices)):
        raise BadInput(f"{where}.devices", value=devices, allowed="all, or a list of indexes")
    given = body.get("device-filter", [])
    filters = [given] if isinstance(given, str) else given
    if not isinstance(filters, list) or not all(isinstance(f, str) and FILTER.fullmatch(f) for f in filters):
        raise BadInput(f"{where}.device-filter", value=given, allowed='like "0x233010DE", or a list of these')
    return Entry(
        devices=None if devices == "all" else tuple(devices),
        enabled=enabled,
        filter=tuple(filters),
        instances=_devices(where, body, enabled),
    )


def _devices(where: str, body: Mapping[str, Any], enabled: bool) -> dict[str, int]:
    where = f"{where}.mig-devices"
    if "mig-devices" not in body:
        if enabled:
            raise BadInput(where, value="nothing", allowed="instances by profile, {} for none yet")
        return {}
    given = body["mig-devices"]
    if not enabled and given:
        raise BadInput(where, value=given, allowed="nothing where mig-enabled is false")
    if not isinstance(given, dict):
        raise BadInput(where, value=given, allowed="instances by profile")
    for name, count in given.items():
        if not isinstance(name, str) or re.match(r"\d+c\.", name):
            raise BadInput(where, value=name, allowed="profiles of GPU instances, not of compute instances within them")
        if not _count(count):
            raise BadInput(f"{where}.{name}", value=count, allowed="0 or more")
    if given and not any(given.values()):
        raise BadInput(where, value=given, allowed="one instance or more, or {}")
    return {name: count for name, count in given.items() if count}


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _fields(where: str, body: Any, needed: set[str], known: set[str]) -> None:
    if not isinstance(body, dict):
        raise BadInput(where, value=body, allowed=f"fields {', '.join(sorted(known))}")
    for name in sorted(body.keys() - known, key=str):
        raise BadInput(f"{where}: unknown field", value=name, allowed=", ".join(sorted(known)))
    for name in sorted(needed - body.keys()):
        raise BadInput(f"{where}: field {name} is missing", allowed=", ".join(sorted(needed)))


def _yaml(text: str, where: str) -> Any:
    """A YAML document; a key that is there twice is an error, as it is for mig-parted, where YAML's reader takes the last one."""
    import yaml

    # The parser in C is ten times as fast, and Airflow reads this file in every task.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        left = [yaml.compose(text, Loader=loader)]
        seen: set[int] = set()
        while left:
            node = left.pop()
            if id(node) in seen or not isinstance(node, yaml.CollectionNode):
                continue
            seen.add(id(node))
            if isinstance(node, yaml.MappingNode):
                twice = [key for key, n in Counter(key.value for key, _ in node.value if isinstance(key.value, str)).items() if n > 1]
                if twice:
                    raise BadInput(f"{where}: key is there twice", value=twice[0], allowed="each key once")
            left += [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        return yaml.load(text, Loader=loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise BadInput(f"{where} is no YAML", value=str(error)[:300]) from error
