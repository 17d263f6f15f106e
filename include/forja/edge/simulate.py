"""Simulate: a bundle's own scripts, run where a device would run them, but for the device.

A room is an empty folder with a Python of its own that has numpy and ONNX Runtime and nothing else; scripts run in it with an empty
environment. What passes there is *simulated on ONNX Runtime, no device*: the scripts, the files, the signatures and the answers are real,
the device's runtime, its speed and its real precision are not. Each refusal is proven beside it, with a bundle that has to be refused.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forja import envs
from forja.edge import bundle, signing
from forja.edge.files import trust
from forja.edge.signing import Signer
from forja.errors import BadInput, Refused
from forja.lake import canonical, sha256
from forja.settings import Settings

LABEL = "simulated on ONNX Runtime, no device"
PACKAGES = ("numpy", "numpy.libs", "onnxruntime", "flatbuffers", "google", "packaging")
"""What the room's Python has: numpy, ONNX Runtime and what that imports."""
MOST_BYTES = 4 << 30
"""Largest bundle, unpacked."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that was tried."""

    what: str
    wanted: str
    """``passed``, or the rule that must refuse it."""
    found: str
    """The same, as it came."""
    said: str
    """The script's own last line."""
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it came as it must."""
        return self.wanted == self.found


@dataclass(frozen=True, kw_only=True)
class Room:
    """An empty machine, as far as folders and environment variables make one."""

    folder: Path
    python: Path

    def run(self, command: list[str], cwd: Path) -> tuple[int, str]:
        """Run a command with an empty environment; its exit status and what it said."""
        env = {"HOME": str(self.folder / "home"), "PATH": f"{self.python.parent}:/usr/bin:/bin", "LANG": "C.UTF-8"}
        # What the machine underneath is must not decide what a simulation says.
        env |= {"FORJA_EDGE_MODEL": str(self.folder / "none"), "FORJA_EDGE_NVPMODEL": str(self.folder / "nvpmodel.conf")}
        done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        return done.returncode, done.stdout.strip().replace(f"{self.folder}/", "")


def interpreter(settings: Settings) -> Path:
    """A Python that has numpy and ONNX Runtime; BadInput when neither the serving nor the ml environment is there."""
    for name in ("serving", "ml", "ml-dev"):
        path = envs.folder(name, settings) / "bin" / "python"
        if (envs.folder(name, settings) / envs.MARKER).is_file():
            return path
    raise BadInput("environment with ONNX Runtime", value="none", allowed="serving or ml", do="run make setup")


def room(folder: Path, base: Path) -> Room:
    """Make a room below ``folder`` whose Python is that of ``base``, with PACKAGES and no others."""
    (folder / "home").mkdir()
    subprocess.run([str(base), "-I", "-m", "venv", "--without-pip", str(folder / "venv")], check=True, capture_output=True)
    site = next((folder / "venv" / "lib").glob("python3*")) / "site-packages"
    find = [str(base), "-I", "-c", "import numpy, pathlib; print(pathlib.Path(numpy.__file__).parents[1])"]
    where = subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip()
    for name in PACKAGES:
        if (Path(where) / name).exists():
            (site / name).symlink_to(Path(where) / name)
    return Room(folder=folder, python=folder / "venv" / "bin" / "python")


def run(settings: Settings, archive: bytes, keys: list[bytes], say: Callable[[str], None]) -> tuple[list[Row], dict[str, Any]]:
    """Try a bundle and everything that must be refused; rows, and the receipt of the good one.

    Args:
        archive: the bundle.
        keys: public keys that the imagined device believes, as PEM.

    Raises:
        Refused: the archive can't be unpacked.
    """
    with tempfile.TemporaryDirectory(prefix="forja-edge-") as name:
        folder = Path(name)
        here = room(folder, interpreter(settings))
        say(f"room {folder}, Python {here.python}")
        contents = opened(archive)
        manifest = json.loads(contents[trust.MANIFEST])
        rows = [_try(here, "as it came", contents, keys, "passed")]
        receipt = json.loads((folder / "as-it-came" / "receipt.json").read_text())
        if rows[0].found == "passed":
            rows += scripts(here, folder / "as-it-came", manifest)
        say(f"{rows[0].what}: {rows[0].said}")
        mine = signing.new()
        for what, wanted, change in cases(contents, manifest, mine):
            rows.append(_try(here, what, change, [mine.public_pem, *keys], wanted))
    return rows, receipt


def opened(archive: bytes) -> dict[str, bytes]:
    """Files of a bundle's archive, by their paths in it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            top = Path(trust.unpack(io.BytesIO(archive), folder, MOST_BYTES))
        except trust.Refused as error:
            raise Refused("bundle", value=error.reason, do="fetch it again") from error
        found = {str(p.relative_to(top)): p.read_bytes() for p in sorted(top.rglob("*")) if p.is_file()}
    if missing := {trust.MANIFEST, trust.SIGNATURE} - set(found):
        raise Refused("bundle: files are missing", value=sorted(missing))
    return found


