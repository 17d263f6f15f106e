"""Sites: a file in include/sites names the profiles of one place, and for a cluster its tenants, its gateway and its baseline.

Only the standard library may be imported here: DAG files read sites while Airflow parses them.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from forja.errors import BadInput
from forja.profiles import Profile
from forja.recipes import names as recipe_names
from forja.recipes.base import STAGES, Recipe, Serving
from forja.settings import ROOT

SITES = ROOT / "include" / "sites"
BATCH = "max_batch"
"""Key beside the fields of ``Serving`` in a site's table of a recipe."""
Built = TypeVar("Built")
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""Names of namespaces and values of labels in Kubernetes (RFC 1123)."""
RESOURCE = re.compile(r"nvidia\.com/[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
METADATA = tuple(ipaddress.ip_address(a) for a in ("169.254.169.254", "fd00:ec2::254"))
"""Where clouds hand a machine's credentials to whoever asks from it."""


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """What a team has of a cluster: a namespace that its stages and its served models live in, and GPUs."""

    team: str
    namespace: str
    gpus: int = 0
    """Whole GPUs that the team's pods may ask for together."""
    mig: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """MIG slices that they may ask for, by profile, for example ``{"1g.10gb": 7}``; none of those that aren't named."""

    def __post_init__(self) -> None:
        for field, value in (("namespace", self.namespace), ("team", self.team)):
            if not NAME.fullmatch(value):
                raise BadInput(f"tenant {self.team}: field {field}", value=value, allowed="a-z, 0-9 and -, at most 63")
        for field, count in (("gpus", self.gpus), *((f"mig.{k}", v) for k, v in self.mig.items())):
            if count < 0:
                raise BadInput(f"tenant {self.team}: field {field}", value=count, allowed="0 or more")


