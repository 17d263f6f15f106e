"""Trust: what of a bundle or an index is believed, decided before anything of it is loaded.

Runs on the device: Python 3.6, standard library, the program openssl. The public keys that count are the device's own, in
ETC/keys/*.pem; one that travels in a bundle is information and nothing else.

    python3 trust.py [--etc DIR] [--var DIR] BUNDLE      exit status 0: trusted, 3: refused
"""
# ruff: noqa: UP006, UP035, UP045, B905 (the syntax of Python 3.6)

import argparse
import calendar
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import Any, BinaryIO, Dict, List, Optional

SCHEMA = 1
BUNDLE, INDEX = "forja-edge-bundle", "forja-edge-index"
ETC, VAR = "/etc/forja-edge", "/var/lib/forja-edge"
WORK = "work"
"""The one folder of a bundle that the device itself writes to; nothing in it is ever imported or run."""
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
MOST_JSON = 1 << 20
"""Largest manifest, index or state that is read, in bytes."""
CLOCK_SKEW_S = 86400
"""Seconds that the device's clock may be behind the one that made a bundle."""
FIELDS = {
    BUNDLE: {"target", "version", "files", "models", "runtime", "tensorrt", "input", "output", "classes", "batch", "tolerance", "variant"},
    INDEX: {"target", "serial", "bundle", "rings", "open", "halted"},
}
"""What is there beside team, recipe and times."""
NAME = re.compile(r"[a-z][a-z0-9_]{0,31}\Z")
PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*\Z")


class Refused(Exception):
    """Something must not be used; ``rule`` says in one word why."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(rule, reason)
        self.rule, self.reason = rule, reason

    def __str__(self) -> str:
        return f"{self.rule}: {self.reason}"


def check(bundle: str, etc: str, var: str, now: Optional[float] = None) -> Dict[str, Any]:
    """Everything that can be said of an unpacked bundle offline; its manifest when nothing speaks against it.

    Args:
        bundle: folder of the unpacked bundle.
        etc: folder with the device's keys.
        var: folder with what the device has installed.
        now: seconds since 1970; the device's clock when None.
    """
    data = read(os.path.join(bundle, MANIFEST), MOST_JSON)
    signed(data, read(os.path.join(bundle, SIGNATURE), 4096), etc)
    manifest = parsed(data, BUNDLE)
    unchanged(bundle, manifest)
    current(manifest, now)
    fits(manifest)
    newest(manifest, digest(data), load_state(var, manifest))
    return manifest


def read(path: str, most: int) -> bytes:
    """Bytes of a regular file that is no link, ``most`` of them at most."""
    try:
        info = os.lstat(path)
        if not stat.S_ISREG(info.st_mode) or info.st_size > most:
            raise Refused("files", f"{path} is no plain file of {most} bytes at most")
        with open(path, "rb") as file:
            return file.read(most + 1)
    except OSError as error:
        raise Refused("files", f"{path} can't be read: {error.strerror}") from error


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def keys(etc: str) -> List[str]:
    """Paths of the public keys that this device believes; refused when others than their owner may change them."""
    folder = os.path.join(etc, "keys")
    found = sorted(os.path.join(folder, n) for n in os.listdir(folder) if n.endswith(".pem")) if os.path.isdir(folder) else []
    if not found:
        raise Refused("keys", f"no public key in {folder}; put the one there that you got by a way you trust")
    for path in [folder, *found]:
        if os.stat(path).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise Refused("keys", f"{path} may be changed by others; chmod go-w it")
    return found


def signed(data: bytes, signature: bytes, etc: str) -> str:
    """The key in ``etc`` whose ECDSA signature over the SHA-256 of ``data`` this is; refused when it is no key's."""
    with tempfile.TemporaryDirectory() as folder:
        names = [os.path.join(folder, n) for n in ("data", "sig")]
        for name, content in zip(names, (data, signature)):
            with open(name, "wb") as file:
                file.write(content)
        for key in keys(etc):
            command = ["openssl", "dgst", "-sha256", "-verify", key, "-signature", names[1], names[0]]
            try:
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            except OSError as error:
                raise Refused("keys", f"the program openssl can't be run: {error.strerror}") from error
            # The words too: versions before 1.1 ended with status 0 for some signatures that they could not read.
            if done.returncode == 0 and done.stdout.strip() == b"Verified OK":
                return key
    raise Refused("signature", "not signed by any of the keys in {}".format(os.path.join(etc, "keys")))


