"""The line of versions, receipts that come back, rings that open by them, and the index that says so."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from unit.edge_parts import LINE, sealed, signer, stored

from forja.edge import bundle, depot, index, renewal, returns, rings, signing, simulate
from forja.edge.files import trust
from forja.edge.rings import Policy
from forja.errors import BadInput, Conflict, Damaged, Refused
from forja.lake import Lake
from forja.settings import Settings

KEY = signer()


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))


def test_versions_count_up_and_a_retry_gets_its_own(lake: Lake) -> None:
    first, second, again = (stored(lake, KEY, work) for work in ("a", "b", "a"))
    assert (first.version, second.version, again.version) == (1, 2, 1)
    assert again.digest == first.digest, "the very same bytes, hours later"
    assert first.manifest["previous"] is None
    assert second.manifest["previous"] == {"version": 1, "manifest_sha256": first.digest, "archive": "000001/bundle.tar.gz"}
    assert stored(lake, signer(), "a").version == 3, "another key is another bundle"
    assert stored(lake, KEY, "a", target="thor", variant="fp16").version == 1, "each target counts for itself"


def test_two_at_once_get_two_versions(lake: Lake) -> None:
    with ThreadPoolExecutor(8) as pool:
        places = list(pool.map(lambda i: depot.allocate(lake, LINE, f"work-{i}"), range(8)))
    assert sorted(p.version for p in places) == list(range(1, 9))


def test_what_devices_may_hold_is_never_replaced(lake: Lake) -> None:
    made = stored(lake, KEY)
    with pytest.raises(Conflict, match="holds something else"):
        depot.store(lake, LINE, made.version, sealed(signer()))
    assert depot.bundle(lake, LINE).digest == made.digest


def test_a_bundle_without_its_manifest_is_not_there(lake: Lake) -> None:
    stored(lake, KEY, "a")
    depot.allocate(lake, LINE, "b")  # and then the power went
    assert [b.version for b in depot.bundles(lake, LINE)] == [1]
    assert stored(lake, KEY, "c").manifest["previous"]["version"] == 1


def test_an_archive_of_another_bundle_is_not_given_out(lake: Lake) -> None:
    made = stored(lake, KEY)
    lake.replace(f"{made.folder}/bundle.tar.gz", sealed(KEY, version=7).archive)
    with pytest.raises(Damaged, match="not the one beside it"):
        depot.archive(lake, made)


@pytest.mark.parametrize(("version", "words"), [(9, "allowed: 1"), (None, "edge bundle digits thor")])
def test_bundles_that_are_not_there(version: int | None, words: str, lake: Lake) -> None:
    stored(lake, KEY)
    line = LINE if version else dataclasses.replace(LINE, target="thor")
    with pytest.raises(BadInput, match=words):
        depot.bundle(lake, line, version)


def test_renewal_gives_the_old_files_the_newest_place(lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = stored(lake, KEY, "a")
    stored(lake, KEY, "b")
    path, public, key_id = signing.create(tmp_path / "keys", Settings.from_env({"FORJA_LAKE": lake.root, "FORJA_STATE": str(tmp_path)}))
    monkeypatch.setenv("FORJA_EDGE_KEY", str(path))
    made = renewal.renew(lake, LINE, 1, 90)
    assert (made.version, made.manifest["key_id"], made.manifest["renews"]["version"]) == (3, key_id, 1)
    days = trust.seconds(made.manifest["expires"]) - trust.seconds(made.manifest["created"])
    assert days == 90 * 86400
    same = {n for n in old.manifest["files"] if old.manifest["files"][n] == made.manifest["files"][n]}
    assert set(old.manifest["files"]) - same == {"signer.pub.pem"}
    assert signing.verified(public.read_bytes(), lake.get(f"{made.folder}/manifest.json"), lake.get(f"{made.folder}/manifest.sig"))
    contents = simulate.opened(lake.get(f"{old.folder}/bundle.tar.gz"))
    lake.replace(f"{old.folder}/bundle.tar.gz", bundle.pack({**contents, "labels.txt": b"x"}, "x"))
    with pytest.raises(Damaged, match=r"labels\.txt"):
        renewal.renew(lake, LINE, 1, 90)


def test_a_manifest_of_another_version_is_damage(lake: Lake) -> None:
    made = stored(lake, KEY)
    lake.replace(f"{made.folder}/manifest.json", sealed(KEY, version=7).manifest)
    with pytest.raises(Damaged, match="version 7"):
        depot.bundle(lake, LINE)


def body(made: depot.Stored, device: str = "one", **changes: Any) -> dict[str, Any]:
    """A receipt as verify.py writes it."""
    found: dict[str, Any] = {
        "kind": returns.KIND, "schema": 1, "team": "vision", "recipe": "digits", "target": "cpu", "variant": "fp32",
        "bundle": {"version": made.version, "manifest_sha256": made.digest}, "device": {"id": device}, "simulated": False,
        "time": "2026-11-24T20:00:00Z", "outcome": "passed", "rule": "", "reason": "", "runtime": {"name": "onnxruntime", "version": "1"},
        "golden": {"samples": 6, "worst": 1e-7, "tolerance": 1e-3, "labels_checked": 6},
        "speed": {"protocol": "x", "runs": 200, "fps": 10.0, "p50_ms": 1.0, "p99_ms": 2.0}, "mac": None,
    }  # fmt: skip
    return {**found, **changes}


REFUSAL = {"outcome": "refused", "rule": "golden", "reason": "a probability differs", "golden": None, "speed": None, "runtime": None}


def receipt(made: depot.Stored, device: str = "one", key: str = "", **changes: Any) -> returns.Returned:
    found = body(made, device, **changes)
    if key:
        found["mac"] = returns.mac(found, key)
    return returns.parse(json.dumps(found).encode())


def less(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda b: b.pop(name)


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def act(b: dict[str, Any]) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            b = b[parent]
        b[name] = value

    return act


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a field missing": (less("speed"), "speed"),
    "a field more": (put("note", "x"), "note"),
    "another kind": (put("kind", "forja-edge-index"), "kind"),
    "a newer schema": (put("schema", 2), "schema"),
    "text for a flag": (put("simulated", "no"), "simulated"),
    "an outcome that is none": (put("outcome", "perhaps"), "outcome"),
    "refused without a rule": (put("outcome", "refused"), "rule"),
    "no manifest": (put("bundle.manifest_sha256", ""), "manifest_sha256"),
    "a device that is a path": (put("device.id", "../x"), "device.id"),
    "no time": (put("time", "yesterday"), "time"),
    "passed with an answer beyond its tolerance": (put("golden.worst", 0.5), "golden"),
    "passed without a sample": (put("golden.samples", 0), "golden"),
    "passed without a label": (put("golden.labels_checked", 0), "golden"),
    "passed without speed": (put("speed", None), "speed"),
    "passed with no runs": (put("speed.runs", 0), "speed"),
    "a median above the 99th percentile": (put("speed.p50_ms", 3.0), "speed"),
    "a speed below nothing": (put("speed.fps", -1), "fps"),
    "a number that is a flag": (put("speed.fps", True), "fps"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_receipts_that_are_none(case: str, lake: Lake) -> None:
    act, words = BROKEN[case]
    found = body(stored(lake, KEY))
    assert returns.parse(json.dumps(found).encode()).passed
    act(found)
    with pytest.raises(BadInput, match=words):
        returns.parse(json.dumps(found).encode())


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"a": NaN}', b"[" * 100_000, b"\xff", b" " * 70_000], ids=range(6))
def test_bytes_that_are_no_receipt(data: bytes) -> None:
    with pytest.raises(BadInput, match="receipt of a device"):
        returns.parse(data)


def test_a_receipt_that_is_too_large_is_not_read(lake: Lake) -> None:
    data = json.dumps(body(stored(lake, KEY))).encode()
    assert returns.parse(data + b" " * 1000).passed
    with pytest.raises(BadInput, match="size"):
        returns.parse(data + b" " * returns.MOST)


def test_a_receipt_is_stored_once(lake: Lake) -> None:
    made = stored(lake, KEY)
    path, new = returns.store(lake, made, receipt(made))
    assert new
    assert path.startswith("vision/digits/edge-receipts/cpu/"), "not in the folder that devices may read"
    assert returns.store(lake, made, receipt(made)) == (path, False)
    returns.store(lake, made, receipt(made, "two"))
    assert [r.device for r in returns.stored(lake, made)] == ["one", "two"]


STRANGE: dict[str, dict[str, Any]] = {
    "of a bundle that was not made here": {"bundle": {"version": 1, "manifest_sha256": "0" * 64}},
    "of another version": {"bundle": None},
    "of another target": {"target": "thor"},
    "of another team": {"team": "plant"},
    "with a tolerance of its own": {"golden": {"samples": 6, "worst": 0.1, "tolerance": 0.5, "labels_checked": 6}},
    "that passed and names no recipe": {"recipe": "", "team": "", "target": ""},
}


@pytest.mark.parametrize("case", STRANGE)
def test_receipts_that_contradict_the_lake(case: str, lake: Lake) -> None:
    made = stored(lake, KEY)
    changes = STRANGE[case]
    if case == "of another version":
        changes = {"bundle": {"version": 5, "manifest_sha256": made.digest}}
    assert returns.find(lake, [LINE], receipt(made)).version == 1
    with pytest.raises(Refused):
        returns.find(lake, [LINE], receipt(made, **changes))


def test_a_refusal_that_knows_nothing_but_the_manifest_is_found(lake: Lake) -> None:
    made = stored(lake, KEY)
    unknown = {**REFUSAL, "team": "", "recipe": "", "target": "", "bundle": {"version": 0, "manifest_sha256": made.digest}}
    assert returns.find(lake, [LINE], receipt(made, **unknown)).version == 1


PLANS: dict[str, tuple[list[str], list[float], Policy]] = {
    "no canary": ([], [100], Policy(good=1)),
    "a canary twice": (["a", "a"], [100], Policy(good=1)),
    "a name that is none": (["a b"], [100], Policy(good=1)),
    "shares that shrink": (["a"], [50, 10], Policy(good=1)),
    "a share twice": (["a"], [50, 50], Policy(good=1)),
    "a share of nothing": (["a"], [0, 50], Policy(good=1)),
    "more than all": (["a"], [101], Policy(good=1)),
    "more good receipts than canaries": (["a"], [100], Policy(good=2)),
    "no good receipt needed": (["a"], [100], Policy(good=0)),
    "less than no failure": (["a"], [100], Policy(good=1, most_failed=-1)),
}


@pytest.mark.parametrize("case", PLANS)
def test_rollouts_that_are_not_begun(case: str) -> None:
    with pytest.raises(BadInput):
        rings.plan(*PLANS[case])


Say = tuple[str, dict[str, Any]]
GOOD, BAD, SIMULATED = {}, REFUSAL, {"simulated": True}
STEPS: dict[str, tuple[list[Say], dict[str, Any], int, bool]] = {
    "nothing came back": ([], {}, 1, False),
    "one of two": ([("a", GOOD)], {}, 1, False),
    "one of two, twice": ([("a", GOOD), ("a", {"time": "2026-11-25T20:00:00Z"})], {}, 1, False),
    "two of two": ([("a", GOOD), ("b", GOOD)], {}, 2, False),
    "two, and one from outside": ([("a", GOOD), ("z", GOOD)], {}, 1, False),
    "two, one of them simulated": ([("a", GOOD), ("b", SIMULATED)], {}, 1, False),
    "one refused": ([("a", GOOD), ("b", GOOD), ("c", BAD)], {}, 1, True),
    "one refused, then passed": ([("a", GOOD), ("b", GOOD), ("c", BAD), ("c", GOOD)], {}, 1, True),
    "one refused, one may": ([("a", GOOD), ("b", GOOD), ("c", BAD)], {"most_failed": 1}, 2, False),
    "one that passed and refused": ([("a", GOOD), ("c", BAD), ("c", GOOD)], {"most_failed": 1}, 1, False),
    "one refused outside the rings": ([("a", GOOD), ("b", GOOD), ("z", BAD)], {}, 2, False),
    "a simulated refusal": ([("a", GOOD), ("b", GOOD), ("c", {**BAD, "simulated": True})], {}, 2, False),
    "no MAC where one is wanted": ([("a", GOOD), ("b", GOOD)], {"authentic": True}, 1, False),
}


@pytest.mark.parametrize("case", STEPS)
def test_steps(case: str, lake: Lake) -> None:
    said, policy, opened, halted = STEPS[case]
    made = stored(lake, KEY)
    # A share so small that none of these names falls into it.
    rollout = rings.plan(["a", "b", "c"], [1e-9, 100], Policy(good=2, **policy))
    counted = rings.count(rollout, made.digest, [receipt(made, device, **changes) for device, changes in said], {})
    after, why = rings.advance(rollout, counted)
    assert (after.open, bool(after.halted)) == (opened, halted), why
    assert rings.from_json(json.loads(json.dumps(rings.to_json(after)))) == after


def test_only_receipts_with_a_mac_count_where_they_must(lake: Lake) -> None:
    made = stored(lake, KEY)
    rollout = rings.plan(["a", "b"], [100], Policy(good=1, authentic=True))
    found = [receipt(made, "a", "secret"), receipt(made, "b", "guess", **REFUSAL), receipt(made, "b", **REFUSAL)]
    counted = rings.count(rollout, made.digest, found, {"a": "secret", "b": "other"})
    assert (counted.passed, counted.failed) == (("a",), ()), "a forged refusal stops nothing"
    assert counted.ignored == ("b: no MAC that fits its key",)


def test_each_ring_earns_the_next_itself(lake: Lake) -> None:
    made = stored(lake, KEY)
    rollout = rings.plan(["a", "b"], [100, ], Policy(good=2))  # fmt: skip
    rollout = dataclasses.replace(rollout, rings=(*rollout.rings, rings.Ring(name="last", devices=("x",))), open=2)
    counted = rings.count(rollout, made.digest, [receipt(made, d) for d in ("a", "b", "c")], {})
    assert counted.passed == ("c",), "a and b were counted for the canaries"
    assert rings.advance(rollout, counted)[0].open == 2


def test_receipts_of_another_bundle_count_for_nothing(lake: Lake) -> None:
    first, second = stored(lake, KEY, "a"), stored(lake, KEY, "b")
    rollout = rings.plan(["a"], [100], Policy(good=1))
    counted = rings.count(rollout, second.digest, [receipt(first, "a")], {})
    assert (counted.passed, counted.ignored) == ((), ("a: of another bundle",))


def test_the_index_goes_through_its_rings(lake: Lake) -> None:
    made = stored(lake, KEY)
    index.publish(lake, KEY, made, rings.plan(["a"], [50, 100], Policy(good=1)))
    first = index.look(lake, KEY, LINE, {})
    assert (first.changed, first.index.serial, first.why) == (False, 1, "canary waits: 0 of 1 good receipts")
    returns.store(lake, made, receipt(made, "a"))
    seen = index.look(lake, None, LINE, {})
    assert (seen.changed, seen.index.serial, seen.rollout.open) == (False, 1, 2), "a look without a key writes nothing"
    second = index.look(lake, KEY, LINE, {})
    assert (second.changed, second.index.serial, second.rollout.open) == (True, 2, 2)
    shown = lake.get(f"{LINE.folder}/index.json")
    assert json.loads(shown)["serial"] == 2
    assert signing.verified(KEY.public_pem, shown, lake.get(f"{LINE.folder}/index-000002.sig"))
    inside = next(n for n in (f"d{i}" for i in range(99)) if trust.inside({"devices": [], "percent": 50}, n, made.digest))
    returns.store(lake, made, receipt(made, inside, **REFUSAL))
    third = index.look(lake, KEY, LINE, {})
    assert third.rollout.halted == f"refused by 1 ({inside}), allowed: 0"
    assert not index.look(lake, KEY, LINE, {}).changed, "halted stays halted"


def test_an_index_is_renewed_before_it_expires(lake: Lake) -> None:
    now = datetime.datetime(2026, 11, 24, tzinfo=datetime.UTC)
    index.publish(lake, KEY, stored(lake, KEY), rings.plan(["a"], [100], Policy(good=1)), now=now)
    days = {day: index.look(lake, KEY, LINE, {}, now=now + datetime.timedelta(days=day)).changed for day in (0, 14, 16, 17)}
    assert days == {0: False, 14: False, 16: True, 17: False}


def test_an_older_bundle_is_not_published(lake: Lake) -> None:
    old, new = stored(lake, KEY, "a"), stored(lake, KEY, "b")
    plan = rings.plan(["a"], [100], Policy(good=1))
    index.publish(lake, KEY, new, plan)
    with pytest.raises(BadInput, match="--renew 1"):
        index.publish(lake, KEY, old, plan)
    assert index.publish(lake, KEY, new, plan).serial == 2


def test_publishing_at_once_gives_each_a_serial_and_shows_the_newest(lake: Lake) -> None:
    made, plan = stored(lake, KEY), rings.plan(["a"], [100], Policy(good=1))
    with ThreadPoolExecutor(6) as pool:
        serials = list(pool.map(lambda _: index.publish(lake, KEY, made, plan).serial, range(6)))
    assert sorted(serials) == list(range(1, 7))
    assert json.loads(lake.get(f"{LINE.folder}/index.json"))["serial"] == 6


def test_a_late_writer_shows_the_newest_too(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    made, plan = stored(lake, KEY), rings.plan(["a"], [100], Policy(good=1))
    replace = lake.replace

    def late(path: str, data: bytes) -> None:
        monkeypatch.setattr(lake, "replace", replace)
        index.publish(lake, KEY, made, plan)  # somebody else, between our signature and our index.json
        replace(path, data)

    monkeypatch.setattr(lake, "replace", late)
    assert index.publish(lake, KEY, made, plan).serial == 1
    assert json.loads(lake.get(f"{LINE.folder}/index.json"))["serial"] == 2


def test_an_index_without_its_signature_is_not_there(lake: Lake) -> None:
    made, plan = stored(lake, KEY), rings.plan(["a"], [100], Policy(good=1))
    index.publish(lake, KEY, made, plan)
    lake.create(f"{LINE.folder}/index-000002.json", b"{}")  # and then the power went
    found = index.read(lake, LINE)
    assert found is not None
    assert found.serial == 1
    assert index.publish(lake, KEY, made, plan).serial == 3, "a serial is never given twice"
