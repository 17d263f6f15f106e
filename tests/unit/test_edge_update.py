"""update.py: a device that polls a real index of a real lake, over HTTP and from a folder, with everything that can go wrong."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import http.server
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from unit.edge_parts import LINE, Device, content, signer, stored

from forja.edge import bundle, depot, index, rings, simulate
from forja.edge.bundle import FILES
from forja.edge.files import trust, update
from forja.edge.rings import Policy, Rollout
from forja.lake import Lake, canonical, sha256
from forja.settings import Settings

KEY = signer()
ORT = str(simulate.interpreter(Settings.from_env()))


class Fleet:
    """A lake with an index, and devices that poll it with scripts of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lake = folder, Lake(str(folder / "lake"))
        self.url = self.lake.uri(LINE.folder)

    def offer(self, work: str = "a", canary: str = "one", **changes: Any) -> depot.Stored:
        made = stored(self.lake, KEY, work, **changes)
        self.publish(made, rings.plan([canary], [100], Policy(good=1)))
        return made

    def publish(self, made: depot.Stored, rollout: Rollout) -> None:
        index.publish(self.lake, KEY, made, rollout)

    def device(self, name: str = "one") -> Device:
        device = Device(self.folder / name, KEY.public_pem, python=ORT)
        (device.etc / "device").write_text(f"{name}\n")
        device.bundle.mkdir()
        for script in ("update.py", "trust.py"):
            (device.bundle / script).write_bytes((FILES / script).read_bytes())
        return device

    def poll(self, device: Device, *arguments: str, url: str = "") -> tuple[int, str]:
        done = device.run("update.py", *device.options, *arguments, url or self.url, "vision/digits", "cpu")
        return done.returncode, (done.stdout + done.stderr).strip().splitlines()[-1]


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def home(device: Device) -> Path:
    return device.var / "vision.digits"


def current(device: Device) -> int:
    """Version that the link names, 0 for none."""
    link = home(device) / "current"
    return int(json.loads((link / "manifest.json").read_text())["version"]) if link.exists() else 0


