"""What comes from outside (CSV rows, JSON, Kafka records, files of clients), in its nastiest forms: a value or a named problem."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from forja import client, recipes, samples, tables
from forja.errors import BadInput
from forja.stages import ingest

AI4I, DIGITS = recipes.load("ai4i"), recipes.load("digits")
RANGE, NONE = "JSON, but a number is not finite", "no JSON"
OBJECTS = {
    "good": (b' {"a": 1, "b": "\xc3\xa9"}\n', None),
    "a large number": (b'{"a": 1e308}', None),
    "list": (b"[1]", "JSON, but no object"),
    "null": (b"null", "JSON, but no object"),
    "text": (b"hello", NONE),
    "empty": (b"", NONE),
    "white space": (b" \n", NONE),
    "two objects": (b'{"a": 1}\n{"a": 2}', NONE),
    "cut": (b'{"a": 1', NONE),
    "NUL behind": (b'{"a": 1}\0', NONE),
    "not UTF-8": (b'{"a": "\xff"}', NONE),
    "byte order mark": (b'\xef\xbb\xbf{"a": 1}', NONE),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), NONE),
    "NaN": (b'{"a": NaN}', RANGE),
    "Infinity": (b'{"a": -Infinity}', RANGE),
    "1e999": (b'{"a": 1e999}', RANGE),
    "400 digits": (b'{"a": ' + b"1" * 400 + b"}", RANGE),
    "5000 digits": (b'{"a": ' + b"1" * 5000 + b"}", RANGE),
    "2,000 lists in each other": (b'{"a": ' + b"[" * 2000 + b"]" * 2000 + b"}", "JSON, but nested too deeply"),
    "200,000 objects in each other": (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "JSON, but nested too deeply"),
}


@pytest.mark.parametrize("case", OBJECTS, ids=str)
def test_json_from_outside(case: str) -> None:
    payload, problem = OBJECTS[case]
    value, found = tables.json_object(payload)
    assert found == problem
    assert bool(value) == (problem is None)
    assert ingest.problem("k", "1", payload, AI4I.source) == ("no value" if not payload else problem)


def record(**changes: object) -> SimpleNamespace:
    good = {"key": b"k", "value": b'{"a": 1}', "headers": [("label", b"1")], "partition": 0, "offset": 7, "timestamp": 1_700_000_000_000}
    return SimpleNamespace(**{**good, **changes})


RECORDS = {
    "good": ({}, ("k", "1", None)),
    "no headers": ({"headers": None}, ("k", None, "no header label")),
    "no label": ({"headers": [("label", None)]}, ("k", None, "no header label")),
    "no key": ({"key": None}, ("", "1", "no key")),
    "a binary key": ({"key": b"\xff\x00"}, ("\\xff\x00", "1", "key is no UTF-8")),
    "a binary label": ({"headers": [("label", b"\xfe")]}, ("k", "\\xfe", "label is no UTF-8")),
    "no value": ({"value": None}, ("k", "1", "no value")),
    "no time": ({"timestamp": None}, ("k", "1", None)),
    "a time before 1970": ({"timestamp": -1}, ("k", "1", None)),
    "a time after the sun's": ({"timestamp": 2**63 - 1}, ("k", "1", None)),
}


@pytest.mark.parametrize("case", RECORDS, ids=str)
def test_every_record_gives_a_row(case: str) -> None:
    changes, expected = RECORDS[case]
    (row,) = ingest.to_rows([record(**changes)], AI4I.source, "t").to_pylist()
    assert (row["key"], row["label"], row["error"]) == expected
    assert 1970 <= row["time"].year <= 9999


def test_two_binary_keys_stay_two() -> None:
    rows = ingest.to_rows([record(key=b"\xfe"), record(key=b"\xff")], AI4I.source, "t").to_pylist()
    assert rows[0]["key"] != rows[1]["key"]


CELLS = {
    "7": 7, "-7": -7, "+7": 7, "007": 7, " 7 ": 7, "1.5": 1.5, ".5": 0.5, "1e3": 1000.0, "": "", "L": "L", "nan": "nan", "inf": "inf",
    "-Infinity": "-Infinity", "1e999": "1e999", "9" * 400: "9" * 400, "9" * 5000: "9" * 5000, "1_000": "1_000", "٣": "٣", "0x10": "0x10",
}  # fmt: skip


@pytest.mark.parametrize("text", CELLS, ids=lambda t: t[:9] or "blank")
def test_cells_are_finite_numbers_or_text(text: str) -> None:
    found = samples.number(text)
    assert (found, type(found)) == (CELLS[text], type(CELLS[text]))
    assert isinstance(found, str) or math.isfinite(found)


HEADER = (
    "UDI,Product ID,Type,Air temperature [K],Process temperature [K],Rotational speed [rpm],Torque [Nm],Tool wear [min],Machine failure\n"
)
ROW = "1,M14860,M,298.1,308.6,1551,42.8,0,0\n"
FILES = {
    "a cut last line": ((HEADER + ROW + "2,L47181,L,298").encode(), r"line 3: got '4 fields'; allowed: 9"),
    "a cell too many": ((HEADER + ROW[:-1] + ",9\n").encode(), r"line 2: got '10 fields'"),
    "Latin-1": ((HEADER + ROW).encode() + "2,Mü".encode("latin-1"), r"line 3: got b'\\xfc'; allowed: UTF-8"),
    "UTF-16": ((HEADER + ROW).encode("utf-16"), r"line 1.*UTF-8"),
    "a field over 128 KiB": ((HEADER + "1," + "x" * 200_000 + ",L\n").encode(), r"line 2.*field larger than field limit"),
    "a quote that never ends": ((HEADER + ROW + '2,"M').encode(), r"line 3.*unexpected end of data"),
    "semicolons": ((HEADER + ROW).replace(",", ";").encode(), r"columns of .*UDI;Product.*each once"),
    "a column twice": (HEADER.replace("Product ID", "Type").encode(), r"columns of .*each once.*correct \['Type'\]"),
    "empty": (b"", r"columns of "),
}


@pytest.mark.parametrize("case", FILES, ids=str)
def test_csv_files_are_refused_with_their_line(case: str, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(FILES[case][0])
    with pytest.raises(BadInput, match=FILES[case][1]):
        list(samples.samples(AI4I, path))
    with pytest.raises(BadInput, match=FILES[case][1]):
        client.read(AI4I, path)


def test_good_csv_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"\xef\xbb\xbf" + (HEADER + ROW + "\n" + ROW.replace("1,M14860", '2,"M,\n""x"""')).replace("\n", "\r\n").encode())
    first, second = samples.samples(AI4I, path)
    assert (first.key, first.label, second.key) == ("1", "0", "2")
    assert json.loads(first.payload)["Torque [Nm]"] == 42.8
    assert json.loads(second.payload)["Product ID"] == 'M,\r\n"x"'
    assert [i.name for i in client.read(AI4I, path)] == [f"{path}:2", f"{path}:5"]


