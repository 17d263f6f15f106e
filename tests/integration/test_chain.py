"""The whole chain through Airflow's scheduler, on the real Kafka, MLflow, Triton and Envoy: first run, again, bad data, kills."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from integration.conftest import Stack, new_stack
from integration.plant import Client
from PIL import Image

from forja import chain, events, lineage, receipts, recipes
from forja.events import Sample
from forja.lake import Lake
from forja.services.airflow_api import Airflow
from forja.services.triton import slot

DIGITS = recipes.load("digits")
MEMOISED = {"transform", "train", "optimize[fp32]", "optimize[fp16]", "optimize[int8]", "gate"}


@pytest.fixture(scope="module")
def plant() -> Iterator[Stack]:
    """A stack on which digits is live: version 1, slot blue."""
    with new_stack() as stack:
        summary = json.loads(stack.forja("run", "digits", "--json").stdout.splitlines()[-1])
        (stack.settings.state / "first.json").write_text(json.dumps(summary))
        yield stack


def states(summary: dict[str, Any]) -> dict[str, str]:
    return {t["task"]: t["state"] for t in summary["tasks"]}


def went_well(summary: dict[str, Any]) -> bool:
    """Every task succeeded. Only ingest may have found nothing left: Kafka's doorbell rings for the same events, and may be first."""
    return {state for task, state in states(summary).items() if task != "ingest" or state != "skipped"} == {"success"}


def count(lake: Lake, verb: str) -> int:
    """Receipts of a stage."""
    return sum("/receipt" in p for p in lake.list(f"vision/digits/{verb}"))


def versions(stack: Stack, model: str) -> list[dict[str, Any]]:
    url = f"{stack.settings.mlflow}/api/2.0/mlflow/model-versions/search?filter=name%3D%27{model}%27"
    with urllib.request.urlopen(url) as answer:  # noqa: S310 - our own server
        found: list[dict[str, Any]] = json.load(answer).get("model_versions", [])
        return found


def test_events_become_a_served_model(plant: Stack) -> None:
    summary = json.loads((plant.settings.state / "first.json").read_text())
    assert went_well(summary), states(summary)
    assert [v["variant"] for v in summary["variants"]] == ["fp32", "fp16", "int8"]
    for variant in summary["variants"]:
        assert variant["metrics"]["accuracy"] > 0.95
        assert variant["engine"]["deserialised"] == "not measured"
        assert variant["engine"]["latency_ms"] is None
    assert summary["gate"]["chosen"] == "fp32"
    assert summary["test"]["test_accuracy"] > 0.95
    assert (summary["release"]["version"], summary["release"]["slot"]) == ("1", "blue")
    assert (summary["prediction"]["sample"], summary["prediction"]["answer"]) == ("digit-0001", "1")
    numbers = json.loads(plant.forja("evaluate", "digits", "--json").stdout)
    assert numbers["accuracy"] == pytest.approx(summary["test"]["test_accuracy"], abs=1e-9), "served answers are the evaluated ones"
    assert numbers["n"] > 300
    assert 0 < numbers["p50_ms"] <= numbers["p99_ms"]


def test_again_adopts_everything(plant: Stack) -> None:
    lake = Lake(plant.settings.lake)
    before = {verb: count(lake, verb) for verb in chain.VERBS}
    summary = json.loads(plant.forja("run", "digits", "--json").stdout.splitlines()[-1])
    adopted = {t["task"] for t in summary["tasks"] if t["adopted"]}
    assert adopted >= MEMOISED
    assert states(summary)["ingest"] == "skipped"
    assert {verb: count(lake, verb) for verb in chain.VERBS} == before
    assert [v["version"] for v in versions(plant, "digits")] == ["1"]


def image(number: int) -> bytes:
    """A new image of a one."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, 3:5] = 200 + number % 40
    pixels[number % 8, 0] = number % 256
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def test_bad_records_doubled_runs_and_a_killed_stage(plant: Stack) -> None:
    """New data with a truncated PNG and a text among them; two runs at once; the training is killed with -9; a client asks on."""
    stack, lake = plant, Lake(plant.settings.lake)
    good = [Sample(key=f"new-{i}", label="1", payload=image(i)) for i in range(40)]
    bad = [Sample(key="half", label="1", payload=image(99)[:50]), Sample(key="text", label="1", payload=b"no image at all")]
    trained = count(lake, "train")
    with Client(
        endpoint=stack.settings.endpoint.removeprefix("http://"), model="digits", sample=np.zeros((1, 1, 8, 8), np.float32)
    ) as client:
        assert events.produce(stack.settings.kafka, DIGITS.source, good[:20] + bad + good[20:]) == (42, 0)
        with Airflow(stack.settings) as api:
            raw = ingest_all(stack, lake)
            for name in ("one", "two"):
                api.trigger("digits", name, {"raw": raw})
            kill_training(stack)
            ended = [api.follow("digits", name, lambda tasks: None, limit_s=240) for name in ("one", "two")]
            assert ended == ["success", "success"]
            tries = [t.tries for name in ("one", "two") for t in api.tasks("digits", name) if t.task == "train"]
            releases = {api.xcom("digits", n, t) for n in ("one", "two") for t in api.tasks("digits", n) if t.task == "release"}
        time.sleep(1)
    assert max(tries) == 2, "the killed stage was tried again"
    assert count(lake, "train") == trained + 1, "and its work was done once"
    assert sorted(v["version"] for v in versions(stack, "digits")) == ["1", "2"]
    assert len(releases) == 1
    release = receipts.load(lake, releases.pop())
    assert (release.facts["version"], release.facts["slot"]) == ("2", "green")
    rejected = lineage.of_release(lake, release).dataset.facts["rejected"]
    assert rejected == {"image doesn't decode": 1, "ingest: neither PNG nor JPEG": 1}
    rows = lake.table("vision/digits/raw").to_pyarrow_table(columns=["key"]).num_rows
    assert rows == 1797 + 42
    assert client.failed == []
    assert len(client.seconds) > 200
    assert stack.forja("predict", "digits", str(write(stack, image(7)))).stdout.split(": ")[1].startswith("1 ")


def ingest_all(stack: Stack, lake: Lake) -> str:
    """Version of the raw table that holds all 42: Kafka's doorbell started ingest by itself."""

    def there() -> bool:
        return lake.table("vision/digits/raw").to_pyarrow_table(columns=["key"]).num_rows == 1797 + 42

    stack.wait("the doorbell's ingest", there, 120)
    return f"vision/digits/raw@{lake.table('vision/digits/raw').version()}"


