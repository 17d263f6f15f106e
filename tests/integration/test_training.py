"""Training with real processes and the real MLflow: kill -9 and resume, two at once, MLflow away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from integration.conftest import Stack

from forja import envs, receipts, recipes, samples
from forja.lake import Lake, sha256
from forja.settings import ROOT
from forja.stages import ingest

pytestmark = pytest.mark.ml

RECIPE = recipes.load("digits")


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process and to all that it started."""
    found = [pid]
    for parent in found:
        found += [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    for process in found:
        os.kill(process, number)


class Runner:
    """Stages of the recipe digits as processes, on a lake of its own."""

    def __init__(self, stack: Stack, lake: Path) -> None:
        self.stack, self.lake = stack, Lake(str(lake))
        self.env = {
            **stack.env, "FORJA_LAKE": str(lake), "MLFLOW_TRACKING_URI": stack.settings.mlflow, "PYTHONPATH": str(ROOT / "include"),
            "PYTHONUNBUFFERED": "1",
        }  # fmt: skip

    def start(self, verb: str, **refs: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "forja.stages", verb, "--recipe", "digits", *(f"--in={n}={r}" for n, r in refs.items())]
        return subprocess.Popen(command, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)

    def run(self, verb: str, **refs: str) -> receipts.Receipt:
        process = self.start(verb, **refs)
        return self.finish(process)

    def finish(self, process: subprocess.Popen[str]) -> receipts.Receipt:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        return receipts.load(self.lake, output.split()[-1])

    def kill(self, process: subprocess.Popen[str]) -> None:
        """kill -9 of the stage and of all that it started: torchrun puts ranks into groups of their own."""
        send(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def runner(stack: Stack, tmp_path: Path, request: pytest.FixtureRequest) -> Runner:
    """With a raw table of digits, some fewer in each test: equal data would be equal work, with one run in MLflow for all tests."""
    stack.need("mlflow")
    made = Runner(stack, tmp_path / "lake")
    rows = [
        {
            "key": s.key, "label": s.label, "payload": s.payload, "sha256": sha256(s.payload), "error": None, "topic_id": "t",
            "partition": 0, "offset": i, "time": 0,
        } for i, s in enumerate(samples.samples(RECIPE, None))
    ]  # fmt: skip
    rows = rows[: len(rows) - zlib.crc32(request.node.name.encode()) % 97]
    table = ingest.open_table(made.lake, "vision/digits/raw")
    ingest.commit(table, pa.Table.from_pylist(rows, schema=pa.schema(ingest.schema())), {"t-0": len(rows)}, {"t-0": None})
    return made


def history(runner: Runner, receipt: receipts.Receipt) -> list[dict[str, Any]]:
    output = receipt.output("history.jsonl")
    return [json.loads(line) for line in runner.lake.read(output.path, output.sha256).splitlines()]


def series(stack: Stack, run: str, metric: str) -> list[tuple[int, float]]:
    url = f"{stack.settings.mlflow}/api/2.0/mlflow/metrics/get-history?run_id={run}&metric_key={metric}"
    with urllib.request.urlopen(url) as answer:  # noqa: S310 - our own server
        return [(m["step"], m["value"]) for m in json.load(answer).get("metrics", [])]


def runs(stack: Stack, key: str) -> list[str]:
    """Ids of the MLflow runs of some work."""
    body = json.dumps({"experiment_ids": ["1"], "filter": f"tags.`forja.key` = '{key}'"}).encode()
    request = urllib.request.Request(  # noqa: S310 - our own server
        f"{stack.settings.mlflow}/api/2.0/mlflow/runs/search", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:  # noqa: S310 - our own server
        return [r["info"]["run_id"] for r in json.load(answer).get("runs", [])]


def checkpoints(runner: Runner) -> list[str]:
    return [p for p in runner.lake.list("vision/digits/train") if "/checkpoint-" in p]


def wait(seconds: float, ask: Any) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := ask():
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s")


def stop(stack: Stack, program: str) -> None:
    """Stop a program; the supervisor's client lives in the control environment."""
    code = "import sys; from forja.services.supervisor import stop_program as stop; from forja.settings import Settings; "
    code += "stop(Settings.from_env(), sys.argv[1])"
    env = {**stack.env, "PYTHONPATH": str(ROOT / "include")}
    subprocess.run([envs.python("control", stack.settings), "-c", code, program], env=env, check=True)


@pytest.fixture
def dataset(runner: Runner) -> Iterator[str]:
    return runner.run("transform", raw="vision/digits/raw@1").path


def test_killed_training_goes_on_from_its_checkpoint_and_doubles_nothing(runner: Runner, dataset: str) -> None:
    first = runner.start("train", dataset=dataset)
    wait(120, lambda: checkpoints(runner))
    runner.kill(first)
    assert not [p for p in runner.lake.list("vision/digits/train") if p.endswith("receipt.json")]
    receipt = runner.run("train", dataset=dataset)
    assert receipt.facts["resumed_after_epoch"] >= 1
    steps = [p["step"] for p in history(runner, receipt)]
    assert steps == list(range(1, RECIPE.training.epochs + 1))
    assert receipt.metrics["validation_accuracy"] > 0.95
    assert not checkpoints(runner), "checkpoints of finished training are of no use"
    (run,) = runs(runner.stack, receipt.key)
    assert receipt.facts["mlflow_run"] == run
    assert sorted(step for step, _ in series(runner.stack, run, "train_loss")) == steps, "no epoch is drawn twice"


def test_two_at_once_train_once(runner: Runner, dataset: str) -> None:
    pair = [runner.start("train", dataset=dataset) for _ in range(2)]
    outputs = [p.communicate(timeout=240)[0] for p in pair]
    assert [p.returncode for p in pair] == [0, 0], outputs
    assert sorted(("written" in o.splitlines(), "adopted" in o.splitlines()) for o in outputs) == [(False, True), (True, False)]
    assert sum("waiting: process" in o for o in outputs) == 1
    assert sum("torchrun" in o for o in outputs) == 1
    assert outputs[0].split()[-1] == outputs[1].split()[-1]


def test_series_is_complete_after_mlflow_was_away(runner: Runner, dataset: str) -> None:
    """MLflow stops after the first metric; training ends without it, register refuses to, and then completes the run."""
    stack = runner.stack
    server = stack.status()["mlflow"]["pid"]
    training = runner.start("train", dataset=dataset)
    key = wait(60, lambda: [p.split("/")[3] for p in runner.lake.list("vision/digits/train")])[0]
    assert training.stdout is not None
    while "epoch 1/" not in training.stdout.readline():
        continue
    # Training takes a few seconds, no longer than MLflow's client needs to start: the ranks stand still meanwhile.
    torchrun = int(Path(f"/proc/{training.pid}/task/{training.pid}/children").read_text().split()[0])
    send(torchrun, signal.SIGSTOP)
    run = wait(120, lambda: runs(stack, key))[0]
    wait(60, lambda: series(stack, run, "train_loss"))
    send(server, signal.SIGKILL)
    stop(stack, "mlflow")
    send(torchrun, signal.SIGCONT)
    try:
        receipt = runner.finish(training)
        refused = runner.start("register", dataset=dataset, training=receipt.path)
        output, _ = refused.communicate(timeout=120)
        assert refused.returncode == 5, output
        assert "Unavailable: MLflow doesn't answer" in output
    finally:
        stack.need("mlflow")
    assert len(series(stack, run, "train_loss")) < RECIPE.training.epochs
    assert any("MLflow was away" in line for line in receipt.report)
    registered = runner.run("register", dataset=dataset, training=receipt.path)
    assert registered.facts["mlflow_run"] == run
    points = [(p["step"], p["metrics"]["train_loss"]) for p in history(runner, receipt)]
    assert sorted(series(stack, run, "train_loss")) == points
    again = runner.run("register", dataset=dataset, training=receipt.path)
    assert again.path == registered.path
    assert sorted(series(stack, run, "train_loss")) == points, "sending twice must change nothing"