@dataclass(frozen=True, kw_only=True)
class Allow:
    """One thing beside their own pods that tenants' pods may reach: an address range, or pods of a namespace."""

    name: str
    address: str
    """``host:port`` under which pods know it; the proof of the baseline connects to it."""
    port: int
    """TCP port where it listens behind its Service: policies see a connection after the Service's address was replaced."""
    cidr: str = ""
    """Address range, for what runs outside pods."""
    namespace: str = ""
    """Namespace, for what runs in pods."""
    pods: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Labels of those pods; all of the namespace when empty."""
    stage: str = ""
    """Only pods of this stage may reach it, for example ``release``; all of the tenant when empty."""

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, allowed: str) -> None:
            if not ok:
                raise BadInput(f"baseline.allow {self.name}: field {field}", value=getattr(self, field), allowed=allowed)

        host, _, port = self.address.rpartition(":")
        check(bool(NAME.fullmatch(self.name)), "name", "a-z, 0-9 and -, at most 63")
        check(bool(host) and port.isdigit() and 0 < int(port) < 65536, "address", "host:port")
        check(0 < self.port < 65536, "port", "1 to 65535")
        check(bool(self.cidr) != bool(self.namespace), "cidr", "either cidr or namespace")
        check(
            not self.cidr or _is_range(self.cidr),
            "cidr",
            "a range like 10.1.2.0/24: /8 or narrower (IPv6: /16), without a cloud's metadata",
        )
        check(not self.namespace or bool(NAME.fullmatch(self.namespace)), "namespace", "a-z, 0-9 and -, at most 63")
        check(not self.pods or bool(self.namespace), "pods", "labels of pods together with a namespace")
        check(not self.stage or self.stage in STAGES, "stage", ", ".join(STAGES))


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What the security baseline lets tenants reach, and how it proves itself."""

    probe_image: str
    """Image of the probes' pods: anything with ``python3`` 3.10 or newer, small and present on the nodes."""
    probe_namespace: str = "forja-probe"
    """Namespace without network policies: probes from and to there show that a path works but for a tenant's policies."""
    allow: tuple[Allow, ...] = ()
    resources: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """GPU resources of other names that nodes offer (``nvidia.com/gpu.shared``), and how many of each a tenant may ask for: 0 for none."""
    ignore: tuple[str, ...] = ()
    """Resources ``nvidia.com/...`` that nodes offer and that are no GPUs: they need no quota."""

    def __post_init__(self) -> None:
        for name, count in self.resources.items():
            if not RESOURCE.fullmatch(name) or name == "nvidia.com/gpu" or count < 0:
                raise BadInput(
                    "baseline: field resources", value={name: count}, allowed="nvidia.com/NAME = 0 or more, gpu itself by tenant"
                )
        for name in self.ignore:
            if not RESOURCE.fullmatch(name) or name == "nvidia.com/gpu" or name in self.resources:
                raise BadInput("baseline: field ignore", value=name, allowed="nvidia.com/NAME that is no GPU and isn't in resources")
        if not NAME.fullmatch(self.probe_namespace):
            raise BadInput("baseline: field probe_namespace", value=self.probe_namespace, allowed="a-z, 0-9 and -, at most 63")
        names = [a.name for a in self.allow]
        if len(set(names)) != len(names):
            raise BadInput("baseline.allow: names", value=names, allowed="each name once")


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """How requests reach the models of a cluster: the Gateway (gateway.networking.k8s.io) that routes are attached to."""

    name: str
    namespace: str
    image: str
    """Image of Triton's pods."""
    fetch_image: str
    """Image of the container that brings a release from the lake into Triton's pod before Triton starts."""
    cpus: float = 1.0
    """CPU cores of a Triton pod."""
    memory_gib: float = 2.0
    """Memory of a Triton pod in GiB."""
    gpus: int = 0
    """Whole GPUs of a Triton pod."""
    replicas: int = 1
    """Triton pods of one release."""

    def __post_init__(self) -> None:
        for field in ("name", "namespace"):
            if not NAME.fullmatch(getattr(self, field)):
                raise BadInput(f"gateway: field {field}", value=getattr(self, field), allowed="a-z, 0-9 and -, at most 63")


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place: its name, pools and profiles; of a cluster also its tenants and its gateway."""

    name: str
    pools: Mapping[str, int]
    """Slots of each Airflow pool."""
    profiles: Mapping[str, Profile]
    tenants: Mapping[str, Tenant] = dataclasses.field(default_factory=dict)
    """By team."""
    gateway: Gateway | None = None
    """None where Envoy and Triton are processes of this machine."""
    baseline: Baseline | None = None
    """None where there is no cluster to secure."""
    serving: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Fields of ``Serving``, and ``max_batch``, that are other here than in the recipe, by recipe; ``./forja tune`` measures them."""

    def serving_of(self, recipe: Recipe) -> Serving:
        """How Triton queues and batches a recipe's requests here: as the recipe says, but for what the site says."""
        return dataclasses.replace(recipe.serving, **{k: v for k, v in self.serving.get(recipe.name, {}).items() if k != BATCH})

    def max_batch_of(self, recipe: Recipe) -> int:
        """Largest batch that Triton makes of a recipe's requests here; BadInput for more than the recipe's engines take."""
        found, most = int(self.serving.get(recipe.name, {}).get(BATCH, recipe.optimize.max_batch)), recipe.optimize.max_batch
        if not 1 <= found <= most:
            raise BadInput(f"site {self.name}: serving.{recipe.name}.{BATCH}", value=found, allowed=f"1 to optimize.max_batch ({most})")
        return found

    def tenant(self, team: str) -> Tenant:
        """The tenant of a team; BadInput when the site has none."""
        if team not in self.tenants:
            raise BadInput(
                f"tenant in site {self.name}", value=team, allowed=", ".join(sorted(self.tenants)) or "none yet",
                do=f"add [tenants.{team}] to include/sites/{self.name}.toml",
            )  # fmt: skip
        return self.tenants[team]

    def profile(self, name: str) -> Profile:
        """The profile called ``name``; BadInput when the site has none."""
        if name not in self.profiles:
            raise BadInput(
                f"profile in site {self.name}", value=name, allowed=", ".join(sorted(self.profiles)),
                do=f"add [profiles.{name}] to include/sites/{self.name}.toml",
            )  # fmt: skip
        return self.profiles[name]


