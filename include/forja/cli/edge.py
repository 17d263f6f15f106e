"""Commands for edge devices: targets, keygen, bundle, verify, simulate, publish, index, import-receipt."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forja.errors import BadInput, Refused
from forja.settings import Settings

if TYPE_CHECKING:
    from forja.edge.depot import Line, Stored
    from forja.edge.index import Looked
    from forja.lake import Lake

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a file in include/forja/recipes.")]
TargetName = Annotated[str, typer.Argument(metavar="TARGET", help="Kind of device; ./forja edge targets lists them.")]
Bundle = Annotated[str, typer.Argument(metavar="BUNDLE", help="A .tar.gz, or RECIPE/TARGET[@VERSION] of the lake.")]
PublicKeys = Annotated[
    list[Path] | None, typer.Option("--key", help="Public key to believe; that of FORJA_EDGE_KEY when left out.", metavar="FILE")
]
DeviceKeys = Annotated[
    Path | None, typer.Option("--device-keys", metavar="DIR", help="Folder of NAME.key: checks the MACs of receipts (FORJA_EDGE_DEVICES).")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]


def register(app: typer.Typer) -> None:
    """Put the commands on ``app``."""
    edge = typer.Typer(no_args_is_help=True, help="Bundles for edge devices that prove themselves there: made, tried, handed over.")
    edge.command("targets", help="The kinds of devices, and what each runs.")(targets)
    edge.command("keygen", help="A key pair to sign bundles with; with --device the secret of one device's receipts.")(keygen)
    edge.command("bundle", help="Make the bundle of a recipe for a target, or sign an older one anew.")(bundle)
    edge.command("verify", help="Check a bundle's signature and digests, offline.")(verify)
    edge.command("simulate", help="Run a bundle's own scripts in an empty room on ONNX Runtime, refusals included.")(simulate)
    edge.command("publish", help="Offer a bundle to devices: canaries first.")(publish)
    edge.command("index", help="Count receipts: open the next ring, halt, or renew the index.")(index)
    edge.command("import-receipt", help="Store what a device said of its bundle.")(import_receipt)
    app.add_typer(edge, name="edge")


def targets(json_: Json = False) -> None:
    """List the catalogue."""
    from dataclasses import asdict

    from forja.edge.targets import TARGETS

    if json_:
        print(json.dumps({name: asdict(t) for name, t in TARGETS.items()}))
        return
    for t in TARGETS.values():
        library = f"TensorRT {t.tensorrt[0]}" if t.runtime == "tensorrt" else t.runtime
        print(f"{t.name:<16} {', '.join(t.precisions):<12} opset {t.opset:<3} {library:<15} {t.title}")


def keygen(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Outside the lake and this checkout; made when missing.")],
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="Make NAME.key for one device instead.")] = "",
    json_: Json = False,
) -> None:
    """Make keys; only paths and the key's id are printed."""
    from forja.edge import signing

    settings = Settings.from_env()
    if device:
        path = signing.create_device(folder, settings, device)
        print(
            json.dumps({"device": device, "secret": str(path)})
            if json_
            else f"secret {path}\nput it on {device} as ETC/device.key, mode 0600"
        )
        return
    private, public, key_id = signing.create(folder, settings)
    if json_:
        print(json.dumps({"private": str(private), "public": str(public), "key_id": key_id}))
        return
    print(f"private {private}\npublic  {public}, id {key_id[:16]}\nto sign: export {signing.VARIABLE}={private}")


def bundle(
    recipe: RecipeName, target: TargetName,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Copy the archive there.")] = None,
    renew: Annotated[int | None, typer.Option("--renew", metavar="VERSION", help="Sign this one anew, as the newest.")] = None,
    days: Annotated[int, typer.Option("--days", help="With --renew: days that it may be installed.")] = 365,
    json_: Json = False,
) -> None:  # fmt: skip
    """Run the stage export on the newest of everything, or adopt what it did."""
    from forja.edge import renewal, targets

    lake, line = _line(recipe, target)
    targets.find(target)
    made = _exported(lake, line, quiet=json_) if renew is None else renewal.renew(lake, line, renew, days)
    path = _copied(lake, made, out) if out else None
    facts: dict[str, Any] = {
        "team": line.team, "recipe": recipe, "target": target, "version": made.version, "variant": made.manifest["variant"],
        "manifest_sha256": made.digest, "expires": made.manifest["expires"], "lake": f"{made.folder}/bundle.tar.gz",
        "file": str(path) if path else None,
    }  # fmt: skip
    if json_:
        print(json.dumps(facts))
        return
    print(f"{recipe} for {target}: version {made.version}, {facts['variant']}, may be installed until {facts['expires']}")
    print(f"  {path or facts['lake']}")