def kill_training(stack: Stack) -> None:
    """kill -9 of the training stage, as it runs."""

    def training() -> list[psutil.Process]:
        """The stage that trains, told from the one that waits for it by torchrun and its ranks."""
        stages = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[1:4] == ["-m", "forja.stages", "train"]]
        mine = [p for p in stages if p.environ().get("FORJA_STATE") == str(stack.settings.state)]
        return [p for p in mine if len(p.children(recursive=True)) >= 3]

    found: list[psutil.Process] = []
    stack.wait("a training stage with its ranks", lambda: found.extend(training()) or found, 120)
    os.kill(found[0].pid, signal.SIGKILL)


def write(stack: Stack, data: bytes) -> Path:
    path = stack.settings.state / "one.png"
    path.write_bytes(data)
    return path


def test_killed_triton_is_not_noticed_by_a_client(plant: Stack) -> None:
    from forja.services import supervisor

    live = slot(plant.settings, "digits", "green").program
    with Client(
        endpoint=plant.settings.endpoint.removeprefix("http://"), model="digits", sample=np.zeros((1, 1, 8, 8), np.float32)
    ) as client:
        time.sleep(1)
        os.kill(supervisor.processes(plant.settings)[live].pid, signal.SIGKILL)
        time.sleep(6)
    assert client.failed == []
    assert len(client.seconds) > 100


def sensors(path: Path, rows: int) -> Path:
    """Made-up readings in the columns of AI4I 2020: a machine fails when its power leaves 3.5 to 9 kW (Matzka 2020, PWF)."""
    draw = random.Random(0)  # noqa: S311 - not a secret
    columns = [c.name for c in recipes.load("ai4i").dataset.columns]  # type: ignore[union-attr]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["UDI", *columns, "Machine failure"])
        for number in range(rows):
            speed, torque, air = draw.gauss(1540, 250), max(draw.gauss(40, 14), 1), draw.gauss(300, 2)
            power = speed * torque * 2 * 3.14159 / 60
            row = [draw.choice("LMH"), air, air + draw.gauss(10, 1), max(speed, 100), torque, draw.randrange(250)]
            writer.writerow([number, *(x if isinstance(x, str) else round(x, 2) for x in row), int(not 3500 < power < 9000)])
    return path


def test_tables_take_the_same_way(plant: Stack, tmp_path: Path) -> None:
    data = sensors(tmp_path / "sensors.csv", 3000)
    summary = json.loads(plant.forja("run", "ai4i", "--data", str(data), "--json").stdout.splitlines()[-1])
    assert went_well(summary), states(summary)
    assert summary["variants"][0]["metrics"]["average_precision"] > 0.8
    numbers = json.loads(plant.forja("evaluate", "ai4i", "--data", str(data), "--json").stdout)
    assert numbers["n"] == 3000
    assert numbers["average_precision"] > 0.8


BAD = {
    "a CSV without a column": (["run", "ai4i", "--data", "{cut}"], "columns of"),
    "a path that isn't there": (["run", "ai4i", "--data", "/nowhere.csv"], "'/nowhere.csv'"),
    "no path at all": (["run", "ai4i"], "pass --data PATH"),
    "an unknown recipe": (["run", "nosuch"], "'nosuch'; allowed: ai4i, cifar10, digits"),
    "an image that is none": (["predict", "digits", "{cut}"], "doesn't decode"),
    "an unknown stage": (["stage", "dance", "--recipe", "digits"], "'dance'"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_is_told_and_changes_nothing(case: str, plant: Stack, tmp_path: Path) -> None:
    arguments, message = BAD[case]
    cut = tmp_path / "cut.csv"
    cut.write_text("UDI,Type,Machine failure\n1,L,0\n")
    done = plant.forja(*(a.format(cut=cut) for a in arguments), check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
