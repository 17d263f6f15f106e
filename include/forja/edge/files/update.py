"""Update: one look at the index of a recipe's bundles, and the new bundle installed if it is this device's turn. For cron or a timer.

    python3 update.py URL TEAM/RECIPE TARGET [--after COMMAND]      what URL names is a folder with index.json, http(s):// or a path
    python3 update.py --rollback URL TEAM/RECIPE TARGET             back to the bundle before

VAR/TEAM.RECIPE/current is a link to the bundle that is in use. It moves, at once, only after this script (that of the installed bundle,
with its trust.py beside it) has checked the new bundle and the new bundle has verified itself here; when COMMAND then fails, it moves back.
Exit status 0: nothing to do, or installed; 3: refused, or rolled back; 5: not reachable, try later. Python 3.6, standard library, openssl.
"""
# ruff: noqa: UP006, UP035 (the syntax of Python 3.6)

import argparse
import fcntl
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any, Dict, List, Tuple

HERE = os.path.dirname(os.path.abspath(__file__))
sys.dont_write_bytecode = True
sys.path.insert(0, HERE)

import trust  # type: ignore[import-not-found] # noqa: E402 - beside this file

TIMEOUT_S = 60
BUILD_S, VERIFY_S = 3600, 900
"""Longest build and verification; an engine takes minutes on a Nano."""


