"""Signatures of bundles and indexes: ECDSA on P-256 over SHA-256, DER, as ``openssl dgst -sha256 -verify`` reads them.

The private key is a PEM file that FORJA_EDGE_KEY names. Its content goes into no message, no receipt and no object of the lake; what is
told of it is ``key_id``, the digest of its public half.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from forja.errors import BadInput, Refused
from forja.lake import sha256
from forja.services.folders import private
from forja.settings import ROOT, Settings

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

VARIABLE = "FORJA_EDGE_KEY"
PRIVATE, PUBLIC = "forja-edge.key", "forja-edge.pub.pem"
DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""Name of a device."""


@dataclass(frozen=True, kw_only=True)
class Signer:
    """A private key, ready to sign."""

    key_id: str
    """SHA-256 of the public key's DER form, in hex."""
    public_pem: bytes
    """What devices hold."""
    private: EllipticCurvePrivateKey = field(repr=False, compare=False)
    """The key itself."""

    def sign(self, data: bytes) -> bytes:
        """DER signature; equal data give equal bytes (RFC 6979), so that a bundle can be made again."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        return self.private.sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))


def from_env(env: dict[str, str] | os._Environ[str] | None = None) -> Signer:
    """The key that FORJA_EDGE_KEY names.

    Raises:
        Refused: the variable is not set, or others than the file's owner may read it.
        BadInput: no such file, or no P-256 key in it.
    """
    name = (os.environ if env is None else env).get(VARIABLE)
    if not name:
        do = f"./forja edge keygen DIR, then export {VARIABLE}=DIR/{PRIVATE}; in a cluster mount it from a Secret"
        raise Refused(f"no key to sign with: {VARIABLE} is not set", do=do)
    return load(Path(name))


def load(path: Path) -> Signer:
    """The key in a file; errors as for ``from_env``."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    data = _private(path)
    allowed = f"an unencrypted PEM file with an ECDSA P-256 key, as ./forja edge keygen makes it ({VARIABLE})"
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        # Not chained: what a parser says of a broken key may hold parts of it.
        raise BadInput("signing key", value=str(path), allowed=allowed) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise BadInput("signing key: another kind of key", value=str(path), allowed=allowed)
    return _signer(key)


def _private(path: Path) -> bytes:
    """Bytes of a file that its owner alone may read; the owner must be who runs this, or root.

    Kubernetes mounts Secrets as root's, readable by the pod's group: that is let in for a process that isn't root.
    """
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())  # of the very file that is read
            data = file.read(1 << 16)
    except OSError as error:
        raise BadInput("private key", value=str(path), allowed=f"a file that can be read ({error.strerror})") from None
    mode, mounted = stat.S_IMODE(info.st_mode), info.st_uid == 0 != os.getuid()
    if mode & (0o037 if mounted else 0o077) or info.st_uid not in (os.getuid(), 0):
        raise Refused(
            f"private key {path} is open to others", value=f"mode {mode:04o}, owner {info.st_uid}",
            allowed="mode 0600 or 0400, owned by who runs this or by root",
            do=f"chmod 600 {path}; if others may have read it, make a new one",
        )  # fmt: skip
    return data


def _signer(key: EllipticCurvePrivateKey) -> Signer:
    public = key.public_key()
    return Signer(key_id=key_id(public), public_pem=_pem(public), private=key)


def _pem(public: EllipticCurvePublicKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def key_id(public: EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key's DER form, in hex: ``openssl pkey -pubin -outform DER | sha256sum``."""
    from cryptography.hazmat.primitives import serialization

    return sha256(public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))


def new() -> Signer:
    """A key that lives in memory alone."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return _signer(ec.generate_private_key(ec.SECP256R1()))


def of_machine(settings: Settings) -> Path:
    """The private key of this machine's own stack, in its state folder beside the other secrets; made on first use."""
    folder = private(settings.state / "secrets" / "edge")
    with contextlib.suppress(Refused):  # it is there, or somebody else made it at this moment
        create(folder, settings)
    return folder / PRIVATE


def create(folder: Path, settings: Settings) -> tuple[Path, Path, str]:
    """Make a key pair in ``folder``: paths of the private and the public key, and the key's id.

    Raises:
        BadInput: the folder is in the lake or in the source tree, whence it would be copied about.
        Refused: a key is there already; a key that is overwritten locks out every device that believes it.
    """
    from cryptography.hazmat.primitives import serialization

    signer = new()
    place = _outside(folder, settings)
    pem = signer.private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_new(place / PRIVATE, pem, 0o600)
    _write_new(place / PUBLIC, signer.public_pem, 0o644)
    return place / PRIVATE, place / PUBLIC, signer.key_id


def create_device(folder: Path, settings: Settings, device: str) -> Path:
    """Make the secret with which a device authenticates its receipts; errors as for ``create``, and BadInput for a bad name."""
    if not DEVICE.fullmatch(device):
        raise BadInput("name of a device", value=device, allowed="letters, digits, _ . -; 64 at most, a letter or digit first")
    path = _outside(folder, settings) / f"{device}.key"
    _write_new(path, f"{secrets.token_hex(32)}\n".encode(), 0o600)
    return path


def _outside(folder: Path, settings: Settings) -> Path:
    """The folder, made if it is missing; the state folder is in the source tree by default, and nothing copies it."""
    place, lake = folder.expanduser().resolve(), settings.lake.removeprefix("file://")
    stored = "://" not in lake and place.is_relative_to(Path(lake).resolve())
    if stored or (place.is_relative_to(ROOT) and not place.is_relative_to(settings.state.resolve())):
        allowed = f"one outside {settings.lake if stored else ROOT}, which is copied and shared"
        raise BadInput("folder of a private key", value=str(place), allowed=allowed)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file whole, or not at all when it is there."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
    try:
        os.link(part, path)
    except FileExistsError:
        do = "choose another folder; devices that believe the old key would refuse the new one"
        raise Refused("key exists", value=str(path), do=do) from None
    finally:
        part.unlink()


def verified(public_pem: bytes, data: bytes, signature: bytes) -> bool:
    """Whether this is the signature of the key over ``data``; BadInput when the key is no P-256 public key."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        public = serialization.load_pem_public_key(public_pem)
    except ValueError:
        raise BadInput("public key", allowed=f"a PEM file, as {PUBLIC}") from None
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise BadInput("public key: another kind of key", allowed="ECDSA P-256")
    try:
        public.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def device_keys(folder: Path | None) -> dict[str, str]:
    """Secrets of devices by name, from a folder of NAME.key; none without a folder."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise BadInput("folder of device keys", value=str(folder), allowed="a folder with a NAME.key for each device")
    return {p.stem: _private(p).decode().strip() for p in sorted(folder.glob("*.key"))}
