"""The picture of a sweep, its table, and what result.json says; perf_analyzer where it is real."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from forja import recipes
from forja.errors import BadInput, Refused, Unavailable
from forja.recipes.base import Serving
from forja.serving import repository
from forja.serving.repository import Release
from forja.settings import Settings
from forja.tune import command, perf_analyzer, picture
from forja.tune.choose import Candidate, Trial
from forja.tune.measured import Load
from forja.tune.subject import Subject
from forja.tune.sweep import Setup, Sweep
from forja.tune.transport import Target


def load(offered: float | None, p99_ms: float | None, throughput: float, **changes: Any) -> Load:
    given: dict[str, Any] = {
        "offered": offered, "throughput": throughput, "sent": 100, "errors": {}, "p50_ms": p99_ms, "p90_ms": p99_ms, "p99_ms": p99_ms,
        "answered_p99_ms": p99_ms, "lag_ms": 0.1, "saturated": False, "arrived": offered, "batch": 1.0,
    }  # fmt: skip
    return Load(**{**given, **changes})


def candidate(instances: int, max_batch: int = 32, delay_us: int = 0, batching: bool = True, queue: int = 256) -> Candidate:
    return Candidate(max_batch=max_batch, serving=Serving(instances=instances, delay_us=delay_us, queue=queue), batching=batching)


PLAIN = Trial(candidate=candidate(1, batching=False), top=load(None, 9.0, 600), loads=(load(400, 30.0, 400), load(550, 240.0, 548)))
BEST = Trial(
    candidate=candidate(2), top=load(None, 9.0, 1500), loads=(load(900, 20.0, 900), load(1300, 80.0, 1300), load(1400, 150.0, 1390))
)
SLOW = Trial(candidate=candidate(3), top=load(None, 9.0, 1400), loads=(load(900, None, 900, saturated=True),))
OVER = Trial(
    candidate=candidate(1, 8), top=load(None, 9.0, 800), loads=(load(700, None, 500, errors={"rejected": 30}), load(500, 140.0, 500))
)
GRID = Trial(candidate=candidate(1, 4), top=load(None, 9.0, 700))
FAILED = Trial(candidate=candidate(4), failed="Triton ended: no memory")
WON = dataclasses.replace(BEST, candidate=candidate(2, queue=130))
QUEUE = Trial(candidate=candidate(2, queue=130), loads=(load(1950, None, 1500, answered_p99_ms=90.0, errors={"rejected": 23}),))
SWEEP = Sweep(
    trials=(PLAIN, FAILED, GRID, OVER, SLOW, BEST), plainest=PLAIN, best=WON, queues=(QUEUE,), last=load(1300, 85.0, 1299)
)  # fmt: skip


def test_the_order_of_the_table() -> None:
    assert picture.rows(SWEEP, 100.0) == [BEST, PLAIN, SLOW, OVER, GRID, FAILED]


CELLS = {
    "best": (WON, ["2", "32", "0 ms", "130", "1500/s", "1300/s", "80.0 ms", ""]),
    "without dynamic batching": (PLAIN, ["1", "no", "-", "no end", "600/s", "400/s", "30.0 ms", ""]),
    "never measured": (SLOW, ["3", "32", "0 ms", "256", "1400/s", "-", "-", "generator too slow"]),
    "over the bound": (OVER, ["1", "8", "0 ms", "no end", "800/s", "-", "-", "over the bound"]),
    "left out after the grid": (GRID, ["1", "4", "0 ms", "no end", "700/s", "-", "-", "latency not measured"]),
    "failed": (FAILED, ["4", "32", "0 ms", "256", "-", "-", "-", "failed"]),
}


@pytest.mark.parametrize("case", CELLS, ids=str)
def test_rows_say_what_is_the_matter(case: str) -> None:
    trial, wanted = CELLS[case]
    assert picture.cells(trial, 100.0) == wanted


@pytest.mark.parametrize("sweep", [SWEEP, Sweep(trials=(PLAIN, SLOW, FAILED), plainest=PLAIN, best=None)], ids=["won", "nothing won"])
def test_the_picture_stands_alone(sweep: Sweep, tmp_path: Path) -> None:
    svg, png = tmp_path / "tune.svg", tmp_path / "tune.png"
    picture.draw(sweep, "digits fp32", 100.0, [svg, png])
    text = svg.read_text()
    assert "<svg" in text
    assert not re.search(r"(href|src)=\"(?!#)|url\((?!#)|<text|font-family", text)  # no other file, and no font of the reader's
    with Image.open(png) as image:
        assert image.width > 1200
        colours = {tuple(int(picture.BEST[i : i + 2], 16) for i in (1, 3, 5)), tuple(int(picture.PLAIN[i : i + 2], 16) for i in (1, 3, 5))}
        seen = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
        assert (colours <= seen) == (sweep.best is not None)


def setup(folder: Path) -> Setup:
    dataset = recipes.load("digits").dataset
    release = Release(
        model="digits", version="1", variant="fp32", classes=dataset.classes, shape=dataset.shape, max_batch=32,
        preprocess=repository.preprocess(dataset), receipts={},
    )  # fmt: skip
    subject = Subject(release=release, model=b"onnx", inputs=np.zeros((1, 1, 8, 8), np.float32), gate="vision/digits/gate/k/receipt.json")
    settings = Settings.from_env({"FORJA_STATE": str(folder)})
    return Setup(
        settings=settings,
        subject=subject,
        bound_ms=100.0,
        seconds=1.0,
        protocol="http",
        scratch=folder,
        say=lambda _: None,
        most=32,
        cores=2,
    )


def test_the_result(tmp_path: Path) -> None:
    given = setup(tmp_path)
    result = command.summary(SWEEP, given, given.subject, tmp_path / "out", tmp_path / "x.toml")
    command._save(tmp_path / "out", result, SWEEP, given)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.pbtxt", "result.json", "tune.png", "tune.svg"]
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["table"] == "[serving.digits]\ninstances = 2\ndelay_us = 0\nqueue = 130\n"
    assert found["gain"] == pytest.approx(1299 / 400, abs=1e-3)
    assert (found["last"]["p99_ms"], found["plainest"]["throughput"]) == (85.0, 400)
    assert [t["failed"] for t in found["trials"] if t["failed"]] == ["Triton ended: no memory"]
    assert "max_queue_size: 130" in (tmp_path / "out" / "config.pbtxt").read_text()


def test_no_result_leaves_no_configuration(tmp_path: Path) -> None:
    given, lost = setup(tmp_path), Sweep(trials=(PLAIN, SLOW), plainest=PLAIN, best=None)
    (tmp_path / "config.pbtxt").write_text("of another run")
    result = command.summary(lost, given, given.subject, tmp_path, tmp_path / "x.toml")
    command._save(tmp_path, result, lost, given)
    assert (result["best"], result["gain"], result["fields"], result["table"]) == (None, None, {}, "")
    assert not (tmp_path / "config.pbtxt").exists()


@pytest.mark.parametrize(
    ("site", "protocol", "write", "error", "message"),
    [
        ("cluster", "http", True, Refused, "the site of this machine"),
        ("local", "smtp", False, BadInput, "http or grpc"),
        ("local", "http", False, BadInput, "gate receipt of digits that chose a variant"),
    ],
)
def test_what_tune_refuses(site: str, protocol: str, write: bool, error: type[Exception], message: str, tmp_path: Path) -> None:
    settings = Settings.from_env({"FORJA_STATE": str(tmp_path), "FORJA_SITE": site})
    with pytest.raises(error, match=message):
        command.run(settings, "digits", tmp_path, tmp_path, seconds=1, protocol=protocol, write=write, say=lambda _: None)


STAND_IN = """#!/bin/sh
while [ "$1" != -f ]; do shift; done
printf 'Concurrency,Inferences/Second,Client Send\\n16,1234.5,9\\n' > "$2"
"""


def stand_in(folder: Path, script: str) -> str:
    path = folder / "perf_analyzer"
    path.write_text(script)
    path.chmod(0o755)
    return str(path)


def test_perf_analyzers_placeholder_counts_as_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stand_in(tmp_path, STAND_IN)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for version, wanted in (("0.1.0", ""), ("2.59.0", path)):
        monkeypatch.setattr(perf_analyzer.metadata, "version", lambda _, v=version: v)
        assert perf_analyzer.find() == wanted


def test_perf_analyzers_answer(tmp_path: Path) -> None:
    """By a stand-in: the real binary wants a newer C library than this machine's."""
    target = Target(address="127.0.0.1:8000", model="m")
    sample = np.zeros((1, 4), np.float32)
    binary = stand_in(tmp_path, STAND_IN)
    assert perf_analyzer.throughput(binary, target, sample, in_flight=16, seconds=1, scratch=tmp_path) == 1234.5
    given = json.loads((tmp_path / "perf_analyzer.json").read_text())["data"][0]["input"]
    assert (given["shape"], len(given["content"]["b64"])) == ([4], 24)
    broken = stand_in(tmp_path, "#!/bin/sh\necho no such model >&2\nexit 1\n")
    with pytest.raises(Unavailable, match="no such model"):
        perf_analyzer.throughput(broken, target, sample, in_flight=16, seconds=1, scratch=tmp_path)