class Unreachable(Exception):
    """The index or an archive can't be had now."""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Install the newest bundle if it is this device's turn.")
    trust.options(parser)
    parser.add_argument("url", help="folder with index.json")
    parser.add_argument("recipe", help="TEAM/RECIPE")
    parser.add_argument("target", help="kind of this device, for example jetson-nano")
    parser.add_argument("--device", default="", help="name of this device; ETC/device or the host name when left out")
    parser.add_argument("--after", default="", metavar="COMMAND", help="run when the link moved; a failure moves it back")
    parser.add_argument("--rollback", action="store_true", help="back to the bundle before")
    parser.add_argument("--again", action="store_true", help="also what this device refused before")
    parser.add_argument("--simulated", action="store_true", help="verify on ONNX Runtime, whatever the target is")
    given = parser.parse_args()
    team, _, recipe = given.recipe.partition("/")
    body = {"team": team, "recipe": recipe}
    try:
        if not (trust.NAME.match(team) and trust.NAME.match(recipe)):
            raise trust.Refused("schema", f"recipe {given.recipe!r}, allowed: TEAM/RECIPE")
        folder = trust.place(given.var, body)
        os.makedirs(os.path.join(folder, "bundles"), exist_ok=True)
        with open(os.path.join(folder, "lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second one waits, and then finds nothing to do
            print(back(folder, body, given) if given.rollback else look(folder, body, given))
    except trust.Refused as error:
        sys.stderr.write(f"refused: {error}\n")
        return 3
    except Unreachable as error:
        sys.stderr.write(f"not reachable: {error}\n")
        return 5
    return 0


def look(folder: str, body: Dict[str, str], given: argparse.Namespace) -> str:
    """Look at the index, and install what it offers if it is this device's turn; a line that says what was done."""
    device = given.device or name_of(given.etc)
    index = believed(body, given)
    state = trust.load_state(given.var, body)
    offer = index["bundle"]
    take, why = decide(index, state, device, given.again)
    if not take:
        return why
    bundle = fetched(folder, offer, given)
    manifest = trust.check(bundle, given.etc, given.var)
    if (manifest["target"], manifest["version"]) != (given.target, offer["version"]):
        raise trust.Refused("index", f"the bundle is for {manifest['target']}, version {manifest['version']}; the index says otherwise")
    prove(folder, bundle, manifest, offer, given)
    install(folder, bundle, body, offer, given)
    return f"installed version {offer['version']}"


def name_of(etc: str) -> str:
    """Name of this device."""
    try:
        with open(os.path.join(etc, "device"), encoding="utf-8") as file:
            return file.readline().strip()
    except OSError:
        return os.uname().nodename


def believed(body: Dict[str, str], given: argparse.Namespace) -> Dict[str, Any]:
    """The index, when it is signed, of this recipe and target, not expired, and not older than one that was seen before."""
    data = fetch(given.url, "index.json", trust.MOST_JSON)
    try:
        serial = int(json.loads(data.decode("utf-8"))["serial"])
    except (ValueError, KeyError, TypeError) as error:
        raise trust.Refused("schema", f"index.json is no index: {error!r}") from error
    # The signature lies under the serial's own name: an index that is replaced at this moment can't be paired with another's.
    trust.signed(data, fetch(given.url, f"index-{serial:06d}.sig", 4096), given.etc)
    index: Dict[str, Any] = trust.parsed(data, trust.INDEX)
    found = index["team"], index["recipe"], index["target"]
    if found != (body["team"], body["recipe"], given.target):
        raise trust.Refused("index", f"of {'/'.join(found)}, allowed: {given.recipe}/{given.target}")
    trust.current(index)
    state, seen = trust.load_state(given.var, body), trust.digest(data)
    if serial < state["serial"] or (serial == state["serial"] and seen != state["index"]):
        raise trust.Refused("serial", f"index {serial}, seen before: {state['serial']}")
    if serial > state["serial"]:
        state.update(serial=serial, index=seen)
        trust.save_state(given.var, body, state)
    return index


def decide(index: Dict[str, Any], state: Dict[str, Any], device: str, again: bool) -> Tuple[bool, str]:
    """Whether this device takes what an index offers, and why not."""
    offer = index["bundle"]
    if offer["version"] <= state["version"]:
        return False, f"nothing to do: version {state['version']} is installed, {offer['version']} is offered"
    if index["halted"]:
        return False, f"version {offer['version']} is halted: {index['halted']}"
    if offer["manifest_sha256"] in state["refused"] and not again:
        return False, f"version {offer['version']} was refused here before: {state['refused'][offer['manifest_sha256']]}"
    rings = index["rings"][: index["open"]]
    if not any(trust.inside(ring, device, offer["manifest_sha256"]) for ring in rings):
        return False, f"version {offer['version']} is not for {device} yet; open: {', '.join(r['name'] for r in rings)}"
    return True, ""


def fetched(folder: str, offer: Dict[str, Any], given: argparse.Namespace) -> str:
    """Folder of the unpacked bundle, its archive's digest and its manifest's checked."""
    if not trust.PATH.match(offer["archive"]):
        raise trust.Refused("index", f"archive {offer['archive']!r}")
    data = fetch(given.url, offer["archive"], offer["bytes"])
    if trust.digest(data) != offer["sha256"]:
        raise trust.Refused("digest", "the archive is not the one that the index names")
    incoming = os.path.join(folder, "incoming")
    shutil.rmtree(incoming, ignore_errors=True)
    os.makedirs(incoming)
    unpacked = trust.unpack(io.BytesIO(data), incoming, offer["unpacked"])
    manifest = trust.read(os.path.join(unpacked, trust.MANIFEST), trust.MOST_JSON)
    if trust.digest(manifest) != offer["manifest_sha256"]:
        raise trust.Refused("digest", "the manifest is not the one that the index names")
    return str(unpacked)


def prove(folder: str, bundle: str, manifest: Dict[str, Any], offer: Dict[str, Any], given: argparse.Namespace) -> None:
    """Let the checked bundle build its engine and verify itself; its receipt is kept, and a refusal is remembered."""
    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    receipt = os.path.join(folder, "receipts", f"{manifest['version']:06d}-{now}.json")
    options = ["--etc", given.etc, "--var", given.var]
    commands = [([sys.executable, "-B", os.path.join(bundle, "verify.py"), *options, "--only", "--receipt", receipt], VERIFY_S)]
    if given.device:
        commands[0][0].extend(["--device", given.device])
    if given.simulated:
        commands[0][0].append("--simulated")
    elif manifest["runtime"] == "tensorrt":
        commands.insert(0, (["sh", os.path.join(bundle, "build.sh"), *options], BUILD_S))
    for command, most_s in commands:
        code, said = run(command, most_s)
        if code:
            remember(given, manifest, offer["manifest_sha256"], said)
            raise trust.Refused("verify", said)


def run(command: List[str], most_s: float) -> Tuple[int, str]:
    """Exit status and last line of a command; what it prints is printed."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=most_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    said = done.stdout.decode("utf-8", "replace")
    sys.stdout.write(said)
    return done.returncode, (said.strip().split("\n") or [""])[-1][:400]


def remember(given: argparse.Namespace, body: Dict[str, Any], manifest: str, why: str) -> None:
    """Don't try the bundle with this manifest again unasked."""
    state = trust.load_state(given.var, body)
    state["refused"][manifest] = why
    trust.save_state(given.var, body, state)


def install(folder: str, bundle: str, body: Dict[str, str], offer: Dict[str, Any], given: argparse.Namespace) -> None:
    """Move the link to a bundle that has proven itself; back again when the command after it fails."""
    name = f"{offer['version']:06d}-{offer['manifest_sha256'][:12]}"
    target = os.path.join(folder, "bundles", name)
    state = trust.load_state(given.var, body)
    # The link names it already when the power went between the link's move and the state's.
    before = linked(folder) if linked(folder) != name else state["previous"]
    shutil.rmtree(target, ignore_errors=True)
    os.rename(bundle, target)
    state["previous"] = before
    trust.save_state(given.var, body, state)
    move(folder, name)
    # After the link: the bundle before must not be refused as a downgrade while it is in use.
    state.update(version=offer["version"], manifest=offer["manifest_sha256"], target=given.target, back="")
    trust.save_state(given.var, body, state)
    code, said = run(shlex.split(given.after), VERIFY_S) if given.after else (0, "")
    if code:
        remember(given, body, offer["manifest_sha256"], said)
        if before:
            step_back(folder, body, before, given)
        else:
            os.unlink(os.path.join(folder, "current"))
        raise trust.Refused("after", f"{given.after} failed ({said}); {'back to ' + before if before else 'nothing was installed before'}")
    for old in os.listdir(os.path.join(folder, "bundles")):
        if old not in (name, before):
            shutil.rmtree(os.path.join(folder, "bundles", old), ignore_errors=True)


def linked(folder: str) -> str:
    """Name of the bundle in use, empty when there is none."""
    link = os.path.join(folder, "current")
    return os.path.basename(os.readlink(link)) if os.path.islink(link) else ""


def move(folder: str, name: str) -> None:
    """Make ``current`` name another bundle, in one step."""
    part = os.path.join(folder, "current.part")
    if os.path.lexists(part):
        os.unlink(part)
    os.symlink(os.path.join("bundles", name), part)
    os.replace(part, os.path.join(folder, "current"))


def back(folder: str, body: Dict[str, str], given: argparse.Namespace) -> str:
    """Go back to the bundle before: the one step down that a device takes, since a person on it asked for it."""
    state = trust.load_state(given.var, body)
    now, before = linked(folder), state["previous"]
    if not before or before == now or not os.path.isdir(os.path.join(folder, "bundles", before)):
        raise trust.Refused("rollback", "no bundle before this one is kept here")
    remember(given, body, state["manifest"], "rolled back by hand")
    step_back(folder, body, before, given)
    return f"{now} -> {before}"


def step_back(folder: str, body: Dict[str, str], before: str, given: argparse.Namespace) -> None:
    """Move the link to the bundle before, which stays allowed although a newer version was installed."""
    state = trust.load_state(given.var, body)
    state["back"] = trust.digest(trust.read(os.path.join(folder, "bundles", before, trust.MANIFEST), trust.MOST_JSON))
    trust.save_state(given.var, body, state)
    move(folder, before)
    if given.after:
        run(shlex.split(given.after), VERIFY_S)


def fetch(base: str, name: str, most: int) -> bytes:
    """A file below the index's folder, of ``most`` bytes at most."""
    try:
        if "://" not in base:
            with open(os.path.join(base, name), "rb") as file:
                data = file.read(most + 1)
        else:
            if not base.startswith(("https://", "http://", "file://")):
                raise trust.Refused("index", f"address {base}, allowed: https://, http://, file:// or a path")
            with urllib.request.urlopen(base.rstrip("/") + "/" + name, timeout=TIMEOUT_S) as answer:  # noqa: S310 - checked above
                data = answer.read(most + 1)
    except (OSError, urllib.error.URLError) as error:
        raise Unreachable(f"{base}/{name}: {error}") from error
    if len(data) > most:
        raise trust.Refused("index", f"{name} has more than {most} bytes")
    return bytes(data)


if __name__ == "__main__":
    sys.exit(main())