@pytest.mark.parametrize("key", ["", " "])
def test_a_blank_key_is_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(HEADER + ROW + key + ROW[1:])
    with pytest.raises(BadInput, match=r"line 3: column UDI"):
        list(samples.samples(AI4I, path))


def test_the_header_is_checked_before_the_first_row_is_asked_for(tmp_path: Path) -> None:
    """So that no topic is created for a file that can't be sent."""
    path = tmp_path / "data.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match="columns of"):
        samples.samples(AI4I, path)


def test_categories_of_a_csv_stay_text(tmp_path: Path) -> None:
    assert samples.cells({"a": "007", "b": "007"}, ["a"]) == {"a": "007", "b": 7}


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1/a.png", b"x" * 1000)


BROKEN = {
    "no zip": ("x.zip", lambda p: p.write_bytes(b"hello")),
    "a zip with other bytes": ("x.zip", lambda p: (zipped(p), p.write_bytes(p.read_bytes().replace(b"xxx", b"yyy")))),
    "a folder with nothing": ("x", lambda p: p.mkdir()),
    "a link to nowhere": ("x", lambda p: (p.mkdir(), (p / "a.png").symlink_to("nowhere"))),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_files_of_clients_are_refused(case: str, tmp_path: Path) -> None:
    name, make = BROKEN[case]
    make(tmp_path / name)
    with pytest.raises(BadInput, match=r"can't be read|one sample or more"):
        client.read(DIGITS, tmp_path / name)


@pytest.mark.parametrize("content", [b"{", b'{"a": NaN}', b"[" * 100_000, b"\xff"], ids=["cut", "NaN", "deep", "bytes"])
def test_json_files_of_clients_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="JSON"):
        client.read(AI4I, path)
