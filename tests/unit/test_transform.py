"""transform: what is rejected and why, the split, shards; with DALI and Polars as they are."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from PIL import Image

from forja import client, decoder, loading, receipts, recipes, shards, tables
from forja.errors import BadInput, Unavailable
from forja.lake import Lake, sha256, table_digest
from forja.recipes.base import Column, Images, Recipe, Split, Table
from forja.settings import Settings
from forja.stages import harness, ingest, train, transform
from forja.stages.base import Outcome, Work

pytestmark = pytest.mark.ml

DIGITS, AI4I = recipes.load("digits"), recipes.load("ai4i")


def png(value: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    pixels = (np.arange(size * size, dtype=np.uint64).reshape(size, size) * 3 + value).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def jpeg(size: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)).save(buffer, format="JPEG")
    return buffer.getvalue()


def event(key: str, payload: bytes, label: str = "1", error: str | None = None, offset: int = 0) -> dict[str, Any]:
    return {
        "key": key, "label": label, "payload": payload, "sha256": sha256(payload), "error": error, "topic_id": "t", "partition": 0,
        "offset": offset, "time": 1_700_000_000_000_000 + offset,
    }  # fmt: skip


def make(tmp_path: Path, recipe: Recipe, rows: list[dict[str, Any]]) -> tuple[Outcome, Work]:
    """Write a raw table and transform it."""
    lake = Lake(str(tmp_path / "lake"))
    path = ingest.table_path(recipe.team, recipe.name)
    table = ingest.open_table(lake, path)
    ingest.commit(table, pa.Table.from_pylist(rows, schema=pa.schema(ingest.schema())), {"t-0": len(rows)}, {"t-0": None})
    prepared = harness.prepare(lake, "transform", recipe, {"raw": [f"{path}@1"]})
    settings = Settings.from_env({"FORJA_LAKE": lake.root, "FORJA_STATE": str(tmp_path)})
    work = Work(settings=settings, lake=lake, folder=prepared.folder, key=prepared.key, scratch=tmp_path, check=lambda: None)
    return transform.run(prepared.plan, work), work


def digits(count: int) -> list[dict[str, Any]]:
    return [event(f"d-{i}", png(i), str(i % 10), offset=i) for i in range(count)]


def test_good_and_bad_images(tmp_path: Path) -> None:
    bad = {
        "half a PNG": png(1, 32)[:60], "no end": png(2)[:-4], "a flipped byte": png(3)[:45] + b"\0\0" + png(3)[47:],
        "text after the magic": b"\x89PNG\r\n\x1a\n hello", "half a JPEG": jpeg(64)[:900], "JPEG without end": jpeg(64)[:-2],
    }  # fmt: skip
    rows = digits(120)
    rows += [event(f"bad-{name}", payload, offset=500 + i) for i, (name, payload) in enumerate(bad.items())]
    rows += [event("big", png(7, 40)), event("colour", jpeg(24))]
    rows += [event("x", b"hello", error="neither PNG nor JPEG"), event("y", png(200), label="eleven")]
    outcome, _ = make(tmp_path, DIGITS, rows)
    assert outcome.facts["rejected"] == {
        "image doesn't decode": len(bad), "ingest: neither PNG nor JPEG": 1, "label not in classes": 1,
    }  # fmt: skip
    assert sum(s["rows"] for s in outcome.facts["splits"].values()) == 120 + 2


def test_newest_event_of_a_key_counts_and_each_content_once(tmp_path: Path) -> None:
    rows = digits(60)
    rows += [
        event("d-0", png(100), "7", offset=900), event("twin", png(1), "1", offset=901),
        event("p", png(101), "3", offset=902), event("q", png(101), "4", offset=903),
    ]  # fmt: skip
    outcome, _ = make(tmp_path, DIGITS, rows)
    assert outcome.facts["rejected"] == {
        "superseded by a newer event of its key": 1, "duplicate content": 1, "equal content under different labels": 2,
    }  # fmt: skip


def test_rerun_gives_the_same_bytes(tmp_path: Path) -> None:
    first, _ = make(tmp_path / "a", DIGITS, digits(80))
    again, _ = make(tmp_path / "b", DIGITS, list(reversed(digits(80))))
    assert {n: o.sha256 for n, o in first.outputs.items()} == {n: o.sha256 for n, o in again.outputs.items()}


def test_nothing_left_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"train split of digits.*label not in classes': 5"):
        make(tmp_path, DIGITS, [event(f"k{i}", png(i), "nine") for i in range(5)])


def test_arrays_are_the_samples_in_order(tmp_path: Path) -> None:
    outcome, work = make(tmp_path, DIGITS, digits(150))
    dataset = dataclasses.replace(_receipt(outcome))
    got = loading.arrays(work, dataset, DIGITS.dataset, "train")
    assert got.inputs.shape == (len(got.labels), 1, 8, 8)
    for key, label, image in zip(got.keys, got.labels, got.inputs, strict=True):
        number = int(key.removeprefix("d-"))
        assert label == number % 10
        np.testing.assert_array_equal(image[0], np.asarray(Image.open(io.BytesIO(png(number)))))


def _receipt(outcome: Outcome) -> receipts.Receipt:
    return receipts.Receipt(
        stage="transform", recipe="digits", team="vision", key="", code="", command="", inputs={}, outputs=outcome.outputs, metrics={},
        facts={}, report=[], versions={}, started="", finished="", seconds=0,
    )  # fmt: skip


ROW = {
    "Type": "L", "Air temperature [K]": 300, "Process temperature [K]": 310.5, "Rotational speed [rpm]": 1500, "Torque [Nm]": 40,
    "Tool wear [min]": 5,
}  # fmt: skip
ROWS = {
    "good": (ROW, None),
    "more columns than declared": ({**ROW, "Product ID": "M1"}, None),
    "a column is missing": ({k: v for k, v in ROW.items() if k != "Torque [Nm]"}, "Torque [Nm]: missing or of another type"),
    "a word for a number": ({**ROW, "Torque [Nm]": "high"}, "Torque [Nm]: missing or of another type"),
    "null": ({**ROW, "Type": None}, "Type: missing or of another type"),
    "out of range": ({**ROW, "Air temperature [K]": 25}, "Air temperature [K]: not from 250 to 350"),
    "a number for a category": ({**ROW, "Type": 1}, "Type: missing or of another type"),
    "true for a number": ({**ROW, "Torque [Nm]": True}, "Torque [Nm]: missing or of another type"),
    "a list for a number": ({**ROW, "Torque [Nm]": [40]}, "Torque [Nm]: missing or of another type"),
    "half a surrogate pair": ({**ROW, "Type": "\ud800"}, "Type: not one of L, M, H"),
    "NaN": ({**ROW, "Torque [Nm]": float("nan")}, "Type: missing or of another type"),
    "a number of 400 digits": ({**ROW, "Torque [Nm]": 10**400}, "Type: missing or of another type"),
    "an unknown category": ({**ROW, "Type": "Z"}, "Type: not one of L, M, H"),
}


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows_are_checked(case: str) -> None:
    row, problem = ROWS[case]
    assert isinstance(AI4I.dataset, Table)
    payloads = [json.dumps(ROW).encode(), json.dumps(row, indent=1).encode(), json.dumps(ROW).encode()]
    frame = tables.features(tables.parse(payloads, AI4I.dataset), AI4I.dataset)
    assert frame["problem"].to_list() == [None, problem, None]


@pytest.mark.parametrize(
    "payload", [b"", b" ", b"{}\n{}", b"[1]", b"\xff", b"\xef\xbb\xbf{}", b'{"x":' + b"[" * 100_000], ids=lambda p: repr(p[:9])
)
def test_any_bytes_are_one_row(payload: bytes) -> None:
    """Rows that are in raw tables already must not stop transform, and must not shift the others."""
    assert isinstance(AI4I.dataset, Table)
    good = json.dumps(ROW).encode()
    frame = tables.features(tables.parse([good, payload, good], AI4I.dataset), AI4I.dataset)
    assert frame["problem"].to_list() == [None, "Type: missing or of another type", None]


def readings(positives: set[str], count: int = 200) -> list[dict[str, Any]]:
    """Rows of ai4i; those on the sides ``positives`` have failures among them."""

    def label(key: str, i: int) -> str:
        return str(int(transform.side(transform.position(key), AI4I.dataset.split) in positives and i % 2))

    return [
        event(f"r-{i}", json.dumps({**ROW, "Rotational speed [rpm]": 1000 + i}).encode(), label(f"r-{i}", i), offset=i)
        for i in range(count)
    ]


@pytest.mark.parametrize("missing", ["train", "validation", "test"])
def test_a_split_that_no_metric_can_use_is_refused(missing: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"each class in the {missing} split of ai4i: got {{'0': \d+, '1': 0}}"):
        make(tmp_path, AI4I, readings({"train", "validation", "test"} - {missing}))


def test_rows_become_a_dataset(tmp_path: Path) -> None:
    rows = [*readings({"train", "validation", "test"}), event("bad", b'{"x": NaN}', "0"), event("worse", b"[" * 100_000, "0")]
    outcome, _ = make(tmp_path, AI4I, rows)
    assert outcome.facts["rejected"] == {"Type: missing or of another type": 2}


def test_counts_of_classes_follow_the_models_outputs_not_their_names(tmp_path: Path) -> None:
    """What weighs rare classes in the loss: as a file, the statistics have the names in another order than the recipe."""
    recipe = dataclasses.replace(DIGITS, dataset=dataclasses.replace(DIGITS.dataset, classes=tuple("9876543210")))
    outcome, work = make(tmp_path, recipe, digits(45))
    statistics = json.loads(work.lake.get(outcome.outputs["statistics.json"].path))
    counts = train.class_counts(statistics, recipe.dataset.classes)
    wanted = [statistics["splits"]["train"]["classes"][name] for name in "9876543210"]
    assert counts == wanted
    assert counts != list(statistics["splits"]["train"]["classes"].values())


def test_accuracy_needs_no_class_in_every_split(tmp_path: Path) -> None:
    rows = [r for r in digits(120) if r["label"] != "3" or transform.side(transform.position(r["key"]), DIGITS.dataset.split) == "train"]
    outcome, _ = make(tmp_path, DIGITS, rows)
    assert outcome.facts["splits"]["test"]["classes"]["3"] == 0
    with pytest.raises(BadInput, match=r"train split of digits.*two classes or more"):
        make(tmp_path / "one", DIGITS, [{**r, "label": "3"} for r in rows])


ORDERS = {
    "the same in another order": (lambda rows: rows[::-1], True),
    "other times and offsets, the same newest": (
        lambda rows: [{**r, "offset": r["offset"] * 2 + 5, "time": r["time"] + 9} for r in rows],
        True,
    ),
    "another one is the newest": (lambda rows: [{**r, "offset": 99 - r["offset"], "time": 0} for r in rows], False),
    "another partition is the later one": (lambda rows: [{**r, "time": 0, "partition": int(r["label"] == "1")} for r in rows], False),
    "another order of bad ones": (lambda rows: [{**r, "time": 0} if r["error"] else r for r in rows], True),
}


@pytest.mark.parametrize("case", ORDERS, ids=str)
def test_table_digest_tells_what_transform_sees(case: str, tmp_path: Path) -> None:
    """Equal digests must mean equal datasets: the newest event of a key is decided by time, partition and offset."""
    rows = [event("k", png(1), "1", offset=1), event("k", png(2), "2", offset=2), event("j", png(3), "3", offset=3)]
    rows += [event("", png(i), "1", "no key", offset=i) for i in (4, 5)]
    change, same = ORDERS[case]
    digests = []
    for name, found in (("a", rows), ("b", change(rows))):
        lake = Lake(str(tmp_path / name))
        ingest.commit(
            ingest.open_table(lake, "t/raw"), pa.Table.from_pylist(found, schema=pa.schema(ingest.schema())), {"t": 1}, {"t": None}
        )
        digests.append(table_digest(lake, "t/raw@1"))
    assert (digests[0] == digests[1]) == same


def test_features_are_what_they_say() -> None:
    assert isinstance(AI4I.dataset, Table)
    frame = tables.features(tables.parse([json.dumps(ROW).encode()], AI4I.dataset), AI4I.dataset)
    got = dict(zip(AI4I.dataset.features, frame.select(AI4I.dataset.features).row(0), strict=True))
    assert (got["Type=L"], got["Type=M"], got["Temperature rise [K]"]) == (1, 0, 10.5)
    assert got["Power [W]"] == pytest.approx(40 * 1500 * 2 * np.pi / 60, rel=1e-6)
    assert got["Strain [Nm min]"] == 200


def test_a_derived_feature_without_a_number_is_a_problem() -> None:
    table = Table(columns=(Column(name="a", low=0, high=9),), classes=("0", "1"), derived=(tables_ratio(),))
    frame = tables.features(tables.parse([b'{"a": 0}', b'{"a": 2}'], table), table)
    assert frame["problem"].to_list() == ["r: no finite number", None]


def tables_ratio() -> Any:
    from forja.recipes.base import Derived

    return Derived(name="r", sql='1.0 / "a"')


def test_folds_are_a_partition_and_growth_moves_nothing() -> None:
    keys = [f"k{i}" for i in range(5000)]
    positions = [transform.position(k) for k in keys]
    assert all(0 <= p < 1 for p in positions)
    tests = Counter(
        k for fold in range(5) for k, p in zip(keys, positions, strict=True) if transform.side(p, Split(rotate=fold / 5)) == "test"
    )
    assert set(tests) == set(keys)
    assert set(tests.values()) == {1}
    shares = Counter(transform.side(p, Split(validation=0.1, test=0.2)) for p in positions)
    assert abs(shares["test"] / 5000 - 0.2) < 0.02
    assert abs(shares["validation"] / 5000 - 0.1) < 0.02


def test_shard_index_points_at_the_payloads() -> None:
    samples = [(b"a" * 5, 3), (b"b" * 600, 1)]
    tar, index = shards.pack(samples, "img")
    version, *lines = index.decode().splitlines()
    assert version == "v1.2 2"
    for line, (payload, label) in zip(lines, samples, strict=True):
        name, start, size, _, cls, at, four, _ = line.split()
        assert (name, cls, tar[int(start) : int(start) + int(size)]) == ("img", "cls", payload)
        assert struct.unpack("<i", tar[int(at) : int(at) + int(four)]) == (label,)


def test_polars_runs_on_the_cpu_without_a_driver() -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a GPU")
    assert tables.engine() == "streaming"
    assert pl.LazyFrame({"a": [1]}).collect(engine=tables.engine()).height == 1


def test_images_are_resized_to_the_models_input() -> None:
    dataset = Images(height=4, width=6, channels=3, classes=("a", "b"))
    (image,) = loading.decode([jpeg(32)], dataset)
    assert image is not None
    assert image.shape == (3, 4, 6)
    assert image.dtype == np.float32


CRASHING = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQNDAsLDBkSEw8UHRofHh0aHBwgJC4nICIsIxwcKDcpLDAxNDQ0H8c5PTgyPC4zNDL/"
    "wAALCAAIAAgBAREAOMQAHwAAAQUBAQEBAQEAAAAAAAAAAAECAwQFBgcICQoL/8QAtRAAAgEDAwIEAwUFBAQAAAF9AQIDAAQRGRIhMUEGE1FhByJxFDKBkaEI"
    "I0KxwRVS0fAkM2JyggkKFhcYGRolJicoKSo0NTY3ODk6Q0RFRkdISUpTVFVWV1hZWmNkZWZnaGlqc3R1dnd4eXqDhIWGh4iJipKTlJWWl5iZmqKjpKWmp6ip"
    "qrKztLW2t7i5usLDxMXGx8jJytLT1NXW19jZ2uHi4+Tl5ufo6erx8vP09fb3+Pn6/9oACAEBAAA/AEbX7dNKK6mo+0RmMmS23LcyqvzuFVXXyyHikLMMKqlA"
    "P7tf/9k="
)
"""A JPEG of 8x8 pixels with a marker that is none: Pillow reads past it, DALI's parser crashes its process, but only in company."""


