"""Renewal: the content of an older bundle, signed anew as the newest. For the way back, for new keys, and before a bundle expires."""

from __future__ import annotations

from forja.edge import bundle, depot, signing, simulate
from forja.edge.depot import Line, Stored
from forja.errors import BadInput, Damaged
from forja.lake import Lake, sha256


def renew(lake: Lake, line: Line, version: int, days: int) -> Stored:
    """Sign version ``version`` of a line anew: same files, next version, ``days`` to be installed in.

    Raises:
        BadInput: no such version, or days that are none.
        Damaged: a file of it isn't what its manifest says.
        Refused: no key to sign with.
    """
    if not 1 <= days <= 3650:
        raise BadInput("--days", value=days, allowed="1 to 3650")
    signer, old = signing.from_env(), depot.bundle(lake, line, version)
    contents = simulate.opened(depot.archive(lake, old))
    for name, facts in old.manifest["files"].items():
        if name not in contents or sha256(contents[name]) != facts["sha256"]:
            raise Damaged(f"file {name} of {old.folder}", do="export again")
    files = {name: contents[name] for name in old.manifest["files"]} | {"signer.pub.pem": signer.public_pem}
    newest = depot.bundle(lake, line)
    # Named by the newest version too: renewing twice on purpose gives two, a retry of one gives one.
    place = depot.allocate(lake, line, f"renew:{old.digest}:{newest.version}:{days}:{signer.key_id}", days=days)
    listed = {name: {"sha256": sha256(data), "bytes": len(data)} for name, data in sorted(files.items())}
    body = {
        **old.manifest, "version": place.version, "created": place.created, "expires": place.expires,
        "previous": dict(place.previous) if place.previous else None, "key_id": signer.key_id, "files": listed,
        "renews": depot.reference(old),
    }  # fmt: skip
    depot.store(lake, line, place.version, bundle.signed(body, files, signer))
    return depot.bundle(lake, line, place.version)