def _try(here: Room, what: str, contents: Mapping[str, bytes], keys: list[bytes], wanted: str) -> Row:
    """Lay a bundle out, on a device that believes ``keys``, and let it verify itself."""
    place = here.folder / what.replace(" ", "-").replace(",", "")
    device = lay(place, contents, keys)
    began = time.monotonic()
    receipt = place / "receipt.json"
    command = [
        here.python,
        "-I",
        "-B",
        place / "bundle" / "verify.py",
        *device,
        "--simulated",
        "--device",
        "simulated",
        "--receipt",
        receipt,
    ]
    code, said = here.run([str(c) for c in command], place / "bundle")
    body = json.loads(receipt.read_text()) if receipt.is_file() else {}
    found = body.get("rule") or body.get("outcome") or f"no receipt, exit status {code}"
    if (code == 0) != (body.get("outcome") == "passed"):
        found = f"exit status {code} and a receipt that says {body.get('outcome')}"
    return Row(what=what, wanted=wanted, found=found, said=(said.splitlines() or [""])[-1], seconds=time.monotonic() - began)


def lay(place: Path, contents: Mapping[str, bytes], keys: list[bytes]) -> list[str]:
    """Write a bundle and a device's keys and state below ``place``; the options that name the latter. A file ``//state`` is the state."""
    for name, data in contents.items():
        if name != STATE:
            path = place / "bundle" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.chmod(0o755 if name.endswith((".py", ".sh")) else 0o644)
    folder = place / "etc" / "keys"
    folder.mkdir(parents=True)
    for number, pem in enumerate(keys):
        (folder / f"{number}.pem").write_bytes(pem)
        (folder / f"{number}.pem").chmod(0o644)
    for path in (folder, folder.parent):
        path.chmod(0o755)
    if STATE in contents:
        body = json.loads(contents[trust.MANIFEST])
        trust.save_state(str(place / "var"), body, json.loads(contents[STATE]))
    return ["--etc", str(place / "etc"), "--var", str(place / "var")]


STATE = "//state"
"""Not a file of the bundle: the state of the imagined device before."""


