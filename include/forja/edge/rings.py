"""Rings: who may install a new bundle, and when the next ring opens. Decided from receipts alone; one that is missing opens nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from forja.edge.files import trust
from forja.edge.returns import Returned
from forja.edge.signing import DEVICE
from forja.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Devices that may install at the same time."""

    name: str
    devices: tuple[str, ...] = ()
    """By name."""
    percent: float = 0.0
    """Beside those, this percentage of all devices, by the hash of their name and the bundle."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When the next ring opens, and when all stop."""

    good: int
    """Devices of the newest open ring whose receipt must say passed before the next ring opens."""
    most_failed: int = 0
    """Devices whose receipt may say refused; one more halts the rollout."""
    authentic: bool = False
    """Whether only receipts with a device's MAC count, for good and for bad."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What an index says beside the bundle."""

    rings: tuple[Ring, ...]
    policy: Policy
    open: int = 1
    """Rings that may install, from the first."""
    halted: str = ""
    """Why nobody may install it any more; empty while it goes on."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What the receipts say of one rollout."""

    passed: tuple[str, ...]
    """Devices of the newest open ring that passed, and never failed."""
    failed: tuple[str, ...]
    """Devices of open rings with a receipt that says refused, whatever their others say."""
    ignored: tuple[str, ...]
    """Receipts that don't count, each as ``device: why``."""


def plan(canary: Sequence[str], percents: Sequence[float], policy: Policy) -> Rollout:
    """A rollout: the canaries first, then ever more of all devices.

    Raises:
        BadInput: no canary, shares that don't grow, or a policy that the canaries alone can't meet.
    """
    if wrong := [d for d in canary if not DEVICE.fullmatch(d)]:
        raise BadInput("canary devices", value=wrong, allowed=DEVICE.pattern)
    if not canary or len(set(canary)) != len(canary):
        raise BadInput("canary devices", value=list(canary), allowed="one or more, each once", do="pass --canary NAME,NAME")
    if any(not 0 < p <= 100 for p in percents) or list(percents) != sorted(set(percents)):
        raise BadInput("shares of the rings after the canaries", value=list(percents), allowed="above 0, up to 100, ever larger")
    if policy.good < 1 or policy.most_failed < 0:
        raise BadInput("policy of the rollout", value=asdict(policy), allowed="good 1 or more, failed 0 or more")
    if policy.good > len(canary):
        do = "name more canaries, or ask for fewer good receipts: the next ring would never open"
        raise BadInput("good receipts", value=policy.good, allowed=f"{len(canary)} at most, the number of canaries", do=do)
    rings = [Ring(name="canary", devices=tuple(canary)), *(Ring(name=f"{p:g}%", percent=p) for p in percents)]
    return Rollout(rings=tuple(rings), policy=policy)


def count(rollout: Rollout, manifest: str, receipts: Sequence[Returned], keys: Mapping[str, str]) -> Counted:
    """What counts of the receipts of the bundle with this manifest.

    Only devices of open rings count: no other was told to install it. Simulations never do.
    """
    passed: set[str] = set()
    failed: set[str] = set()
    ignored: list[str] = []
    for receipt in receipts:
        if receipt.manifest != manifest:
            ignored.append(f"{receipt.device}: of another bundle")
        elif receipt.simulated:
            ignored.append(f"{receipt.device}: simulated, no device")
        elif rollout.policy.authentic and not receipt.authentic(keys):
            ignored.append(f"{receipt.device}: no MAC that fits its key")
        elif not _within(rollout.rings[: rollout.open], receipt.device, manifest):
            ignored.append(f"{receipt.device}: in no open ring")
        else:
            (passed if receipt.passed else failed).add(receipt.device)
    newest = rollout.rings[rollout.open - 1]
    earned = {d for d in passed - failed if _within([newest], d, manifest) and not _within(rollout.rings[: rollout.open - 1], d, manifest)}
    return Counted(passed=tuple(sorted(earned)), failed=tuple(sorted(failed)), ignored=tuple(sorted(set(ignored))))


def _within(rings: Sequence[Ring], device: str, manifest: str) -> bool:
    return any(trust.inside(asdict(ring), device, manifest) for ring in rings)


def advance(rollout: Rollout, counted: Counted) -> tuple[Rollout, str]:
    """The rollout after one look at the receipts, one step at most, and why."""
    failed, policy = len(counted.failed), rollout.policy
    if rollout.halted:
        return rollout, f"halted: {rollout.halted}"
    if failed > policy.most_failed:
        names = ", ".join(counted.failed[:5])
        why = f"refused by {failed} ({names}), allowed: {policy.most_failed}"
        return replace(rollout, halted=why), f"halted: {why}"
    ring = rollout.rings[rollout.open - 1]
    if rollout.open == len(rollout.rings):
        return rollout, f"all rings are open; {len(counted.passed)} devices of {ring.name} passed"
    if len(counted.passed) >= policy.good:
        after = rollout.rings[rollout.open]
        return replace(rollout, open=rollout.open + 1), f"{after.name} opens: {len(counted.passed)} devices of {ring.name} passed"
    return rollout, f"{ring.name} waits: {len(counted.passed)} of {policy.good} good receipts"


def to_json(rollout: Rollout) -> dict[str, Any]:
    """As an index holds it."""
    return asdict(rollout)


def from_json(body: Mapping[str, Any]) -> Rollout:
    """From an index."""
    rings = tuple(Ring(name=r["name"], devices=tuple(r["devices"]), percent=r["percent"]) for r in body["rings"])
    return Rollout(rings=rings, policy=Policy(**body["policy"]), open=body["open"], halted=body["halted"])