def _exported(lake: Lake, line: Line, *, quiet: bool) -> Stored:
    """What the stage export made for this target; it prints as a stage does."""
    from forja.edge import depot, signing

    signing.from_env()  # before two environments are started for it
    command = [sys.executable, "-m", "forja.cli", "stage", "export", "--recipe", line.recipe, "--variant", line.target, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE if quiet else None, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr or "")
        raise typer.Exit(done.returncode)
    return depot.bundle(lake, line, int(json.loads(done.stdout)["facts"]["version"]))


def _copied(lake: Lake, stored: Stored, folder: Path) -> Path:
    from forja.edge import depot

    path = folder / f"{stored.line.recipe}-{stored.line.target}-{stored.version:06d}.tar.gz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(depot.archive(lake, stored))
    except OSError as error:
        raise BadInput("folder for the bundle", value=str(folder), allowed=f"one that can be written to ({error.strerror})") from None
    return path


def _line(recipe: str, target: str) -> tuple[Lake, Line]:
    from forja import recipes
    from forja.edge.depot import Line
    from forja.lake import Lake

    loaded = recipes.load(recipe)
    return Lake(Settings.from_env().lake), Line(team=loaded.team, recipe=recipe, target=target)


def _archive(name: str) -> bytes:
    """Bytes of a bundle, from a file or from the lake."""
    from forja.edge import depot

    path = Path(name)
    if path.is_file():
        return path.read_bytes()
    match = re.fullmatch(r"([a-z][a-z0-9_]*)/([a-z0-9-]+)(?:@(\d+))?", name)
    if not match:
        raise BadInput("bundle", value=name, allowed="a .tar.gz that exists, or RECIPE/TARGET[@VERSION]")
    lake, line = _line(match[1], match[2])
    return depot.archive(lake, depot.bundle(lake, line, int(match[3]) if match[3] else None))


def _public(paths: list[Path] | None) -> list[bytes]:
    from forja.edge import signing

    try:
        return [p.read_bytes() for p in paths] if paths else [signing.from_env().public_pem]
    except OSError as error:
        raise BadInput("public key", value=error.filename, allowed="a file that can be read") from None


def verify(bundle: Bundle, key: PublicKeys = None, json_: Json = False) -> None:
    """What a device checks before it loads anything; its state and its clock's past are not known here."""
    from forja.edge import simulate
    from forja.edge.files import trust

    with tempfile.TemporaryDirectory() as name:
        contents = simulate.opened(_archive(bundle))
        options = simulate.lay(Path(name), contents, _public(key))
        try:
            body = trust.check(str(Path(name) / "bundle"), options[1], options[3])
        except trust.Refused as error:
            raise Refused(f"bundle {bundle}: {error.rule}", value=error.reason, do="don't install it") from None
    names = ("team", "recipe", "target", "version", "variant", "created", "expires", "key_id")
    facts: dict[str, Any] = {n: body[n] for n in names}
    digest: dict[str, Any] = {"manifest_sha256": trust.digest(contents[trust.MANIFEST]), "files": len(body["files"])}
    if json_:
        print(json.dumps({**facts, **digest}))
        return
    print(f"{bundle}: signed, whole, current: {facts['recipe']} for {facts['target']}, version {facts['version']}, {facts['variant']}")
    print(f"  until {facts['expires']}, manifest {digest['manifest_sha256'][:16]}, {digest['files']} files, key {facts['key_id'][:16]}")


def simulate(
    bundle: Bundle, key: PublicKeys = None,
    receipt: Annotated[Path | None, typer.Option("--receipt", metavar="FILE", help="Keep the receipt of the simulation.")] = None,
    json_: Json = False,
) -> None:  # fmt: skip
    """Try a bundle, and what must be refused; exit status 3 when anything comes otherwise."""
    from dataclasses import asdict

    from forja.edge import simulate as room

    rows, body = room.run(Settings.from_env(), _archive(bundle), _public(key), _say)
    if receipt:
        receipt.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    good = all(row.ok for row in rows)
    if json_:
        print(json.dumps({"label": room.LABEL, "ok": good, "rows": [{**asdict(r), "ok": r.ok} for r in rows], "receipt": body}))
    else:
        print(f"{bundle}: {room.LABEL}")
        for row in rows:
            print(f"  {'ok   ' if row.ok else 'WRONG'} {row.what:<46} {row.found:<11} {row.said[:110]}")
    raise typer.Exit(0 if good else 3)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def publish(
    recipe: RecipeName, target: TargetName,
    canary: Annotated[str, typer.Option("--canary", metavar="NAME,...", help="Devices of the first ring.")],
    percent: Annotated[str, typer.Option("--percent", metavar="P,...", help="Shares of all devices in the rings after it.")] = "10,50,100",
    good: Annotated[int, typer.Option("--good", help="Good receipts that a ring needs before the next opens.")] = 1,
    failed: Annotated[int, typer.Option("--failed", help="Devices that may refuse it; one more halts the rollout.")] = 0,
    authentic: Annotated[bool, typer.Option("--authentic", help="Only receipts with a device's MAC count.")] = False,
    version: Annotated[int | None, typer.Option("--version", help="The newest when left out.")] = None,
    json_: Json = False,
) -> None:  # fmt: skip
    """Write the next index: this bundle, for the canaries."""
    from forja.edge import depot, index, rings, signing

    lake, line = _line(recipe, target)
    try:
        shares = [float(p) for p in percent.split(",") if p]
    except ValueError:
        raise BadInput("--percent", value=percent, allowed="numbers with commas, for example 10,50,100") from None
    policy = rings.Policy(good=good, most_failed=failed, authentic=authentic)
    rollout = rings.plan([d for d in canary.split(",") if d], shares, policy)
    written = index.publish(lake, signing.from_env(), depot.bundle(lake, line, version), rollout)
    _tell(lake, line, {"serial": written.serial, "version": written.body["bundle"]["version"], **rings.to_json(rollout)}, json_)