def cases(contents: dict[str, bytes], manifest: dict[str, Any], mine: Signer) -> list[tuple[str, str, dict[str, bytes]]]:
    """What must be refused: its name, the rule, and the bundle. ``mine`` signs those that only a signer could make."""

    def again(changes: Mapping[str, bytes] | None = None, **fields: Any) -> dict[str, bytes]:
        """The bundle with other files and fields, and a signature that fits."""
        body = {n: d for n, d in contents.items() if n not in (trust.MANIFEST, trust.SIGNATURE)} | dict(changes or {})
        listed = {n: {"sha256": sha256(d), "bytes": len(d)} for n, d in sorted(body.items())}
        data = canonical({**manifest, "files": listed, **fields}) + b"\n"
        return {**body, trust.MANIFEST: data, trust.SIGNATURE: mine.sign(data)}

    def flipped(name: str) -> dict[str, bytes]:
        data = bytearray(contents[name])
        data[len(data) // 2] ^= 1
        return {**contents, name: bytes(data)}

    turned = [*manifest["classes"][1:], manifest["classes"][0]]
    labels = "".join(f"{c}\n" for c in turned).encode()
    newer = {
        "version": manifest["version"] + 1, "manifest": "0" * 64, "target": manifest["target"], "serial": 0, "index": "", "previous": "",
        "back": "", "refused": {},
    }  # fmt: skip
    longer = canonical({**manifest, "expires": "2999-01-01T00:00:00Z"}) + b"\n"
    found = [
        ("a file was changed", "digest", flipped("model.onnx")),
        ("the manifest was changed", "signature", {**contents, trust.MANIFEST: longer}),
        ("signed by a stranger", "signature", _stranger(contents)),
        ("a file was added", "extra", {**contents, "numpy.py": b"raise SystemExit(0)\n"}),
        ("older than what is installed", "downgrade", {**again(), STATE: json.dumps(newer).encode()}),
        ("expired", "expired", again(created="2020-01-01T00:00:00Z", expires="2020-01-02T00:00:00Z")),
        ("made in the future", "clock", again(created="2998-01-01T00:00:00Z", expires="2999-01-01T00:00:00Z")),
        ("for another kind of device", "target", {**again(target="toaster"), STATE: json.dumps({**newer, "version": 0}).encode()}),
        ("labels in another order, in the file alone", "labels", again({"labels.txt": labels})),
        ("labels in another order, everywhere", "labels", again({"labels.txt": labels}, classes=turned)),
        ("golden answers of another model", "golden", again({"golden/outputs.npy": _shifted(contents["golden/outputs.npy"])})),
    ]
    return found


def _stranger(contents: Mapping[str, bytes]) -> dict[str, bytes]:
    return {**contents, trust.SIGNATURE: signing.new().sign(contents[trust.MANIFEST])}


def _shifted(data: bytes) -> bytes:
    """Golden answers with the samples in another order: each a good answer, to another question."""
    import numpy

    return bundle.npy(numpy.roll(numpy.load(io.BytesIO(data), allow_pickle=False)[:, ::-1], 1, axis=1))


def scripts(here: Room, place: Path, manifest: dict[str, Any]) -> list[Row]:
    """The other scripts of a good bundle: the golden inputs through infer.py, the engine's and the device's set-up as dry runs."""
    device = ["--etc", str(place / "etc"), "--var", str(place / "var")]
    python = [str(here.python), "-I", "-B"]
    modes = re.findall(r"^MODES=(.+)$", (place / "bundle" / "bundle.env").read_text(), re.MULTILINE)
    lines = [f"< POWER_MODEL ID={i} NAME={name} >\n" for i, name in enumerate(" ".join(modes).split())]
    (here.folder / "nvpmodel.conf").write_text("".join(lines))
    version = manifest["tensorrt"]["min"] if manifest["runtime"] == "tensorrt" else "1.0"
    commands = {
        "infer.py on the golden inputs": [*python, "infer.py", *device, "--simulated", "--json", "golden/inputs.npy"],
        "build.sh, dry run": ["sh", "build.sh", "--dry-run", "--tensorrt", version],
        "setup.sh, dry run": ["sh", "setup.sh", "--dry-run"],
    }
    rows = []
    for what, command in commands.items():
        began = time.monotonic()
        code, said = here.run(command, place / "bundle")
        found = "passed" if code == 0 else f"exit status {code}"
        last = (said.splitlines() or [""])[-1]
        if what.startswith("infer") and code == 0:
            wanted = json.loads((place / "bundle" / "golden" / "labels.json").read_text())
            answers = [a["answer"] for a in json.loads(said)]
            right = sum(a == b for a, b in zip(answers, wanted, strict=True))
            last = f"{right} of {len(wanted)} as golden/labels.json says"
            found = "passed" if right == len(wanted) else last
        rows.append(Row(what=what, wanted="passed", found=found, said=last, seconds=time.monotonic() - began))
    return rows
