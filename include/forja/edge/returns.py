"""Receipts that come back from devices: read, judged, and stored once under the bundle that they are about.

What a receipt proves. Its digest of the manifest says which bundle it is about, and nobody can have known that without the bundle. With a
MAC that fits the device's key it was written by somebody who holds that key, and has not been changed since. Without one it proves nothing
about who wrote it: anybody who has the bundle can write "passed", or "refused" to stop a rollout. Neither kind proves that the numbers are
true: a device that is not the owner's own can lie. A receipt of ``./forja edge simulate`` says that no device was there.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forja.edge.depot import Line, Stored, bundles
from forja.edge.files import trust
from forja.edge.signing import DEVICE
from forja.errors import BadInput, Refused
from forja.lake import Lake, sha256

KIND, SCHEMA = "forja-edge-receipt", 1
MOST = 1 << 16
"""Largest receipt that is read, in bytes."""
FIELDS: dict[str, type | tuple[type, ...]] = {
    "kind": str, "schema": int, "team": str, "recipe": str, "target": str, "variant": str, "bundle": dict, "device": dict,
    "simulated": bool, "time": str, "outcome": str, "rule": str, "reason": str, "runtime": (dict, type(None)),
    "golden": (dict, type(None)), "speed": (dict, type(None)), "mac": (str, type(None)),
}  # fmt: skip
"""Types of all fields, none of which may be missing or more."""
LINE = ("team", "recipe", "target")
NUMBERS = {"golden": ("samples", "worst", "tolerance", "labels_checked"), "speed": ("runs", "fps", "p50_ms", "p99_ms")}
"""Numbers that a receipt of a bundle that passed must have."""


@dataclass(frozen=True, kw_only=True)
class Returned:
    """One receipt of one device."""

    body: Mapping[str, Any]
    data: bytes
    """The file's bytes, as they came."""

    @property
    def device(self) -> str:
        """Name of the device."""
        return str(self.body["device"]["id"])

    @property
    def manifest(self) -> str:
        """Digest of the manifest that it is about."""
        return str(self.body["bundle"]["manifest_sha256"])

    @property
    def passed(self) -> bool:
        """Whether the bundle passed there."""
        return bool(self.body["outcome"] == "passed")

    @property
    def simulated(self) -> bool:
        """Whether no device was there."""
        return bool(self.body["simulated"])

    def authentic(self, keys: Mapping[str, str]) -> bool:
        """Whether its MAC fits the key of the device that it names."""
        given, key = self.body["mac"], keys.get(self.device)
        return bool(given and key) and hmac.compare_digest(str(given), mac(self.body, str(key)))


def mac(body: Mapping[str, Any], key: str) -> str:
    """HMAC-SHA256 in hex over the receipt without its MAC, as verify.py computes it."""
    data = json.dumps({**body, "mac": None}, sort_keys=True, separators=(",", ":")).encode()
    return hmac.new(key.encode(), data, hashlib.sha256).hexdigest()


def parse(data: bytes) -> Returned:
    """Read a receipt.

    Raises:
        BadInput: not a receipt, or one that contradicts itself; the message names the field.
    """
    if len(data) > MOST:
        raise BadInput("receipt of a device: size", value=len(data), allowed=f"{MOST} bytes at most")
    try:
        body = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadInput("receipt of a device", value=str(error)[:200], allowed="the JSON that verify.py writes") from None
    if not isinstance(body, dict) or set(body) != set(FIELDS):
        found = sorted(set(body) ^ set(FIELDS)) if isinstance(body, dict) else type(body).__name__
        raise BadInput("receipt of a device: fields missing or unknown", value=found, allowed="the JSON that verify.py writes")
    for name, kinds in FIELDS.items():
        if not isinstance(body[name], kinds) or (kinds is int and isinstance(body[name], bool)):
            _wrong(name, body[name], "the type that verify.py writes")
    if (body["kind"], body["schema"]) != (KIND, SCHEMA):
        _wrong("kind, schema", [body["kind"], body["schema"]], f"{KIND}, {SCHEMA}")
    _check(body)
    return Returned(body=body, data=data)