def parsed(data: bytes, kind: str) -> Dict[str, Any]:
    """A signed JSON object of this kind and schema, with the fields that every reader relies on."""
    try:
        body = json.loads(data.decode("utf-8"))
        found = body["kind"], body["schema"]
        names = [body[n] for n in ("team", "recipe")]
        times = [seconds(body[n]) for n in ("created", "expires")]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused("schema", f"no {kind}: {error!r}") from error
    # The same key signs both kinds: an index must never pass for a manifest.
    if found != (kind, SCHEMA):
        raise Refused("schema", f"{found[0]} of schema {found[1]}, allowed: {kind} of schema {SCHEMA}")
    missing = sorted(FIELDS[kind] - set(body))
    if missing:
        raise Refused("schema", f"fields are missing: {', '.join(missing)}")
    if not all(isinstance(n, str) and NAME.match(n) for n in names) or not times[0] < times[1]:
        raise Refused("schema", "team, recipe or times are not as they must be")
    return dict(body)


def seconds(text: str) -> float:
    """Seconds since 1970 of ``2026-11-24T20:00:00Z``."""
    return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))


def unchanged(bundle: str, manifest: Dict[str, Any]) -> None:
    """All files are there with the size and digest that the manifest names, and nothing else is."""
    wanted = manifest["files"]
    for name in wanted:
        if not PATH.match(name) or name.split("/")[0] == WORK:
            raise Refused("schema", f"file name {name!r}")
    found = set()
    for folder, folders, names in os.walk(bundle):
        inside = os.path.relpath(folder, bundle)
        if inside == ".":
            folders[:] = [f for f in folders if f != WORK or os.path.islink(os.path.join(folder, f))]
        for name in names + [f for f in folders if os.path.islink(os.path.join(folder, f))]:
            found.add(os.path.normpath(os.path.join(inside, name)))
    extra = sorted(found - set(wanted) - {MANIFEST, SIGNATURE})
    if extra:
        raise Refused("extra", "files that the manifest doesn't name: {}".format(", ".join(extra[:5])))
    for name, facts in sorted(wanted.items()):
        data = read(os.path.join(bundle, name), int(facts["bytes"]))
        if len(data) != facts["bytes"] or digest(data) != facts["sha256"]:
            raise Refused("digest", f"{name} is not what was signed")


def current(body: Dict[str, Any], now: Optional[float] = None) -> None:
    """Neither expired nor from the future; many devices wake with a clock of 1970, which would hide an expiry."""
    now = time.time() if now is None else now
    text = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    if now < seconds(body["created"]) - CLOCK_SKEW_S:
        raise Refused("clock", "it is {} here, before {} when this was made; set the clock".format(text, body["created"]))
    if now >= seconds(body["expires"]):
        raise Refused("expired", "since {}; it is {} here".format(body["expires"], text))


def fits(manifest: Dict[str, Any]) -> None:
    """This is a device of the bundle's kind, as far as its device tree tells."""
    path = os.environ.get("FORJA_EDGE_MODEL", "/proc/device-tree/model")
    if manifest["models"] and os.path.exists(path):
        with open(path, "rb") as file:
            model = file.read(256).decode("utf-8", "replace").strip("\0\n")
        if not any(word in model for word in manifest["models"]):
            raise Refused("target", "made for {} ({}), this is {}".format(manifest["target"], " or ".join(manifest["models"]), model))


def place(var: str, body: Dict[str, Any]) -> str:
    """Folder of one recipe on this device."""
    return os.path.join(var, "{}.{}".format(body["team"], body["recipe"]))


