"""./forja edge: from keys to a rollout, as somebody types it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result
from unit.edge_parts import LINE, Device, stored
from unit.test_edge_rings import REFUSAL, body

from forja.cli import edge
from forja.edge import depot, returns, signing, simulate
from forja.errors import BadInput, ForjaError, Refused
from forja.lake import Lake
from forja.settings import Settings


class Shell:
    """The commands, with a lake and keys of their own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # simulate finds the real environments; everything else is this test's own.
        monkeypatch.setenv("FORJA_CACHE", str(Settings.from_env().cache))
        monkeypatch.setenv("FORJA_LAKE", str(folder / "lake"))
        monkeypatch.setenv("FORJA_STATE", str(folder / "state"))
        monkeypatch.delenv("FORJA_EDGE_DEVICES", raising=False)
        monkeypatch.delenv(signing.VARIABLE, raising=False)
        self.folder, self.lake, self.app = folder, Lake(str(folder / "lake")), typer.Typer()
        edge.register(self.app)
        self.monkeypatch = monkeypatch

    def __call__(self, *words: object) -> Result:
        result = CliRunner().invoke(self.app, ["edge", *map(str, words)])
        if isinstance(result.exception, ForjaError):
            raise result.exception
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    def json(self, *words: object) -> Any:
        result = self(*words, "--json")
        return json.loads(result.stdout)

    def keys(self) -> signing.Signer:
        made = self.json("keygen", self.folder / "keys")
        self.monkeypatch.setenv(signing.VARIABLE, made["private"])
        return signing.load(Path(made["private"]))

    def write(self, name: str, value: dict[str, Any]) -> Path:
        path = self.folder / name
        path.write_text(json.dumps(value))
        return path


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(tmp_path, monkeypatch)


def test_keygen_shows_no_key(shell: Shell) -> None:
    result = shell("keygen", shell.folder / "keys")
    secret = (shell.folder / "keys" / signing.PRIVATE).read_bytes().splitlines()[1].decode()
    assert secret not in result.output
    assert f"export {signing.VARIABLE}={shell.folder}/keys/{signing.PRIVATE}" in result.output
    made = shell("keygen", shell.folder / "keys", "--device", "one")
    assert (shell.folder / "keys" / "one.key").read_text().strip() not in made.output


def test_targets(shell: Shell) -> None:
    assert shell("targets").output.splitlines()[0].startswith("jetson-nano")
    assert shell.json("targets")["jetson-nano"]["opset"] == 13


def test_verify(shell: Shell) -> None:
    made = stored(shell.lake, shell.keys())
    found = shell.json("verify", "digits/cpu")
    assert (found["version"], found["manifest_sha256"]) == (1, made.digest)
    path = shell.folder / "b.tar.gz"
    path.write_bytes(shell.lake.get(f"{made.folder}/bundle.tar.gz"))
    public = shell.folder / "keys" / signing.PUBLIC
    assert "signed, whole, current" in shell("verify", path, "--key", public).output
    public.write_bytes(signing.new().public_pem)
    with pytest.raises(Refused, match="signature"):
        shell("verify", path, "--key", public)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(Refused, match="can't be unpacked"):
        shell("verify", path)
    for name in ("nothing.tar.gz", "digits/cpu@9", "digits/toaster"):
        with pytest.raises(BadInput):
            shell("verify", name)


def test_simulate(shell: Shell) -> None:
    made = stored(shell.lake, shell.keys())
    receipt = shell.folder / "receipt.json"
    result = shell("simulate", "digits/cpu", "--receipt", receipt)
    assert result.exit_code == 0, result.output
    assert f"digits/cpu: {simulate.LABEL}" in result.output
    assert result.output.count("  ok ") == 15
    returned = returns.parse(receipt.read_bytes())
    assert (returned.simulated, returned.passed, returned.manifest) == (True, True, made.digest)
    told = shell("import-receipt", receipt).output
    assert "passed (simulation, no device)" in told


def test_a_simulation_that_comes_otherwise_says_so(shell: Shell) -> None:
    """A bundle whose own verify.py lets everything pass, signed with the right key."""
    signer = shell.keys()
    made = stored(shell.lake, signer)
    device = Device(shell.folder / "device", signer.public_pem)
    device.lay(shell.lake.get(f"{made.folder}/bundle.tar.gz"))
    script = device.bundle / "trust.py"
    script.write_text(script.read_text().replace('raise Refused("expired"', 'print("expired"'))
    device.sign(signer)
    from forja.edge.bundle import pack

    path = shell.folder / "bad.tar.gz"
    path.write_bytes(pack({str(p.relative_to(device.bundle)): p.read_bytes() for p in device.bundle.rglob("*") if p.is_file()}, "x"))
    result = shell("simulate", path)
    assert result.exit_code == 3
    assert [line.split()[:2] for line in result.output.splitlines() if "WRONG" in line] == [["WRONG", "expired"]]


