"""The pull index: one signed file that says which bundle is offered, to whom, and which serial number that saying has.

Devices poll ``index.json``; its signature lies under the serial's own name (``index-000007.sig``), so that a file that is just being
replaced can't be paired with another's signature. Serials count up by create-if-absent, whoever publishes at the same moment.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forja.edge import depot, returns, rings
from forja.edge.depot import Line, Stored
from forja.edge.files import trust
from forja.edge.rings import Counted, Rollout
from forja.edge.signing import Signer
from forja.errors import BadInput, Conflict, Damaged
from forja.lake import Lake, canonical, sha256

VALID_DAYS = 30
"""Days that an index is believed: after that a server that shows an old one is found out. ``./forja edge index`` renews it."""
RENEW_DAYS = 15
"""Days before its end from which on an index is renewed although nothing else changed."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """The newest index of a line."""

    body: Mapping[str, Any]
    serial: int

    @property
    def rollout(self) -> Rollout:
        """Its rings."""
        return rings.from_json(self.body)


@dataclass(frozen=True, kw_only=True)
class Looked:
    """One look at the receipts of what is offered."""

    bundle: Stored
    counted: Counted
    rollout: Rollout
    why: str
    index: Index
    """The newest, after the look."""
    changed: bool
    """Whether this look wrote it."""


def read(lake: Lake, line: Line) -> Index | None:
    """The newest whole index of a line: one whose signature is there; None when nothing was published."""
    serials = [int(m[1]) for p in lake.list(line.folder) if (m := re.fullmatch(rf"{re.escape(line.folder)}/index-(\d{{6}})\.sig", p))]
    if not serials:
        return None
    path = f"{line.folder}/index-{max(serials):06d}.json"
    try:
        body = json.loads(lake.get(path))
        return Index(body=body, serial=int(body["serial"]))
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"index {path}", value=str(error), do="publish again") from error


def publish(lake: Lake, signer: Signer, bundle: Stored, rollout: Rollout, *, now: datetime.datetime | None = None) -> Index:
    """Write the next index of a bundle's line.

    Raises:
        BadInput: an older bundle than the one that is offered: devices would refuse it.
        Damaged: the bundle's archive isn't what its manifest says.
    """
    before = read(lake, bundle.line)
    if before is not None and bundle.version < before.body["bundle"]["version"]:
        raise BadInput(
            f"version to publish of {bundle.line.recipe} for {bundle.line.target}", value=bundle.version,
            allowed=f"{before.body['bundle']['version']} or newer, since devices refuse a downgrade",
            do=f"./forja edge bundle {bundle.line.recipe} {bundle.line.target} --renew {bundle.version}, which signs it as the newest",
        )  # fmt: skip
    archive = depot.archive(lake, bundle)
    offer = {
        "version": bundle.version, "manifest_sha256": bundle.digest, "archive": f"{bundle.version:06d}/{depot.ARCHIVE}",
        "sha256": sha256(archive), "bytes": len(archive),
        # Of all files, the manifest and its signature: a device unpacks no more than this.
        "unpacked": sum(f["bytes"] for f in bundle.manifest["files"].values()) + trust.MOST_JSON,
    }  # fmt: skip
    return _write(lake, signer, bundle.line, {"bundle": offer, **rings.to_json(rollout)}, now or datetime.datetime.now(datetime.UTC))


def _write(lake: Lake, signer: Signer, line: Line, body: dict[str, Any], now: datetime.datetime) -> Index:
    for _ in range(100):
        newest = read(lake, line)
        taken = [int(m[1]) for p in lake.list(line.folder) if (m := re.search(r"/index-(\d{6})\.json$", p))]
        serial = max([newest.serial if newest else 0, *taken]) + 1
        whole = {
            "kind": trust.INDEX, "schema": trust.SCHEMA, "team": line.team, "recipe": line.recipe, "target": line.target, "serial": serial,
            "created": depot.stamp(now), "expires": depot.stamp(now + datetime.timedelta(days=VALID_DAYS)), "key_id": signer.key_id, **body,
        }  # fmt: skip
        data = canonical(whole) + b"\n"
        if lake.create(f"{line.folder}/index-{serial:06d}.json", data):
            lake.create(f"{line.folder}/index-{serial:06d}.sig", signer.sign(data))
            _show(lake, line)
            return Index(body=whole, serial=serial)
    raise Conflict(f"index of {line.folder}: others wrote at the same moment, a hundred times")


def _show(lake: Lake, line: Line) -> None:
    """Make index.json the newest whole one, also when somebody else wrote a newer one meanwhile."""
    while True:
        newest = read(lake, line)
        if newest is None:
            return
        lake.replace(f"{line.folder}/index.json", lake.get(f"{line.folder}/index-{newest.serial:06d}.json"))
        again = read(lake, line)
        if again is None or again.serial == newest.serial:
            return


def look(
    lake: Lake, signer: Signer | None, line: Line, keys: Mapping[str, str], *, now: datetime.datetime | None = None
) -> Looked:  # fmt: skip
    """Count the receipts of what is offered, and open the next ring, halt, renew, or leave the index as it is.

    Args:
        signer: None to look only.
        keys: secrets of devices, by name.

    Raises:
        BadInput: nothing was published, or the bundle that was is gone.
    """
    current = read(lake, line)
    if current is None:
        raise BadInput(f"index of {line.recipe} for {line.target}", value="none", do=f"./forja edge publish {line.recipe} {line.target}")
    moment = now or datetime.datetime.now(datetime.UTC)
    bundle = depot.bundle(lake, line, current.body["bundle"]["version"])
    counted = rings.count(current.rollout, bundle.digest, returns.stored(lake, bundle), keys)
    after, why = rings.advance(current.rollout, counted)
    left = trust.seconds(current.body["expires"]) - moment.timestamp()
    ends = left < RENEW_DAYS * 86400
    changed = signer is not None and (after != current.rollout or ends)
    if signer is not None and changed:
        current = _write(lake, signer, line, {"bundle": current.body["bundle"], **rings.to_json(after)}, moment)
    return Looked(bundle=bundle, counted=counted, rollout=after, why=why, index=current, changed=changed)
