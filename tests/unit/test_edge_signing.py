"""Keys: who may read them, where they may lie, and that nothing of them gets out."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from unit.edge_parts import stored

from forja.edge import signing
from forja.errors import BadInput, ForjaError, Refused
from forja.lake import Lake
from forja.settings import ROOT, Settings


def place(folder: Path, state: Path | None = None) -> Settings:
    return Settings.from_env({"FORJA_LAKE": str(folder / "lake"), "FORJA_STATE": str(state or folder / "state"), "HOME": str(folder)})


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return signing.create(tmp_path / "keys", place(tmp_path))[0]


def test_a_pair_that_openssl_takes(key: Path, tmp_path: Path) -> None:
    signer = signing.from_env({"FORJA_EDGE_KEY": str(key)})
    (tmp_path / "data").write_bytes(b"hello")
    (tmp_path / "sig").write_bytes(signer.sign(b"hello"))
    public = key.with_name(signing.PUBLIC)
    command = ["openssl", "dgst", "-sha256", "-verify", str(public), "-signature", str(tmp_path / "sig"), str(tmp_path / "data")]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"Verified OK\n"
    assert signing.verified(public.read_bytes(), b"hello", signer.sign(b"hello"))
    assert not signing.verified(public.read_bytes(), b"hullo", signer.sign(b"hello"))
    assert signer.sign(b"hello") == signer.sign(b"hello"), "equal bytes, so that a bundle can be made again"
    shown = subprocess.run(["openssl", "pkey", "-pubin", "-in", str(public), "-outform", "DER"], capture_output=True, check=True).stdout
    assert signing.sha256(shown) == signer.key_id
    assert (key.stat().st_mode & 0o777, key.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def pem(private: object, encryption: serialization.KeySerializationEncryption | None = None) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return private.private_bytes(serialization.Encoding.PEM, form, encryption or serialization.NoEncryption())  # type: ignore[attr-defined, no-any-return]


def write(data: bytes, mode: int = 0o600) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        path.write_bytes(data)
        path.chmod(mode)

    return act


P256 = pem(ec.generate_private_key(ec.SECP256R1()))
KEYS: dict[str, tuple[Callable[[Path], object], type[ForjaError], str]] = {
    "readable by the group": (write(P256, 0o640), Refused, "mode 0640"),
    "readable by all": (write(P256, 0o644), Refused, "mode 0644"),
    "another curve": (write(pem(ec.generate_private_key(ec.SECP384R1()))), BadInput, "another kind"),
    "another algorithm": (write(pem(ed25519.Ed25519PrivateKey.generate())), BadInput, "another kind"),
    "encrypted": (
        write(pem(ec.generate_private_key(ec.SECP256R1()), serialization.BestAvailableEncryption(b"x"))),
        BadInput,
        "unencrypted",
    ),
    "no key": (write(b"hello"), BadInput, "unencrypted PEM"),
    "a public key": (lambda path: write(path.with_name("pub").read_bytes())(path), BadInput, "unencrypted PEM"),
    "not there": (lambda path: path.unlink(), BadInput, "No such file"),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_that_are_not_used(case: str, tmp_path: Path) -> None:
    act, kind, words = KEYS[case]
    path = tmp_path / "k"
    write(P256)(path)
    public = serialization.load_pem_private_key(P256, None).public_key()
    (tmp_path / "pub").write_bytes(public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    assert signing.load(path).key_id
    act(path)
    with pytest.raises(kind, match=words) as caught:
        signing.load(path)
    assert "PRIVATE KEY" not in str(caught.value)
    assert caught.value.__cause__ is None, "what a parser says of a broken key may hold parts of it"


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_key_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    write(P256)(tmp_path / "k")
    os.chown(tmp_path / "k", 12345, 0)
    with pytest.raises(Refused, match="owner 12345"):
        signing.load(tmp_path / "k")


@pytest.mark.parametrize(("mode", "good"), [(0o440, True), (0o400, True), (0o444, False), (0o460, False)])
def test_a_secret_that_kubernetes_mounts(mode: int, good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's, readable by the pod's group; the process is somebody else."""
    if os.getuid() != 0:
        pytest.skip("only root owns root's files")
    write(P256, mode)(tmp_path / "k")
    monkeypatch.setattr(os, "getuid", lambda: 10001)
    if good:
        assert signing.load(tmp_path / "k").key_id
        return
    with pytest.raises(Refused, match="open to others"):
        signing.load(tmp_path / "k")


def test_without_a_key_it_says_how_to_make_one() -> None:
    with pytest.raises(Refused, match=r"FORJA_EDGE_KEY is not set.*edge keygen"):
        signing.from_env({})


def test_a_key_is_not_overwritten(key: Path, tmp_path: Path) -> None:
    before = key.read_bytes()
    with pytest.raises(Refused, match="key exists"):
        signing.create(key.parent, place(tmp_path))
    assert key.read_bytes() == before


@pytest.mark.parametrize("where", ["lake/keys", "link"])
def test_a_key_never_lies_in_the_lake(where: str, tmp_path: Path) -> None:
    (tmp_path / "lake").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "lake")
    for make in (lambda: signing.create(tmp_path / where, place(tmp_path)), lambda: device(tmp_path / where, tmp_path)):
        with pytest.raises(BadInput, match="outside"):
            make()
    assert list((tmp_path / "lake").rglob("*.key")) == []


def device(folder: Path, home: Path) -> Path:
    return signing.create_device(folder, place(home), "one")


def test_a_key_never_lies_in_the_source_tree(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="outside"):
        signing.create(ROOT / "docs" / "keys", place(tmp_path))
    assert not (ROOT / "docs" / "keys").exists()


def test_the_machines_own_key_is_made_once(tmp_path: Path) -> None:
    path = signing.of_machine(place(tmp_path))
    first = signing.load(path).key_id
    assert signing.load(signing.of_machine(place(tmp_path))).key_id == first
    assert path.is_relative_to(tmp_path / "state")
    with pytest.raises(BadInput, match="outside"):
        signing.of_machine(place(tmp_path, state=tmp_path / "lake" / "state"))


@pytest.mark.parametrize("name", ["../x", "", "a b", "-x", "x" * 65])
def test_names_of_devices(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="name of a device"):
        signing.create_device(tmp_path / "keys", place(tmp_path), name)


def test_secrets_of_devices(tmp_path: Path) -> None:
    path = device(tmp_path / "keys", tmp_path)
    assert (path.stat().st_mode & 0o777, len(path.read_text().strip())) == (0o600, 64)
    assert signing.device_keys(tmp_path / "keys") == {"one": path.read_text().strip()}
    assert signing.device_keys(None) == {}
    path.chmod(0o644)
    with pytest.raises(Refused, match="open to others"):
        signing.device_keys(tmp_path / "keys")
    with pytest.raises(BadInput, match="folder of device keys"):
        signing.device_keys(tmp_path / "none")


def test_nothing_of_the_private_key_is_shown_or_stored(key: Path, tmp_path: Path) -> None:
    signer = signing.load(key)
    lake = Lake(str(tmp_path / "lake"))
    stored(lake, signer)
    body = b"".join(key.read_bytes().splitlines()[1:-1])
    number = signer.private.private_numbers().private_value
    for path in (tmp_path / "lake").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert body[:40] not in data
            assert b"PRIVATE" not in data
            assert number.to_bytes(32, "big") not in data
    assert str(number) not in repr(signer)
    assert "private" not in repr(signer)