def load_state(var: str, body: Dict[str, Any]) -> Dict[str, Any]:
    """What the device has of a recipe; refused when it can't be read, since forgetting it would let an old version in."""
    path = os.path.join(place(var, body), "state.json")
    empty: Dict[str, Any] = {
        "version": 0,
        "manifest": "",
        "target": "",
        "serial": 0,
        "index": "",
        "previous": "",
        "back": "",
        "refused": {},
    }
    if not os.path.lexists(path):
        return empty
    try:
        found = json.loads(read(path, MOST_JSON).decode("utf-8"))
        if {k: type(v) for k, v in found.items()} != {k: type(v) for k, v in empty.items()}:
            raise ValueError("fields are missing")
        return dict(found)
    except (ValueError, AttributeError, Refused) as error:
        raise Refused("state", f"{path} can't be read ({error}); restore it, or remove it if you know why it broke") from error


def save_state(var: str, body: Dict[str, Any], state: Dict[str, Any]) -> None:
    """Write the state whole or not at all, also when the power goes."""
    folder = place(var, body)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    part = os.path.join(folder, "state.json.part")
    with open(part, "w") as file:
        json.dump(state, file, sort_keys=True, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, os.path.join(folder, "state.json"))


def newest(manifest: Dict[str, Any], manifest_digest: str, state: Dict[str, Any]) -> None:
    """Not older than what is installed, and of the same target."""
    version = manifest["version"]
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise Refused("schema", f"version {version!r}")
    if state["target"] and state["target"] != manifest["target"]:
        raise Refused("target", "made for {}, this device has {}".format(manifest["target"], state["target"]))
    if version < state["version"] and manifest_digest != state["back"]:  # a step back that this very device took stays allowed
        raise Refused("downgrade", "version {}, installed is {}".format(version, state["version"]))
    if version == state["version"] and manifest_digest != state["manifest"]:
        raise Refused("downgrade", f"another bundle with version {version}, which is installed")


def inside(ring: Dict[str, Any], device: str, salt: str) -> bool:
    """Whether a ring of a rollout holds a device: by its name, or by its place on a circle of 100, which ``salt`` turns."""
    spot = int(digest(f"{salt}:{device}".encode())[:12], 16) % 10000
    return device in ring["devices"] or spot < ring["percent"] * 100


def unpack(archive: BinaryIO, folder: str, most: int) -> str:
    """Unpack a bundle's .tar.gz into an empty folder; path of the one folder that it holds.

    Only plain files below one folder, of ``most`` bytes together: tarfile would follow links and write outside otherwise.
    """
    tops, names, left = set(), set(), most
    try:
        with tarfile.open(fileobj=archive, mode="r:gz") as tar:
            for member in tar:
                if not member.isreg() or not PATH.match(member.name) or "/" not in member.name or member.name in names:
                    raise Refused("archive", f"member {member.name!r}")
                names.add(member.name)
                tops.add(member.name.split("/")[0])
                left -= member.size
                if left < 0 or len(tops) > 1:
                    raise Refused("archive", f"more than {most} bytes, or more than one folder")
                _write(tar, member, os.path.join(folder, member.name))
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise Refused("archive", f"can't be unpacked: {error}") from error
    if not tops:
        raise Refused("archive", "it is empty")
    return os.path.join(folder, tops.pop())


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    source = tar.extractfile(member)
    assert source is not None  # noqa: S101 - it is a plain file
    with open(path, "wb") as file:
        for chunk in iter(lambda: source.read(1 << 20), b""):
            file.write(chunk)
    os.chmod(path, 0o755 if path.endswith((".sh", ".py")) else 0o644)


def options(parser: argparse.ArgumentParser) -> None:
    """The two folders that every script asks for."""
    parser.add_argument("--etc", default=os.environ.get("FORJA_EDGE_ETC", ETC), help="keys/*.pem, device, device.key")
    parser.add_argument("--var", default=os.environ.get("FORJA_EDGE_VAR", VAR), help="what is installed")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Say whether a bundle is trusted.")
    parser.add_argument("bundle", help="folder of the unpacked bundle")
    options(parser)
    given = parser.parse_args()
    try:
        manifest = check(given.bundle, given.etc, given.var)
    except Refused as error:
        sys.stderr.write(f"refused: {error}\n")
        return 3
    print("trusted: {recipe} for {target}, version {version}".format(**manifest))
    return 0


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    sys.exit(main())
