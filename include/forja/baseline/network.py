"""Proofs by connections: which pods call which, and what must come of it.

Each tenant gets two pods that listen, one as Triton's and a gang's, one as nobody's, and two that call, as the release stage's and as a
gang member's. A pod in the gateway's namespace and one in a namespace without policies call them all. Traffic into a tenant comes from
where nothing holds it back, traffic out of it goes where nothing keeps it out, so each tenant's verdict is about its own policies.
That nothing does is shown too, on the very port that is refused: each of the two namespaces has a pod that listens, which the other
one's caller must reach. So a policy there that closes a port, or shuts the namespace off, is never taken for the tenants' own; one that
names the tenants' namespaces would be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from forja.baseline import manifests
from forja.baseline.probes import Probe
from forja.sites import Allow, Site, Tenant

MODEL_PORT = 8000
"""Triton's port, which the gateway and the release stage may reach."""
OTHER_PORT = 9999
"""A port that only members of a gang may reach."""

MODEL = {"app.kubernetes.io/name": "triton"}
GANG = {"forja/gang": "forja-probe"}
RELEASE = {"forja/stage": "release"}

DROPPED = "no answer"
"""How the agent words a connection that nothing answered."""
REJECTED = f"{DROPPED}|rejected"
"""The same, or that an enforcer answered with a rejection; the witness shows that it was no closed port."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A pod that listens."""

    name: str
    """For people, as in names of calls."""
    role: str
    """In the pod's name."""
    namespace: str
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    ports: tuple[int, ...]

    @property
    def ready(self) -> str:
        """Name of the call by which the kubelet found that it listens."""
        return f"kubelet to {self.name}"


@dataclass(frozen=True, kw_only=True)
class Client:
    """A pod that calls."""

    name: str
    role: str
    namespace: str
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One connection that a client tries."""

    client: Client
    host: str | Server
    """A name, or a server whose address is known once it runs."""
    port: int
    """0 asks DNS only."""
    refused: bool

    @property
    def name(self) -> str:
        """Who calls whom; unique."""
        if not self.port:
            return f"{self.client.name} to DNS"
        return f"{self.client.name} to {self.host if isinstance(self.host, str) else self.host.name}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All pods and calls of one proof, and the probes that they answer."""

    servers: tuple[Server, ...]
    calls: tuple[Call, ...]
    probes: tuple[Probe, ...]


@dataclass(frozen=True, kw_only=True)
class Place:
    """The pods of one tenant."""

    tenant: Tenant
    model: Server
    plain: Server
    gang: Client
    release: Client


def place(tenant: Tenant) -> Place:
    """The pods that stand for a tenant's."""
    t, namespace = tenant.team, tenant.namespace
    return Place(
        tenant=tenant,
        model=Server(name=f"{t} model", role="model", namespace=namespace, labels={**MODEL, **GANG}, ports=(MODEL_PORT, OTHER_PORT)),
        plain=Server(name=f"{t} pod", role="pod", namespace=namespace, ports=(MODEL_PORT,)),
        gang=Client(name=f"{t} gang", role="gang", namespace=namespace, labels=GANG),
        release=Client(name=f"{t} release", role="release", namespace=namespace, labels=RELEASE),
    )  # fmt: skip


