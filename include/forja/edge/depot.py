"""The depot: where bundles lie in the lake, and the line of versions that they stand in.

TEAM/RECIPE/edge/TARGET/               what devices may read, and all that they have to
    000003/ticket.json                 who took version 3, and when; written first, once
    000003/manifest.json, manifest.sig, bundle.tar.gz
    index.json, index-000007.json, index-000007.sig
TEAM/RECIPE/edge-receipts/TARGET/MANIFEST/    receipts of devices, by the digest of the bundle's manifest; not for devices
"""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import dataclass
from typing import Any

from forja.edge.bundle import VALID_DAYS, Place, Sealed
from forja.edge.files import trust
from forja.errors import BadInput, Conflict, Damaged
from forja.lake import Lake, canonical, sha256
from forja.receipts import Output

ARCHIVE = "bundle.tar.gz"
TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, kw_only=True)
class Line:
    """The bundles of one recipe for one target."""

    team: str
    recipe: str
    target: str

    @property
    def folder(self) -> str:
        """Where they lie in the lake."""
        return f"{self.team}/{self.recipe}/edge/{self.target}"

    @property
    def receipts(self) -> str:
        """Where devices' receipts lie."""
        return f"{self.team}/{self.recipe}/edge-receipts/{self.target}"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A bundle in the lake."""

    line: Line
    version: int
    manifest: dict[str, Any]
    digest: str
    """SHA-256 of its manifest."""

    @property
    def folder(self) -> str:
        """Its folder in the lake."""
        return f"{self.line.folder}/{self.version:06d}"


def stamp(when: datetime.datetime) -> str:
    """A time as manifests and indexes write it."""
    return when.astimezone(datetime.UTC).strftime(TIME)


def allocate(lake: Lake, line: Line, work: str, *, days: int = VALID_DAYS, now: datetime.datetime | None = None) -> Place:
    """The place of a bundle in its line: the one that this very ``work`` took before, or the next version.

    Create-if-absent on the ticket makes versions count up whoever asks at the same moment; the ticket holds all that would differ
    when the work is done again, so that it gives the same bytes.

    Args:
        work: names the content and the key that signs it; equal works are equal bundles.
        days: how long the bundle may be installed, from now.
    """
    for _ in range(100):
        tickets = _tickets(lake, line)
        for version, ticket in tickets.items():
            if ticket["work"] == work:
                return Place(version=version, created=ticket["created"], expires=ticket["expires"], previous=ticket["previous"])
        created = now or datetime.datetime.now(datetime.UTC)
        version = max(tickets, default=0) + 1
        older = bundles(lake, line)
        previous = reference(older[-1]) if older else None
        ticket = {
            "work": work, "created": stamp(created), "expires": stamp(created + datetime.timedelta(days=days)), "previous": previous,
        }  # fmt: skip
        if lake.create(f"{line.folder}/{version:06d}/ticket.json", canonical(ticket)):
            return Place(version=version, created=ticket["created"], expires=ticket["expires"], previous=previous)
    raise Conflict(f"versions of {line.folder}: others took one at the same moment, a hundred times")


def reference(stored: Stored) -> dict[str, Any]:
    """How a manifest names the bundle before: its version, digest, and path from the folder of the line."""
    return {"version": stored.version, "manifest_sha256": stored.digest, "archive": f"{stored.version:06d}/{ARCHIVE}"}


def _tickets(lake: Lake, line: Line) -> dict[int, dict[str, Any]]:
    found = {}
    for path in lake.list(line.folder):
        if match := re.fullmatch(rf"{re.escape(line.folder)}/(\d{{6}})/ticket\.json", path):
            found[int(match[1])] = json.loads(lake.get(path))
    return dict(sorted(found.items()))


def store(lake: Lake, line: Line, version: int, sealed: Sealed) -> dict[str, Output]:
    """Write a bundle into its place; its outputs. The manifest comes last: a bundle without one isn't there.

    Raises:
        Conflict: another bundle has this place. What devices may hold is never replaced.
    """
    outputs = {}
    for name, data in ((ARCHIVE, sealed.archive), (trust.SIGNATURE, sealed.signature), (trust.MANIFEST, sealed.manifest)):
        path = f"{line.folder}/{version:06d}/{name}"
        if not lake.create(path, data) and not lake.holds(path, sha256(data)):
            raise Conflict(f"{path} holds something else", do="export again: it takes the next version")
        outputs[name] = Output(path=path, sha256=sha256(data), bytes=len(data))
    return outputs


def bundles(lake: Lake, line: Line) -> list[Stored]:
    """The whole bundles of a line, oldest first."""
    found = []
    for path in lake.list(line.folder):
        if match := re.fullmatch(rf"{re.escape(line.folder)}/(\d{{6}})/manifest\.json", path):
            found.append(_stored(lake, line, int(match[1])))
    return sorted(found, key=lambda b: b.version)


def _stored(lake: Lake, line: Line, version: int) -> Stored:
    data = lake.get(f"{line.folder}/{version:06d}/{trust.MANIFEST}")
    try:
        body = json.loads(data)
        if body["kind"] != trust.BUNDLE or body["version"] != version:
            raise ValueError(f"kind {body['kind']}, version {body['version']}")
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"manifest of {line.folder}/{version:06d}", value=str(error), do="export again") from error
    return Stored(line=line, version=version, manifest=body, digest=sha256(data))


def bundle(lake: Lake, line: Line, version: int | None = None) -> Stored:
    """One bundle of a line, the newest when ``version`` is None; BadInput when it isn't there."""
    found = bundles(lake, line)
    if not found:
        do = f"./forja edge bundle {line.recipe} {line.target}"
        raise BadInput(f"bundles of {line.recipe} for {line.target}", value="none", allowed="one or more", do=do)
    chosen = found[-1] if version is None else next((b for b in found if b.version == version), None)
    if chosen is None:
        versions = ", ".join(str(b.version) for b in found)
        raise BadInput(f"version of the bundles of {line.recipe} for {line.target}", value=version, allowed=versions)
    return chosen


def archive(lake: Lake, stored: Stored) -> bytes:
    """A bundle's archive; Damaged when its manifest isn't the one beside it."""
    import io
    import tarfile

    data = lake.get(f"{stored.folder}/{ARCHIVE}")
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
            member = next(m for m in tar if m.name.endswith(f"/{trust.MANIFEST}") and m.name.count("/") == 1)
            source = tar.extractfile(member)
            found = sha256(source.read()) if source else ""
    except (tarfile.TarError, EOFError, OSError, StopIteration) as error:
        raise Damaged(f"archive {stored.folder}/{ARCHIVE}", value=str(error), do="export again") from error
    if found != stored.digest:
        raise Damaged(f"archive {stored.folder}/{ARCHIVE}: its manifest is not the one beside it", value=found, allowed=stored.digest)
    return data