def _check(body: dict[str, Any]) -> None:
    if body["outcome"] not in ("passed", "refused"):
        _wrong("outcome", body["outcome"], "passed or refused")
    device, digest = body["device"].get("id"), body["bundle"].get("manifest_sha256")
    if not isinstance(device, str) or not DEVICE.fullmatch(device):
        _wrong("device.id", device, DEVICE.pattern)
    if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        _wrong("bundle.manifest_sha256", digest, "64 hex digits: the receipt of a bundle whose manifest could not be read has none")
    try:
        trust.seconds(body["time"])
    except ValueError:
        _wrong("time", body["time"], "2026-11-24T20:00:00Z")
    if body["outcome"] == "refused":
        if not body["rule"] or not body["reason"]:
            _wrong("rule", body["rule"], "a rule and a reason, since it was refused")
        return
    for part, names in NUMBERS.items():
        for name in names:
            value = (body[part] or {}).get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                _wrong(f"{part}.{name}", value, "a finite number, since it passed")
    golden, speed = body["golden"], body["speed"]
    if not golden["worst"] <= golden["tolerance"] or golden["samples"] < 1 or golden["labels_checked"] < 1:
        _wrong("golden", golden, "within its tolerance, one sample or more, labels checked, since it passed")
    if not 0 < speed["p50_ms"] <= speed["p99_ms"] or speed["runs"] < 1:
        _wrong("speed", speed, "p50 above 0 and not above p99, one run or more")


def _wrong(name: str, value: object, allowed: str) -> None:
    raise BadInput(f"receipt of a device: field {name}", value=value, allowed=allowed)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def find(lake: Lake, lines: Sequence[Line], returned: Returned) -> Stored:
    """The bundle that a receipt is about, in one of these lines.

    Raises:
        Refused: the lake has no bundle with this manifest, or the receipt contradicts the bundle.
    """
    body = returned.body
    named = [line for line in lines if not body["recipe"] or (line.team, line.recipe, line.target) == tuple(body[n] for n in LINE)]
    found = next((b for line in named for b in bundles(lake, line) if b.digest == returned.manifest), None)
    if found is None:
        raise Refused(
            f"receipt of {returned.device}: its bundle was not made here", value=returned.manifest,
            allowed=f"the manifest of a bundle in {lake.root}",
        )  # fmt: skip
    manifest = found.manifest
    # Refused before anything was believed: such a receipt knows nothing but the manifest's digest.
    if body["recipe"] and body["bundle"]["version"] != manifest["version"]:
        raise Refused(f"receipt of {returned.device}: version", value=body["bundle"]["version"], allowed=str(manifest["version"]))
    if returned.passed and (not body["recipe"] or body["golden"]["tolerance"] != manifest["tolerance"]):
        said = {"recipe": body["recipe"], "tolerance": body["golden"]["tolerance"]}
        raise Refused(f"receipt of {returned.device} contradicts its bundle", value=said, allowed=str(manifest["tolerance"]))
    return found


def store(lake: Lake, stored: Stored, returned: Returned) -> tuple[str, bool]:
    """Keep a receipt under its bundle; its path, and whether it is new."""
    path = f"{_folder(stored)}/{sha256(returned.data)[:32]}.json"
    return path, lake.create(path, returned.data)


def _folder(stored: Stored) -> str:
    return f"{stored.line.receipts}/{stored.digest[:32]}"


def stored(lake: Lake, bundle: Stored) -> list[Returned]:
    """All receipts of a bundle, by device, then time."""
    found = [parse(lake.get(path)) for path in lake.list(_folder(bundle))]
    return sorted((r for r in found if r.manifest == bundle.digest), key=lambda r: (r.device, str(r.body["time"])))