@pytest.mark.parametrize("where", [0, 5, 64])
def test_an_image_that_crashes_dali_is_one_that_does_not_decode(where: int) -> None:
    assert isinstance(DIGITS.dataset, Images)
    assert decoder.complete(CRASHING)
    assert decoder.readable(CRASHING)
    payloads = [png(i) for i in range(100)]
    payloads.insert(where, CRASHING)
    images = list(loading.decode(payloads, DIGITS.dataset))
    assert [i for i, image in enumerate(images) if image is None] == [where]
    np.testing.assert_array_equal(images[-1][0], np.asarray(Image.open(io.BytesIO(png(99)))))


def test_clients_survive_it_too() -> None:
    items = [client.Item(name=f"{i}.png", payload=png(i)) for i in range(40)]
    assert client.inputs(DIGITS, items).shape == (40, 1, 8, 8)
    with pytest.raises(BadInput, match=r"image bad\.jpg doesn't decode"):
        client.inputs(DIGITS, [*items, client.Item(name="bad.jpg", payload=CRASHING)])


class Brittle(decoder.Decoder):
    """Ends in a way of its own, as the real process does, when it sees a certain image."""

    def __init__(self, script: str) -> None:
        super().__init__((1, 8, 8))
        self.script = script

    def ask(self, payloads: Sequence[bytes]) -> Any:
        command = [sys.executable, "-c", f"import os, signal, sys; sys.stdin.buffer.read(8); {self.script}"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return super().ask(payloads)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS"])
def test_a_crash_is_blamed_on_the_images(name: str) -> None:
    assert Brittle(f"os.kill(os.getpid(), signal.{name})").ask([b"x"]) is None


@pytest.mark.parametrize("script", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(1)"], ids=["killed", "a module is missing"])
def test_another_end_is_not(script: str) -> None:
    """Else lack of memory would silently drop good images from a dataset."""
    with pytest.raises(Unavailable, match="process that decodes images ended"):
        Brittle(script).ask([b"x" * 200_000])


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def test_no_process_is_left_behind() -> None:
    assert isinstance(DIGITS.dataset, Images)
    before = children()
    images = loading.decode([png(i) for i in range(200)], DIGITS.dataset)
    next(images)
    assert len(children()) == len(before) + 1
    images.close()  # type: ignore[attr-defined]
    list(loading.decode([png(1), CRASHING], DIGITS.dataset))
    assert children() == before