def scene(site: Site, teams: Sequence[str]) -> Scene:
    """Who calls whom to prove the network control of some tenants; the others are there as neighbours."""
    baseline, gateway = manifests.parts(site)
    outside = Client(name="outside", role="outside", namespace=baseline.probe_namespace)
    front = Client(name="gateway", role="gateway", namespace=gateway.namespace)
    elsewhere = Server(name="elsewhere", role="elsewhere", namespace=baseline.probe_namespace, ports=(MODEL_PORT, OTHER_PORT))
    beyond = Server(name="gateway pod", role="pod", namespace=gateway.namespace, ports=(MODEL_PORT,))
    order = sorted(site.tenants)
    places = {team: place(site.tenants[team]) for team in order}
    leaves, (comes, comes_by_other) = _dial(outside, beyond, MODEL_PORT), [_dial(front, elsewhere, port) for port in elsewhere.ports]
    witnesses = [
        _dial(outside, elsewhere, MODEL_PORT),
        Call(client=outside, host=DNS, port=0, refused=False),
        *(_to(outside, allow, refused=False) for allow in baseline.allow),
        leaves, comes, comes_by_other,
    ]  # fmt: skip
    calls, probes = {c.name: c for c in witnesses}, list[Probe]()
    for team in teams:
        mine, index = places[team], order.index(team)
        pairs = [*_inwards(mine, front, outside), *_outwards(mine, outside, elsewhere, baseline.allow)]
        also = {outside: leaves, front: comes_by_other, mine.gang: comes, mine.release: comes}
        if len(order) > 1:
            pairs += _across(mine, places[order[(index + 1) % len(order)]], front)
        for call, seen in pairs:
            calls[call.name] = call
            ours, needs_path = isinstance(call.host, Server), call.refused and (call.client in (outside, front) or call.host == elsewhere)
            probes.append(Probe(
                team=team, control="network", name=call.name, refused=call.refused, witnesses=seen,
                # What must be reached and is no pod of ours may have gone down since its witness reached it.
                reason=REJECTED if call.refused or ours else DROPPED,
                also=(also[call.client].name,) if needs_path else (),
            ))  # fmt: skip
    # What a probe's witness is, has to be called too, also of a neighbour that isn't asked about.
    for other in places.values():
        for call in (_dial(front, other.model, MODEL_PORT), _dial(other.gang, other.model, OTHER_PORT)):
            if any(call.name in p.witnesses for p in probes):
                calls.setdefault(call.name, call)
    used = {c.host.name for c in calls.values() if isinstance(c.host, Server)}
    servers = [s for s in (elsewhere, beyond, *(s for p in places.values() for s in (p.model, p.plain))) if s.name in used]
    return Scene(servers=tuple(servers), calls=tuple(calls.values()), probes=tuple(probes))


DNS = "kubernetes.default.svc"
"""A name that every cluster's DNS knows."""

Pair = tuple[Call, tuple[str, ...]]


def _inwards(mine: Place, front: Client, outside: Client) -> list[Pair]:
    """Who may call a tenant's pods: the gateway its models, its release stage too, and nobody else."""
    by_front, by_release = _dial(front, mine.model, MODEL_PORT), _dial(mine.release, mine.model, MODEL_PORT)
    by_gang = _dial(mine.gang, mine.model, OTHER_PORT)
    return [
        (by_front, (by_release.name, mine.model.ready)),
        (by_release, (by_front.name, mine.model.ready)),
        (by_gang, (mine.model.ready,)),
        (_dial(front, mine.model, OTHER_PORT, refused=True), (by_gang.name,)),
        (_dial(outside, mine.model, MODEL_PORT, refused=True), (by_front.name, by_release.name)),
        (_dial(outside, mine.plain, MODEL_PORT, refused=True), (mine.plain.ready,)),
        (_dial(mine.release, mine.plain, MODEL_PORT, refused=True), (mine.plain.ready,)),
    ]


def _outwards(mine: Place, outside: Client, elsewhere: Server, allowed: Sequence[Allow]) -> list[Pair]:
    """What a tenant's pods may call: DNS and what the site file allows, and nothing else."""
    pairs: list[Pair] = [
        (Call(client=mine.gang, host=DNS, port=0, refused=False), (Call(client=outside, host=DNS, port=0, refused=False).name,)),
        (_dial(mine.gang, elsewhere, MODEL_PORT, refused=True), (_dial(outside, elsewhere, MODEL_PORT).name,)),
        (_dial(mine.release, elsewhere, MODEL_PORT, refused=True), (_dial(outside, elsewhere, MODEL_PORT).name,)),
    ]
    for allow in allowed:
        seen = _to(outside, allow, refused=False).name
        by_release = _to(mine.release, allow, refused=False)
        if not allow.stage:
            pairs.append((_to(mine.gang, allow, refused=False), (seen,)))
        elif allow.stage == RELEASE["forja/stage"]:
            pairs += [(by_release, (seen,)), (_to(mine.gang, allow, refused=True), (by_release.name, seen))]
        else:
            pairs.append((_to(mine.gang, allow, refused=True), (seen,)))
    return pairs


def _across(mine: Place, other: Place, front: Client) -> list[Pair]:
    """Whom a tenant's pods may not call although the neighbour's own pods may be called like this."""
    return [
        (_dial(mine.release, other.model, MODEL_PORT, refused=True), (_dial(front, other.model, MODEL_PORT).name, other.model.ready)),
        (_dial(mine.gang, other.model, OTHER_PORT, refused=True), (_dial(other.gang, other.model, OTHER_PORT).name, other.model.ready)),
    ]


def _dial(client: Client, server: Server, port: int, *, refused: bool = False) -> Call:
    return Call(client=client, host=server, port=port, refused=refused)


def _to(client: Client, allow: Allow, *, refused: bool) -> Call:
    host, _, port = allow.address.rpartition(":")
    return Call(client=client, host=host, port=int(port), refused=refused)