def _tell(lake: Lake, line: Line, facts: dict[str, Any], json_: bool) -> None:
    address = f"{lake.uri(line.folder)}/index.json"
    if json_:
        print(json.dumps({**facts, "index": address}))
        return
    names = [ring["name"] for ring in facts["rings"]]
    opened = ", ".join(names[: facts["open"]])
    state = f"halted: {facts['halted']}" if facts["halted"] else f"open: {opened}; closed: {', '.join(names[facts['open'] :]) or 'none'}"
    print(f"index {facts['serial']}: {line.recipe} for {line.target}, version {facts['version']}; {state}")
    print(f"  serve {lake.uri(line.folder)} as files; devices poll index.json in it")


def index(
    recipe: RecipeName, target: TargetName, device_keys: DeviceKeys = None,
    look: Annotated[bool, typer.Option("--look", help="Only count; needs no key.")] = False,
    json_: Json = False,
) -> None:  # fmt: skip
    """Count the receipts of the bundle that is offered, and say what follows."""
    from forja.edge import index as indexes
    from forja.edge import rings, signing

    lake, line = _line(recipe, target)
    signer = None if look else signing.from_env()
    found = indexes.look(lake, signer, line, signing.device_keys(_device_keys(device_keys)))
    facts = {
        "serial": found.index.serial, "version": found.bundle.version, "changed": found.changed, "why": found.why,
        "passed": list(found.counted.passed), "failed": list(found.counted.failed), "ignored": list(found.counted.ignored),
        **rings.to_json(found.rollout),
    }  # fmt: skip
    if not json_:
        _show(found)
    _tell(lake, line, facts, json_)


def _show(found: Looked) -> None:
    print(found.why)
    for name, items in (("passed", found.counted.passed), ("refused", found.counted.failed), ("not counted", found.counted.ignored)):
        if items:
            print(f"  {name}: {', '.join(items[:10])}{' ...' if len(items) > 10 else ''}")


def _device_keys(given: Path | None) -> Path | None:
    named = os.environ.get("FORJA_EDGE_DEVICES")
    return given or (Path(named) if named else None)


def import_receipt(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Receipts that verify.py or update.py wrote.")],
    device_keys: DeviceKeys = None, json_: Json = False,
) -> None:  # fmt: skip
    """Check and store receipts; each once."""
    from forja import recipes
    from forja.edge import depot, returns, signing
    from forja.edge.targets import TARGETS
    from forja.lake import Lake

    lake, keys, told = Lake(Settings.from_env().lake), signing.device_keys(_device_keys(device_keys)), []
    lines = [depot.Line(team=recipes.load(r).team, recipe=r, target=t) for r in recipes.names() for t in TARGETS]
    for path in files:
        try:
            returned = returns.parse(path.read_bytes())
        except OSError as error:
            raise BadInput("receipt of a device", value=str(path), allowed=f"a file that can be read ({error.strerror})") from None
        stored = returns.find(lake, lines, returned)
        where, new = returns.store(lake, stored, returned)
        proof = "MAC of its device" if returned.authentic(keys) else "unsigned: anybody who has the bundle could have written it"
        told.append({
            "file": str(path), "device": returned.device, "outcome": returned.body["outcome"], "simulated": returned.simulated,
            "recipe": stored.line.recipe, "target": stored.line.target, "version": stored.version, "stored": where, "new": new,
            "proof": proof,
        })  # fmt: skip
    if json_:
        print(json.dumps(told))
        return
    for t in told:
        kind = "simulation, no device" if t["simulated"] else t["proof"]
        print(f"{t['device']}: {t['recipe']} for {t['target']}, version {t['version']}: {t['outcome']} ({kind})")
        print(f"  {t['stored']}{'' if t['new'] else ', there already'}")