def state(device: Device) -> dict[str, Any]:
    return dict(json.loads((home(device) / "state.json").read_text()))


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder over HTTP on 127.0.0.1."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_over_http_from_nothing_to_the_second_version_and_back(fleet: Fleet) -> None:
    device = fleet.device()
    with served(Path(fleet.url)) as url:
        first = fleet.offer("a")
        assert fleet.poll(device, url=url) == (0, "installed version 1")
        assert current(device) == 1
        assert state(device)["manifest"] == first.digest
        assert fleet.poll(device, url=url)[1].startswith("nothing to do")
        fleet.offer("b")
        assert fleet.poll(device, url=url) == (0, "installed version 2")
    assert current(device) == 2
    receipts = [json.loads(p.read_text()) for p in sorted((home(device) / "receipts").iterdir())]
    assert [(r["bundle"]["version"], r["outcome"], r["device"]["id"]) for r in receipts] == [(1, "passed", "one"), (2, "passed", "one")]
    code, said = fleet.poll(device, "--rollback")
    assert (code, current(device)) == (0, 1), said
    link = home(device) / "current"
    done = subprocess.run(
        [ORT, "-B", str(link / "infer.py"), *device.options, str(link / "golden" / "inputs.npy")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, "what a device went back to still answers: " + done.stderr
    assert fleet.poll(device)[1].startswith("nothing to do"), "it doesn't go forward again by itself"
    assert fleet.poll(device, "--rollback")[0] == 3, "one step, not two"
    fleet.offer("c")
    assert fleet.poll(device) == (0, "installed version 3")


def test_only_devices_of_open_rings_install(fleet: Fleet) -> None:
    fleet.offer(canary="one")
    assert fleet.poll(fleet.device("two"))[1] == "version 1 is not for two yet; open: canary"
    assert fleet.poll(fleet.device("one")) == (0, "installed version 1")


def test_a_halted_version_is_left_alone(fleet: Fleet) -> None:
    made = fleet.offer()
    plan = rings.plan(["one"], [100], Policy(good=1))
    fleet.publish(made, Rollout(rings=plan.rings, policy=plan.policy, open=2, halted="2 devices refused it"))
    device = fleet.device()
    assert fleet.poll(device) == (0, "version 1 is halted: 2 devices refused it")
    assert current(device) == 0


def test_a_bundle_that_fails_on_the_device_leaves_what_was(fleet: Fleet) -> None:
    device = fleet.device()
    fleet.offer("a")
    fleet.poll(device)
    golden = content().golden
    bad = fleet.offer("b", golden=bundle.Golden(inputs=golden.inputs, outputs=golden.outputs[::-1]))
    code, said = fleet.poll(device)
    assert (code, "golden" in said, current(device)) == (3, True, 1)
    assert state(device)["version"] == 1
    receipt = sorted((home(device) / "receipts").iterdir())[-1]
    assert json.loads(receipt.read_text())["rule"] == "golden"
    assert fleet.poll(device)[1].startswith("version 2 was refused here before")
    assert list(state(device)["refused"]) == [bad.digest]
    assert fleet.poll(device, "--again")[0] == 3
    fleet.offer("c")
    assert fleet.poll(device) == (0, "installed version 3")


def test_a_command_that_fails_after_the_move_moves_it_back(fleet: Fleet) -> None:
    device = fleet.device()
    app = fleet.folder / "app.sh"
    app.write_text('#!/bin/sh\nreadlink "$1/current" >>"$1/log"\n! grep -q \'"version":2\' "$1/current/manifest.json"\n')
    after = f"sh {app} {home(device)}"
    fleet.offer("a")
    assert fleet.poll(device, "--after", after) == (0, "installed version 1")
    fleet.offer("b")
    code, said = fleet.poll(device, "--after", after)
    assert (code, current(device)) == (3, 1)
    assert "back to 000001-" in said
    log = (home(device) / "log").read_text().split()
    assert [line.split("/")[1][:6] for line in log] == ["000001", "000002", "000001"], "it ran again for the one before"
    assert fleet.poll(device)[1].startswith("nothing to do")
    link = home(device) / "current"
    assert subprocess.run([ORT, "-B", str(link / "trust.py"), *device.options, str(link)], capture_output=True, check=False).returncode == 0


def test_a_first_bundle_whose_command_fails_is_taken_off(fleet: Fleet) -> None:
    device = fleet.device()
    fleet.offer()
    assert fleet.poll(device, "--after", "false")[0] == 3
    assert not (home(device) / "current").exists()


def resigned(fleet: Fleet, number: int, **fields: Any) -> None:
    """The newest index with other fields, under a serial of its own, signed."""
    body = json.loads(fleet.lake.get(f"{LINE.folder}/index.json")) | {"serial": number, **fields}
    data = canonical(body)
    fleet.lake.replace(f"{LINE.folder}/index.json", data)
    fleet.lake.replace(f"{LINE.folder}/index-{number:06d}.sig", KEY.sign(data))


def offered(fleet: Fleet, **fields: Any) -> dict[str, Any]:
    return {**json.loads(fleet.lake.get(f"{LINE.folder}/index.json"))["bundle"], **fields}


def old_index(fleet: Fleet, device: Device) -> None:
    """A server that shows what it showed before."""
    before = fleet.lake.get(f"{LINE.folder}/index.json")
    fleet.offer("b")
    fleet.poll(device)
    fleet.lake.replace(f"{LINE.folder}/index.json", before)


def two_faces(fleet: Fleet, device: Device) -> None:
    """Two indexes of one serial."""
    fleet.poll(device)
    resigned(fleet, 1, halted="because")


def other_archive(fleet: Fleet, device: Device) -> None:
    path = f"{LINE.folder}/000001/bundle.tar.gz"
    data = fleet.lake.get(path)
    fleet.lake.replace(path, data[:-1] + bytes([data[-1] ^ 1]))


def other_bundle(fleet: Fleet, device: Device) -> None:
    """A good bundle, not the one that the index names."""
    sealed = bundle.seal(content(variant="fp32"), depot.Place(version=1, created="2026-02-01T00:00:00Z", expires="2998-01-01T00:00:00Z",
                                                              previous=None), KEY)  # fmt: skip
    fleet.lake.replace(f"{LINE.folder}/000001/bundle.tar.gz", sealed.archive)
    resigned(fleet, 2, bundle=offered(fleet, sha256=sha256(sealed.archive), bytes=len(sealed.archive)))


def unsigned(fleet: Fleet, device: Device) -> None:
    body = json.loads(fleet.lake.get(f"{LINE.folder}/index.json")) | {"open": 2}
    fleet.lake.replace(f"{LINE.folder}/index.json", canonical(body))


ATTACKS: dict[str, tuple[Callable[[Fleet, Device], None], str]] = {
    "an index that nobody signed": (unsigned, "signature"),
    "an older index": (old_index, "serial"),
    "two indexes of one serial": (two_faces, "serial"),
    "an expired index": (lambda f, d: resigned(f, 2, expires="2026-01-02T00:00:00Z", created="2026-01-01T00:00:00Z"), "expired"),
    "the index of another recipe": (lambda f, d: resigned(f, 2, recipe="cifar10"), "index"),
    "the index of another target": (lambda f, d: resigned(f, 2, target="thor"), "index"),
    "a manifest in place of an index": (lambda f, d: resigned(f, 2, kind=trust.BUNDLE), "schema"),
    "no index at all": (lambda f, d: f.lake.replace(f"{LINE.folder}/index.json", b"<html>"), "schema"),
    "an archive outside": (lambda f, d: resigned(f, 2, bundle=offered(f, archive="../../x")), "index"),
    "another archive": (other_archive, "digest"),
    "another good bundle": (other_bundle, "digest"),
    "an archive larger than it says": (lambda f, d: resigned(f, 2, bundle=offered(f, bytes=100)), "index"),
    "files larger than they say": (lambda f, d: resigned(f, 2, bundle=offered(f, unpacked=100)), "archive"),
    "a version that isn't the bundle's": (lambda f, d: resigned(f, 2, bundle=offered(f, version=7)), "index"),
}


@pytest.mark.parametrize("case", ATTACKS)
def test_attacks(case: str, fleet: Fleet) -> None:
    act, rule = ATTACKS[case]
    device = fleet.device()
    fleet.offer()
    act(fleet, device)
    before = current(device)
    code, said = fleet.poll(device)
    assert (code, said.split(":")[:2]) == (3, ["refused", f" {rule}"])
    assert current(device) == before


def test_not_reachable_is_no_refusal(fleet: Fleet) -> None:
    device = fleet.device()
    assert fleet.poll(device)[0] == 5
    assert fleet.poll(device, url="http://127.0.0.1:9/x")[0] == 5
    assert fleet.poll(device, url="ftp://127.0.0.1/x")[0] == 3


def test_one_at_a_time(fleet: Fleet) -> None:
    device = fleet.device()
    fleet.offer()
    home(device).mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool, (home(device) / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        polled = pool.submit(fleet.poll, device)
        with pytest.raises(TimeoutError):
            polled.result(timeout=1.5)
        assert current(device) == 0
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert polled.result(timeout=60) == (0, "installed version 1")


def test_a_power_cut_between_link_and_state_loses_nothing(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    device = fleet.device()
    fleet.offer("a")
    fleet.poll(device)
    before = state(device)
    fleet.offer("b")
    fleet.poll(device)
    trust.save_state(str(device.var), {"team": "vision", "recipe": "digits"}, {**before, "previous": state(device)["previous"]})
    assert fleet.poll(device) == (0, "installed version 2")
    assert fleet.poll(device, "--rollback")[0] == 0
    assert current(device) == 1


RINGS = [{"name": "canary", "devices": ["one"], "percent": 0}, {"name": "50%", "devices": [], "percent": 50.0}]


def test_a_share_of_devices_is_that_share_and_differs_by_bundle() -> None:
    names = [f"device-{i}" for i in range(2000)]
    inside = [{n for n in names if trust.inside(RINGS[1], n, salt)} for salt in ("a", "b")]
    assert all(900 < len(found) < 1100 for found in inside)
    assert 400 < len(inside[0] & inside[1]) < 600
    wider = {n for n in names if trust.inside({"devices": [], "percent": 80.0}, n, "a")}
    assert inside[0] < wider, "who was in stays in"
    assert trust.inside(RINGS[0], "one", "a")
    assert not trust.inside(RINGS[0], "two", "a")


def test_decide_is_pure() -> None:
    offer = {"version": 2, "manifest_sha256": "m"}
    body = {"bundle": offer, "halted": "", "rings": RINGS, "open": 1}
    empty = {"version": 1, "refused": {}}
    assert update.decide(body, empty, "one", False) == (True, "")
    assert not update.decide(body, {**empty, "version": 2}, "one", False)[0]
    assert not update.decide({**body, "halted": "x"}, empty, "one", False)[0]
    assert not update.decide(body, {**empty, "refused": {"m": "x"}}, "one", False)[0]
    assert update.decide(body, {**empty, "refused": {"m": "x"}}, "one", True)[0]
    assert not update.decide(body, empty, "two", False)[0]
