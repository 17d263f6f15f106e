"""Exact plans for one GPU: does a set of instances fit, where does each go, and what of a layout can stay.

The rules are the driver's: instances take disjoint intervals of memory slices at allowed starts, no profile has more
instances than its InstanceCount, and engines add up to no more than the whole GPU has. (The Kubernetes DRA driver for NVIDIA
GPUs models a device by these same counters: one for each memory slice, one for each engine.) The order in which a driver is
asked without starts decides whether a set that fits is found, so plans name the starts.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from forja.errors import BadInput, Refused
from forja.mig.tables import Gpu, InstanceProfile


@dataclass(frozen=True, order=True)
class Instance:
    """A GPU instance at its place."""

    start: int
    """First memory slice."""
    profile: str

    def __str__(self) -> str:
        return f"{self.profile}:{self.start}"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Instances on one GPU, by start."""

    gpu: Gpu = field(repr=False)
    instances: tuple[Instance, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Instances of each profile, in the order of the GPU's profiles."""
        found = Counter(i.profile for i in self.instances)
        return {name: found[name] for name in self.gpu.profiles if name in found}

    @property
    def pairs(self) -> list[str]:
        """``profile:start`` in an order that any driver can create them in: the largest first."""
        sizes = self.gpu.profiles
        return [str(i) for i in sorted(self.instances, key=lambda i: (-sizes[i.profile].size, i.start))]

    @property
    def command(self) -> str:
        """What makes it on the first GPU of a machine; empty for no instances."""
        return f"nvidia-smi mig -i 0 -cgi {','.join(self.pairs)} -C" if self.instances else ""

    @property
    def free(self) -> int:
        """Memory slices that no instance takes."""
        return self.gpu.units - sum(self.gpu.profiles[i.profile].size for i in self.instances)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Answer to whether instances fit."""

    layout: Layout | None
    reason: str = ""
    """Why not; empty when they fit."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What leads from one layout to another with the fewest instances destroyed."""

    keep: tuple[Instance, ...]
    destroy: tuple[Instance, ...]
    create: tuple[Instance, ...]
    """In an order that works, after the destruction."""
    layout: Layout


def fits(gpu: Gpu, wanted: Mapping[str, int]) -> Fit:
    """Whether instances fit on an empty GPU, and where.

    Args:
        wanted: instances of each profile.

    Raises:
        BadInput: a profile that the GPU doesn't have, or a negative count.
    """
    order = _instances(gpu, wanted)
    reason = _room(gpu, order)
    found = None if reason else _place(order, 0)
    if found is None:
        return Fit(layout=None, reason=reason or _conflict(gpu, order))
    reason = _engines(gpu, order)
    if reason:
        return Fit(layout=None, reason=reason)
    return Fit(layout=Layout(gpu=gpu, instances=tuple(sorted(found))))


def plan(gpu: Gpu, wanted: Mapping[str, int]) -> Layout:
    """The layout of wanted instances; Refused with the reason when they don't fit."""
    fit = fits(gpu, wanted)
    if fit.layout is None:
        said = " + ".join(f"{count} x {name}" for name, count in wanted.items() if count)
        raise Refused(f"{said} don't fit on {gpu.name}: {fit.reason}")
    return fit.layout


def difference(current: Layout, wanted: Mapping[str, int]) -> Difference:
    """The way from a layout to wanted instances that keeps as many as can stay.

    Raises:
        BadInput: see ``fits``.
        Refused: they don't fit, whatever is destroyed.
    """
    gpu = current.gpu
    plan(gpu, wanted)
    for size in range(len(current.instances), -1, -1):
        for keep in itertools.combinations(current.instances, size):
            rest = Counter(wanted)
            rest.subtract(i.profile for i in keep)
            if min(rest.values(), default=0) < 0:
                continue
            found = _place(_instances(gpu, rest), sum(_mask(gpu.profiles[i.profile], i.start) for i in keep))
            if found is not None:
                gone = tuple(i for i in current.instances if i not in keep)
                layout = Layout(gpu=gpu, instances=tuple(sorted((*keep, *found))))
                return Difference(keep=keep, destroy=gone, create=tuple(found), layout=layout)
    raise AssertionError("with nothing kept, the plan for an empty GPU is found")


def placed(gpu: Gpu, pairs: Collection[str]) -> Layout:
    """The layout of ``profile:start`` pairs, checked against the rules.

    Raises:
        BadInput: no such pair, or pairs that can't be together.
    """
    instances = []
    for pair in pairs:
        name, _, start = pair.rpartition(":")
        if not start.isdecimal() or int(start) not in gpu.profile(name).starts:
            allowed = ", ".join(map(str, gpu.profile(name).starts)) if name else "PROFILE:START"
            raise BadInput("placement of a GPU instance", value=pair, allowed=allowed)
        instances.append(Instance(int(start), name))
    layout = Layout(gpu=gpu, instances=tuple(sorted(instances)))
    masks = [_mask(gpu.profiles[i.profile], i.start) for i in instances]
    kinds = _instances(gpu, layout.counts)
    reason = _room(gpu, kinds) or _engines(gpu, kinds)
    if sum(masks).bit_count() != sum(m.bit_count() for m in masks) or any(a & b for a, b in itertools.combinations(masks, 2)):
        reason = "memory slices of instances overlap"
    if reason:
        raise BadInput(f"layout of {gpu.name}", value=", ".join(pairs), allowed=reason)
    return layout


def layouts(gpu: Gpu, names: Collection[str] = ()) -> Iterator[Layout]:
    """Every layout that the rules allow, the empty one left out, each once.

    Args:
        names: only these profiles; all when empty.
    """
    profiles = [gpu.profile(n) for n in names] if names else list(gpu.profiles.values())

    def grow(start: int, taken: list[Instance]) -> Iterator[list[Instance]]:
        yield taken
        for at in range(start, gpu.units):
            for profile in profiles:
                if at in profile.starts:
                    more = [*taken, Instance(at, profile.name)]
                    kinds = [gpu.profiles[i.profile] for i in more]
                    if not _room(gpu, kinds) and not _engines(gpu, kinds):
                        yield from grow(at + profile.size, more)

    for instances in grow(0, []):
        if instances:
            yield Layout(gpu=gpu, instances=tuple(instances))


def maximal(gpu: Gpu, names: Collection[str] = ()) -> Iterator[Layout]:
    """The layouts that no further instance can join."""
    everything = {frozenset(x.instances) for x in layouts(gpu, names)}
    placements = {i for x in everything for i in x}
    for one in layouts(gpu, names):
        taken = frozenset(one.instances)
        if not any(taken | {i} in everything for i in placements - taken):
            yield one


def _instances(gpu: Gpu, wanted: Mapping[str, int]) -> list[InstanceProfile]:
    """One entry for each instance, equal ones together, those with the fewest places first."""
    for name, count in wanted.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise BadInput(f"instances of {name}", value=count, allowed="0 or more")
        gpu.profile(name)
    kinds = sorted((gpu.profiles[n] for n, count in wanted.items() if count), key=lambda p: (-p.size, len(p.starts), p.name))
    return [kind for kind in kinds for _ in range(min(wanted[kind.name], kind.most + 1))]


def _room(gpu: Gpu, order: Sequence[InstanceProfile]) -> str:
    """Which number of instances or of slices is exceeded, wherever they are put; empty when none is."""
    for name, count in Counter(p.name for p in order).items():
        if count > gpu.profiles[name].most:
            return f"{gpu.name} takes at most {gpu.profiles[name].most} of {name}"
    taken = sum(p.size for p in order)
    return f"they take {slices(taken)}, and {gpu.name} has {gpu.units}" if taken > gpu.units else ""


def _engines(gpu: Gpu, order: Sequence[InstanceProfile]) -> str:
    """Which engine there are too few of; empty when there are enough of all."""
    for engine, there in gpu.profiles[gpu.full].engines.items():
        asked = sum(p.engines.get(engine, 0) for p in order)
        if asked > there:
            return f"they take {asked} {engine}, and {gpu.name} has {there}"
    return ""


def _mask(profile: InstanceProfile, start: int) -> int:
    return ((1 << profile.size) - 1) << start


def _place(order: Sequence[InstanceProfile], occupied: int) -> list[Instance] | None:
    """Places for all instances beside the occupied slices, or None when there are none.

    Starts are tried from the right: what begins only at 0 stays possible. Dead ends are remembered, so no set of free slices
    is searched twice for the same rest.
    """
    dead: set[tuple[int, int, int]] = set()

    def put(at: int, taken: int, before: int) -> list[Instance] | None:
        if at == len(order):
            return []
        if (at, taken, before) in dead:
            return None
        profile = order[at]
        block = (1 << profile.size) - 1
        again = at + 1 < len(order) and order[at + 1] is profile
        for start in reversed(profile.starts):
            mask = block << start
            if start < before and not taken & mask:
                rest = put(at + 1, taken | mask, start if again else 99)
                if rest is not None:
                    rest.insert(0, Instance(start, profile.name))
                    return rest
        dead.add((at, taken, before))
        return None

    return put(0, occupied, 99)


def _conflict(gpu: Gpu, order: Sequence[InstanceProfile]) -> str:
    """The smallest part of the instances that finds no place, and why."""
    part = list(order)
    for profile in reversed(order):
        without = list(part)
        without.remove(profile)
        if _place(without, 0) is None:
            part = without
    counts = Counter(p.name for p in part)
    said = " and ".join(f"{count} x {name}" for name, count in counts.items())
    places = "; ".join(
        f"{name} takes {slices(gpu.profiles[name].size)} from {_either(gpu.profiles[name].starts)}" for name in counts
    )  # fmt: skip
    return f"{said} find no place together: {places}"


def slices(count: int) -> str:
    """A number of memory slices in words."""
    return "1 memory slice" if count == 1 else f"{count} memory slices"


def _either(starts: Sequence[int]) -> str:
    *most, last = map(str, starts)
    return f"{', '.join(most)} or {last}" if most else last
