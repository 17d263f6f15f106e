"""The report of a run: everything is in it, nothing runs in it, and what wasn't measured says so."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from forja.gates import Measured, decide
from forja.paired import Drop
from forja.recipes.base import Gate
from forja.report import facts, page

pytestmark = pytest.mark.ml

EVIL = "<script>alert(1)</script>"


def known(**more: Any) -> facts.Facts:
    """What a small run is known for."""
    measured = {
        "fp32": Measured(metrics={"accuracy": 0.9, "nonfinite": 0.0}, drops={"accuracy": Drop(value=0, low=0, high=0)}),
        "int8": Measured(metrics={"nonfinite": 3.0}, precision="fail", precision_reason=EVIL),
    }
    decision = decide(
        (Gate(metric="accuracy", max_drop=0.01), Gate(metric="p99_ms", most=5, unmeasured="pass")), tuple(measured), measured, "fp32"
    )
    return facts.Facts(**{
        "recipe": "digits", "description": "model version 3", "chosen": decision.chosen, "reason": decision.reason,
        "dataset": {
            "splits": {"train": {"rows": 30, "classes": {"cat": 10, EVIL: 20}}, "test": {"rows": 0, "classes": {"cat": 0, EVIL: 0}}},
            "rejected": {"image doesn't decode": 2},
        },
        "curves": (facts.Curve(name="train_loss", points=((1, 1.5), (2, 0.5), (3, 0.25))), facts.Curve(name="flat", points=((1, 2.0),))),
        "classes": ("cat", EVIL), "confusion": ((4, 1), (0, 5)), "shown": "fp32",
        "variants": {"fp32": {"accuracy": 0.9, "p99_ms": None}, "int8": {"nonfinite": 3.0, "p99_ms": 1.0}},
        "verdicts": tuple(dataclasses.asdict(v) for v in decision.verdicts), "stages": (("train", 12.5), ("register", 0.0)),
        "test": {"test_accuracy": 0.875}, "notes": (EVIL,), **more,
    })  # fmt: skip


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.cells.append(data.strip())


def test_all_is_inside_and_nothing_runs() -> None:
    text = page.html(known()).decode()
    read = Reader(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(read.tags)
    assert not [a for a in read.attributes if a[0] in ("src", "href") or a[0].startswith("on")]
    assert "url(" not in text
    assert EVIL not in text
    assert text.count("&lt;script&gt;") >= 4


def test_it_tells_what_was_decided_and_what_nobody_measured() -> None:
    read = Reader(page.html(known()).decode())
    cells = read.cells
    assert "fp32 may go live." in cells
    assert "0.8750" in cells
    assert cells.count("not measured") >= 3  # int8 and fp32 against the latency rule, fp32's p99 in the table
    assert cells.count("fail") >= 2
    assert {"12.5000 s", "2 image doesn't decode"} <= {c for c in cells} or any("12.5" in c for c in cells)
    refused = Reader(page.html(known(chosen="", reason="fp32 failed", test={})).decode()).cells
    assert "Refused." in refused
    assert not any("Test split" in c for c in refused)


def test_parts_that_a_receipt_lacks_are_left_out() -> None:
    cells = Reader(page.html(known(curves=(), dataset={})).decode()).cells
    assert "Training" not in cells
    assert "Data" not in cells
    assert "Time of the stages" in cells


def test_a_curve_fills_its_area_from_first_to_last() -> None:
    falling = facts.Curve(name="loss", points=((1, 1.5), (2, 0.5), (3, 0.25)))
    assert page.path(falling) == "M0.0 0.0 L160.0 96.0 L320.0 120.0"
    assert re.fullmatch(r"M0\.0 120\.0", page.path(facts.Curve(name="one", points=((5, 2.0),))))


def test_confusion_counts_truth_in_rows() -> None:
    answers = np.eye(3, dtype="float32")[[0, 1, 1, 2]]
    assert facts.confusion(answers, np.array([0, 1, 2, 2])) == ((1, 0, 0), (0, 1, 0), (0, 1, 1))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "not measured"), (0.0, "0"), (0.123456, "0.1235"), (1234.5, "1,234.5"), (5000, "5,000"), ("x", "x")],
)
def test_numbers(value: Any, text: str) -> None:
    assert page.number(value) == text