def test_a_rollout_from_canary_to_all(shell: Shell) -> None:
    made = stored(shell.lake, shell.keys())
    with pytest.raises(BadInput, match="edge publish digits cpu"):
        shell("index", "digits", "cpu")
    found = shell.json("publish", "digits", "cpu", "--canary", "a,b", "--percent", "100", "--good", "2")
    assert (found["serial"], found["version"], found["open"]) == (1, 1, 1)
    assert Path(found["index"]).is_file()
    told = shell.json("import-receipt", shell.write("a.json", body(made, "a")))
    assert (told[0]["new"], told[0]["proof"][:8]) == (True, "unsigned")
    assert not shell.json("import-receipt", shell.folder / "a.json")[0]["new"]
    found = shell.json("index", "digits", "cpu")
    assert (found["changed"], found["passed"], found["why"]) == (False, ["a"], "canary waits: 1 of 2 good receipts")
    shell("import-receipt", shell.write("b.json", body(made, "b")))
    assert not shell.json("index", "digits", "cpu", "--look")["changed"]
    assert "index 2: digits for cpu, version 1; open: canary, 100%; closed: none" in shell("index", "digits", "cpu").output
    shell("import-receipt", shell.write("c.json", body(made, "c", **REFUSAL)))
    found = shell.json("index", "digits", "cpu")
    assert (found["serial"], found["halted"]) == (3, "refused by 1 (c), allowed: 0")


def test_receipts_with_a_mac(shell: Shell) -> None:
    made = stored(shell.lake, shell.keys())
    shell("publish", "digits", "cpu", "--canary", "a", "--percent", "100", "--authentic")
    shell("keygen", shell.folder / "devices", "--device", "a")
    secret = (shell.folder / "devices" / "a.key").read_text().strip()
    shell("import-receipt", shell.write("forged.json", body(made, "a")))
    look = ("index", "digits", "cpu", "--device-keys", shell.folder / "devices")
    assert shell.json(*look)["ignored"] == ["a: no MAC that fits its key"]
    good = body(made, "a", time="2026-11-24T21:00:00Z")
    told = shell.json("import-receipt", shell.write("good.json", {**good, "mac": returns.mac(good, secret)}), *look[3:])
    assert told[0]["proof"] == "MAC of its device"
    assert shell.json(*look)["open"] == 2


def test_renew(shell: Shell) -> None:
    stored(shell.lake, shell.keys())
    found = shell.json("bundle", "digits", "cpu", "--renew", "1", "--out", shell.folder / "out")
    assert (found["version"], Path(found["file"]).name) == (2, "digits-cpu-000002.tar.gz")
    assert shell.json("verify", found["file"])["version"] == 2
    for days in ("0", "4000"):
        with pytest.raises(BadInput, match="--days"):
            shell("bundle", "digits", "cpu", "--renew", "1", "--days", days)


def test_bundle_runs_the_stage(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="FORJA_EDGE_KEY"):
        shell("bundle", "digits", "cpu")
    made = stored(shell.lake, shell.keys())
    said: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        said.append(command[1:])
        return subprocess.CompletedProcess(command, 0, json.dumps({"facts": {"version": 1}}), "")

    monkeypatch.setattr(subprocess, "run", run)
    assert shell.json("bundle", "digits", "cpu")["manifest_sha256"] == made.digest
    assert said == [["-m", "forja.cli", "stage", "export", "--recipe", "digits", "--variant", "cpu", "--json"]]
    with pytest.raises(BadInput, match="edge target"):
        shell("bundle", "digits", "toaster")


def test_a_stage_that_fails_ends_the_command(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shell.keys()
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 3, "", "Refused: no"))
    assert shell("bundle", "digits", "cpu").exit_code == 3


@pytest.mark.parametrize(
    "words",
    [
        ("publish", "digits", "cpu", "--canary", "a", "--percent", "half"),
        ("publish", "digits", "cpu", "--canary", ""),
        ("publish", "digits", "cpu", "--canary", "a", "--version", "9"),
        ("publish", "nothing", "cpu", "--canary", "a"),
        ("import-receipt", "/nonexistent"),
    ],
    ids=lambda w: " ".join(w[:2]),
)
def test_what_is_typed_wrongly(words: tuple[str, ...], shell: Shell) -> None:
    stored(shell.lake, shell.keys())
    with pytest.raises(BadInput):
        shell(*words)
    assert depot.bundle(shell.lake, LINE).version == 1