def load_site(name: str, folder: Path = SITES) -> Site:
    """Read include/sites/<name>.toml strictly: an unknown key is an error.

    Raises:
        BadInput: no such file, no valid TOML, an unknown key, or a value that a profile refuses.
    """
    path = folder / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
        raise BadInput("site", value=name, allowed=known, do="set FORJA_SITE to one of these, or add the file")
    try:
        data = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path} is no valid TOML", value=str(error)) from error
    _only(path, "", data, {"pools", "defaults", "profiles", "tenants", "gateway", "baseline", "serving"})
    pools, defaults = _table(path, "pools", data.get("pools", {})), _table(path, "defaults", data.get("defaults", {}))
    for pool, slots in pools.items():
        _check(path, f"pools.{pool}", slots, "int")
    profiles, tenants = {}, {}
    for key, table in _table(path, "profiles", data.get("profiles", {})).items():
        profiles[key] = _build(path, f"profiles.{key}", Profile, {**defaults, **_table(path, f"profiles.{key}", table)}, name=key)
        if profiles[key].pool not in pools:
            raise BadInput(f"{path}: profiles.{key}.pool", value=profiles[key].pool, allowed=", ".join(sorted(pools)))
    for team, table in _table(path, "tenants", data.get("tenants", {})).items():
        tenants[team] = _build(path, f"tenants.{team}", Tenant, table, team=team)
    return Site(
        name=name, pools=pools, profiles=profiles, tenants=tenants,
        gateway=_build(path, "gateway", Gateway, data["gateway"]) if "gateway" in data else None,
        baseline=_baseline(path, data["baseline"]) if "baseline" in data else None, serving=_serving(path, data.get("serving", {})),
    )  # fmt: skip


def _serving(path: Path, table: object) -> dict[str, dict[str, Any]]:
    found = _table(path, "serving", table)
    _only(path, "serving.", found, set(recipe_names()))
    for name, fields in found.items():
        rest = dict(_table(path, f"serving.{name}", fields))
        _check(path, f"serving.{name}.{BATCH}", rest.pop(BATCH, 1), "int")
        _build(path, f"serving.{name}", Serving, rest)  # refuses what no recipe may say either
    return found


def _baseline(path: Path, table: object) -> Baseline:
    rest = dict(_table(path, "baseline", table))
    entries = rest.pop("allow", [])
    if not isinstance(entries, list):
        raise BadInput(f"{path}: baseline.allow", value=entries, allowed="tables [[baseline.allow]]")
    return _build(path, "baseline", Baseline, rest, allow=tuple(_build(path, "baseline.allow", Allow, entry) for entry in entries))


def _build(path: Path, prefix: str, kind: Callable[..., Built], table: object, **given: object) -> Built:
    """A table of the file as a dataclass; BadInput names an unknown key, a value of another type, or a key that is missing.

    Args:
        given: fields that the table doesn't hold.
    """
    values = _table(path, prefix, table)
    fields = {f.name: str(f.type) for f in dataclasses.fields(kind) if f.name not in given}  # type: ignore[arg-type]
    _only(path, f"{prefix}.", values, set(fields))
    for key, value in values.items():
        _check(path, f"{prefix}.{key}", value, fields[key])
    try:
        return kind(**given, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except TypeError as error:
        raise BadInput(f"{path}: table {prefix}", value=str(error), allowed=f"keys {', '.join(sorted(fields))}") from None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "int": (_whole, "a whole number"),
    "float": (lambda v: _whole(v) or isinstance(v, float), "a number"),
    "str": (lambda v: isinstance(v, str), "a text"),
    "bool": (lambda v: isinstance(v, bool), "true or false"),
    "Mapping[str, int]": (lambda v: isinstance(v, dict) and all(map(_whole, v.values())), "a table of whole numbers"),
    "Mapping[str, str]": (lambda v: isinstance(v, dict) and all(isinstance(x, str) for x in v.values()), "a table of texts"),
    "tuple[str, ...]": (lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v), "a list of texts"),
}
"""What a value must be for a field's annotation, and that in words; other annotations are left to the dataclass itself."""


def _check(path: Path, name: str, value: object, annotation: str) -> None:
    fits, words = TYPES.get(annotation, (lambda _: True, ""))
    if not fits(value):
        raise BadInput(f"{path}: {name}", value=value, allowed=words)


def _table(path: Path, name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadInput(f"{path}: {name}", value=value, allowed="a table")
    return value


def _is_range(text: str) -> bool:
    try:
        found = ipaddress.ip_network(text)
    except ValueError:
        return False
    return found.prefixlen >= {4: 8, 6: 16}[found.version] and not any(address in found for address in METADATA)


def _only(path: Path, prefix: str, table: Mapping[str, object], allowed: set[str]) -> None:
    for key in table:
        if key not in allowed:
            raise BadInput(f"{path}: unknown key", value=prefix + key, allowed=", ".join(sorted(allowed)))
