"""Trust: what a device refuses before it loads anything. Real openssl, real files."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from unit.edge_parts import CLASSES, Device, sealed, signer

from forja.edge import bundle, signing
from forja.edge.files import trust
from forja.lake import sha256

KEY = signer()
STATE = {"version": 3, "manifest": "", "target": "cpu", "serial": 0, "index": "", "previous": "", "back": "", "refused": {}}
NAMES = {"team": "vision", "recipe": "digits"}


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setenv("FORJA_EDGE_MODEL", str(tmp_path / "none"))
    made = Device(tmp_path, KEY.public_pem)
    made.lay(sealed(KEY, version=3).archive)
    return made


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Device], None]:
    def act(device: Device) -> None:
        path = device.bundle / name
        path.write_bytes(change(path.read_bytes()))

    return act


def state(**changes: Any) -> Callable[[Device], None]:
    return lambda device: trust.save_state(str(device.var), NAMES, {**STATE, **changes})


def link(name: str) -> Callable[[Device], None]:
    def act(device: Device) -> None:
        path = device.bundle / name
        moved = device.folder / "elsewhere"
        path.rename(moved)
        path.symlink_to(moved)

    return act


def linked_folder(device: Device) -> None:
    (device.folder / "elsewhere").mkdir()
    (device.bundle / "work").symlink_to(device.folder / "elsewhere")


def cache(device: Device) -> None:
    """What Python would load in place of a checked source, if its time fitted."""
    (device.bundle / "__pycache__").mkdir()
    (device.bundle / "__pycache__" / "runtime.cpython-36.pyc").write_bytes(b"x")


def another_key(device: Device) -> None:
    (device.etc / "keys" / "0.pem").write_bytes(signer().public_pem)


def bundled_key_alone(device: Device) -> None:
    (device.etc / "keys" / "0.pem").unlink()


def drop(device: Device, name: str) -> None:
    path = device.bundle / trust.MANIFEST
    body = json.loads(path.read_text())
    del body[name]
    path.write_text(json.dumps(body))
    device.sign(KEY)


REFUSED: dict[str, tuple[Callable[[Device], None], str, str]] = {
    "a bit of a file": (edit("model.onnx", lambda d: d[:-1] + bytes([d[-1] ^ 1])), "digest", "model.onnx"),
    "a longer file": (edit("labels.txt", lambda d: d + b"eel\n"), "files", "labels.txt"),
    "a shorter file": (edit("labels.txt", lambda d: d[:-1]), "digest", "labels.txt"),
    "a script": (edit("verify.py", lambda d: d.replace(b"refused", b"passed!")), "digest", "verify.py"),
    "a missing file": (lambda d: (d.bundle / "labels.txt").unlink(), "files", "labels.txt"),
    "a file that is a link": (link("model.onnx"), "files", "model.onnx"),
    "a manifest that is a link": (link("manifest.json"), "files", "manifest.json"),
    "another file": (lambda d: (d.bundle / "numpy.py").write_text(""), "extra", "numpy.py"),
    "another file in a folder": (lambda d: (d.bundle / "golden" / "x").write_text(""), "extra", "golden/x"),
    "compiled Python": (cache, "extra", "__pycache__"),
    "work is a link": (linked_folder, "extra", "work"),
    "the manifest": (edit(trust.MANIFEST, lambda d: d.replace(b"2998", b"2999")), "signature", "keys"),
    "the signature": (edit(trust.SIGNATURE, lambda d: d[:-1] + bytes([d[-1] ^ 1])), "signature", "keys"),
    "an empty signature": (edit(trust.SIGNATURE, lambda d: b""), "signature", "keys"),
    "a key that this device doesn't hold": (another_key, "signature", "keys"),
    "only the bundle's own key": (bundled_key_alone, "keys", "no public key"),
    "keys that all may change": (lambda d: (d.etc / "keys" / "0.pem").chmod(0o666), "keys", "by others"),
    "a folder of keys that all may change": (lambda d: (d.etc / "keys").chmod(0o777), "keys", "by others"),
    "an index in place of a manifest": (lambda d: d.sign(KEY, kind=trust.INDEX), "schema", "forja-edge-index"),
    "a newer schema": (lambda d: d.sign(KEY, schema=2), "schema", "of schema 2"),
    "a recipe that is a path": (lambda d: d.sign(KEY, recipe="../etc"), "schema", "team, recipe"),
    "it ends before it begins": (lambda d: d.sign(KEY, expires="2025-01-01T00:00:00Z"), "schema", "times"),
    "a time that is none": (lambda d: d.sign(KEY, expires="soon"), "schema", "soon"),
    "a file outside": (lambda d: d.sign(KEY, files={"../x": {"sha256": "", "bytes": 0}}), "schema", "../x"),
    "a file in work": (lambda d: d.sign(KEY, files={"work/x": {"sha256": "", "bytes": 0}}), "schema", "work/x"),
    "a manifest without tolerance": (lambda d: drop(d, "tolerance"), "schema", "fields are missing: tolerance"),
    "version 0": (lambda d: d.sign(KEY, version=0), "schema", "version 0"),
    "version True": (lambda d: d.sign(KEY, version=True), "schema", "version True"),
    "older than what is installed": (state(version=4), "downgrade", "installed is 4"),
    "another bundle of this version": (state(manifest="0" * 64), "downgrade", "another bundle"),
    "for another target": (state(target="thor", version=1), "target", "has thor"),
    "a state that can't be read": (lambda d: (state()(d), (d.var / "vision.digits/state.json").write_text("{"))[0], "state", "restore"),
    "a state without a version": (lambda d: (state()(d), (d.var / "vision.digits/state.json").write_text("{}"))[0], "state", "restore"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, device: Device) -> None:
    act, rule, words = REFUSED[case]
    act(device)
    with pytest.raises(trust.Refused) as caught:
        device.check()
    assert caught.value.rule == rule
    assert words in caught.value.reason


TRUSTED: dict[str, Callable[[Device], None]] = {
    "as it came": lambda d: None,
    "with what the device itself made": lambda d: ((d.bundle / "work").mkdir(), (d.bundle / "work" / "engine.plan").write_text("x"))[0],
    "signed by the second key": lambda d: ((d.etc / "keys" / "0.pem").rename(d.etc / "keys" / "9.pem"),
                                            (d.etc / "keys" / "1.pem").write_bytes(signer().public_pem))[0],
    "the installed one again": lambda d: state(manifest=sha256((d.bundle / trust.MANIFEST).read_bytes()))(d),
    "newer than what is installed": state(version=2, manifest="0" * 64),
    "older, but this device went back to it": lambda d: state(version=9, back=sha256((d.bundle / trust.MANIFEST).read_bytes()))(d),
}  # fmt: skip


@pytest.mark.parametrize("case", TRUSTED)
def test_trusted(case: str, device: Device) -> None:
    TRUSTED[case](device)
    manifest = device.check()
    assert (manifest["version"], manifest["classes"]) == (3, list(CLASSES))


CLOCKS = {
    "in its time": ("2026-06-01T00:00:00Z", ""),
    "a clock an hour behind": ("2025-12-31T23:00:00Z", ""),
    "a clock of 1970": ("1970-01-01T00:00:00Z", "clock"),
    "two days before it was made": ("2025-12-30T00:00:00Z", "clock"),
    "the last second": ("2997-12-31T23:59:59Z", ""),
    "the second after": ("2998-01-01T00:00:00Z", "expired"),
}


@pytest.mark.parametrize("case", CLOCKS)
def test_clock(case: str, device: Device) -> None:
    text, rule = CLOCKS[case]
    if not rule:
        assert device.check(trust.seconds(text))["version"] == 3
        return
    with pytest.raises(trust.Refused) as caught:
        device.check(trust.seconds(text))
    assert caught.value.rule == rule


@pytest.mark.parametrize(
    ("model", "good"),
    [("NVIDIA Jetson Nano Developer Kit", True), ("NVIDIA Jetson Orin Nano Developer Kit", False), ("Raspberry Pi", False)],
)
def test_the_device_tree_must_fit(model: str, good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").write_bytes(model.encode() + b"\0")
    monkeypatch.setenv("FORJA_EDGE_MODEL", str(tmp_path / "model"))
    device = Device(tmp_path, KEY.public_pem)
    device.lay(sealed(KEY, target="jetson-nano", variant="fp16").archive)
    if good:
        assert device.check()["target"] == "jetson-nano"
        return
    with pytest.raises(trust.Refused, match=f"this is {model}"):
        device.check()


def test_openssl_itself_says_so(device: Device) -> None:
    """What the README of a bundle tells people to type."""
    command = "openssl dgst -sha256 -verify ../etc/keys/0.pem -signature manifest.sig manifest.json"
    done = subprocess.run(command.split(), cwd=device.bundle, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "Verified OK\n")
    (device.bundle / "manifest.json").write_text("{}")
    assert subprocess.run(command.split(), cwd=device.bundle, capture_output=True, check=False).returncode == 1


def test_the_command(device: Device) -> None:
    done = device.run("trust.py", *device.options, str(device.bundle))
    assert (done.returncode, done.stdout) == (0, "trusted: digits for cpu, version 3\n")
    assert not (device.bundle / "__pycache__").exists()
    (device.bundle / "labels.txt").write_text("x")
    done = device.run("trust.py", *device.options, str(device.bundle))
    assert (done.returncode, done.stderr) == (3, "refused: digest: labels.txt is not what was signed\n")


def test_a_state_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trust.save_state(str(tmp_path), NAMES, STATE)

    def dies(*_: object) -> None:
        raise OSError("power")

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(OSError, match="power"):
        trust.save_state(str(tmp_path), NAMES, {**STATE, "version": 9})
    assert trust.load_state(str(tmp_path), NAMES)["version"] == 3


def tarred(*members: tuple[str, bytes, bytes], link: str = "") -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, link
            tar.addfile(info, io.BytesIO(data))
    buffer.seek(0)
    return buffer


FILE = tarfile.REGTYPE
ARCHIVES = {
    "a path upwards": tarred(("a/../../x", b"x", FILE)),
    "a path from the root": tarred(("/root/x", b"x", FILE)),
    "a hidden file": tarred(("a/.x", b"x", FILE)),
    "a link": tarred(("a/x", b"", tarfile.SYMTYPE), link="/etc/passwd"),
    "a hard link": tarred(("a/x", b"", tarfile.LNKTYPE), link="a/y"),
    "a device": tarred(("a/x", b"", tarfile.CHRTYPE)),
    "a file twice": tarred(("a/x", b"1", FILE), ("a/x", b"2", FILE)),
    "two folders": tarred(("a/x", b"1", FILE), ("b/x", b"2", FILE)),
    "no folder": tarred(("x", b"1", FILE)),
    "too much": tarred(("a/x", b"0" * 2000, FILE)),
    "nothing": tarred(),
    "no archive": io.BytesIO(b"hello"),
    "cut": io.BytesIO(tarred(("a/x", os.urandom(900), FILE)).getvalue()[:500]),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives_that_are_not_unpacked(case: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    ARCHIVES[case].seek(0)
    with pytest.raises(trust.Refused) as caught:
        trust.unpack(ARCHIVES[case], str(tmp_path / "in"), 1000)
    assert caught.value.rule == "archive"
    assert {p.name for p in tmp_path.iterdir()} == {"in"}, "nothing outside"


def test_equal_inputs_give_equal_bytes() -> None:
    first, second = sealed(KEY), sealed(KEY)
    assert first == second
    with tarfile.open(fileobj=io.BytesIO(first.archive)) as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == sorted(m.name for m in members)
    assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
    assert {m.name.partition("/")[2] for m in members if m.mode == 0o755} == {n for n in bundle.SCRIPTS}
    assert first.archive[4:8] == b"\0" * 4, "gzip's own time"
    assert sealed(signing.new()).archive != first.archive
