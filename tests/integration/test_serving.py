"""Releases on the real Triton, Envoy, MLflow and supervisor, while a client asks twenty times a second."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from integration.conftest import Stack, new_stack

from forja import envs, receipts, tracking
from forja.errors import Conflict, Refused, Unavailable
from forja.lake import Lake, sha256
from forja.receipts import Input, Output, Receipt
from forja.services import supervisor
from forja.services.triton import slot
from forja.serving import repository, triton
from forja.serving.router import EnvoyRouter, Route
from forja.stages import harness

MODEL = "digits"


@dataclass(kw_only=True)
class Serving:
    """A stack with Envoy, Triton and MLflow, and models to release."""

    stack: Stack
    models: Path
    lake: Lake
    router: EnvoyRouter
    gates: dict[tuple[int, bool], str] = field(default_factory=dict)

    @property
    def settings(self) -> Any:
        return self.stack.settings

    @property
    def endpoint(self) -> str:
        return self.settings.endpoint.removeprefix("http://")

    def golden(self, seed: int) -> triton.Golden:
        with np.load(self.models / f"{seed}.npz") as arrays:
            return triton.Golden(inputs=arrays["inputs"], probabilities=arrays["probabilities"])

    def mlflow(self) -> Any:
        return tracking.client(self.settings.mlflow)

    def aliases(self) -> dict[str, str]:
        return {name: str(v) for name, v in self.mlflow().get_registered_model(MODEL).aliases.items()}

    def gate(self, seed: int, *, damaged: bool = False) -> str:
        """Receipt of a gate that chose the model of this seed; ``damaged`` has golden answers that it never gave."""
        if (seed, damaged) not in self.gates:
            self.gates[seed, damaged] = self._gate(seed, damaged)
        return self.gates[seed, damaged]

    def _gate(self, seed: int, damaged: bool) -> str:
        client = self.mlflow()
        with contextlib.suppress(Exception):
            client.create_registered_model(MODEL)
        run = client.create_run("0").info
        version = str(client.create_model_version(MODEL, source=f"{run.artifact_uri}/model", run_id=run.run_id).version)
        client.set_registered_model_alias(MODEL, "challenger", version)
        golden = (self.models / f"{seed}.npz").read_bytes()
        if damaged:
            arrays = dict(np.load(io.BytesIO(golden)))
            buffer = io.BytesIO()
            np.savez(buffer, **{**arrays, "probabilities": arrays["probabilities"] + np.float32(0.01)})
            golden = buffer.getvalue()
        model = {"model.onnx": (self.models / f"{seed}.onnx").read_bytes()}
        name = f"{seed}{'-damaged' if damaged else ''}"
        register = self._receipt("register", name, model, {}, {"model": MODEL, "version": version})
        optimize = self._receipt("optimize", name, {**model, "golden.npz": golden}, {"model": register}, {}, "fp32")
        verdict = {"verdict.json": f"{name} {version}".encode()}
        return self._receipt("gate", name, verdict, {"optimize": optimize}, {"chosen": "fp32"})

    def _receipt(
        self, stage: str, key: str, outputs: dict[str, bytes], inputs: dict[str, str], facts: dict[str, Any], variant: str = ""
    ) -> str:
        folder = receipts.place("vision", MODEL, stage, key)
        written = {}
        for name, data in outputs.items():
            self.lake.create(f"{folder}/{name}", data)
            written[name] = Output(path=f"{folder}/{name}", sha256=sha256(data), bytes=len(data))
        receipt = Receipt(
            stage=stage, recipe=MODEL, team="vision", key=key, code="", command="", outputs=written, metrics={}, facts=facts, report=[],
            inputs={n: [Input(ref=ref, digest=receipts.load(self.lake, ref).digest)] for n, ref in inputs.items()}, versions={},
            started="", finished="", seconds=0.0, variant=variant,
        )  # fmt: skip
        self.lake.create(f"{folder}/receipt.json", receipt.to_json())
        return f"{folder}/receipt.json"

    def release(self, seed: int, *, damaged: bool = False) -> Receipt:
        return harness.execute(self.settings, "release", MODEL, {"gate": [self.gate(seed, damaged=damaged)]})[0]

    def spawn(self, seed: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "forja.stages", "release", "--recipe", MODEL, "--in", f"gate={self.gate(seed)}"]
        env = {**self.stack.env, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def answers(self, seed: int) -> bool:
        """Whether the endpoint answers as the model of this seed does."""
        golden = self.golden(seed)
        return bool(np.abs(triton.infer(self.endpoint, MODEL, golden.inputs) - golden.probabilities).max() < 1e-3)

    def pid(self, name: str) -> int:
        return supervisor.processes(self.settings)[slot(self.settings, MODEL, name).program].pid


@dataclass(kw_only=True)
class Client:
    """Asks twenty times a second, each request in a thread of its own, as a plant's clients do; keeps what failed."""

    serving: Serving
    failed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __enter__(self) -> Client:
        self._stop = threading.Event()
        self._asking: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for thread in self._asking:
            thread.join()

    def _run(self) -> None:
        sample = self.serving.golden(1).inputs[:1]
        due = time.monotonic()
        while not self._stop.is_set():
            thread = threading.Thread(target=self._ask, args=(sample,))
            thread.start()
            self._asking.append(thread)
            due += 0.05
            self._stop.wait(max(0.0, due - time.monotonic()))

    def _ask(self, sample: Any) -> None:
        began = time.monotonic()
        try:
            answer = triton.infer(self.serving.endpoint, MODEL, sample)
            if abs(float(answer.sum()) - 1) > 1e-3:
                self.failed.append(f"answer {answer}")
        except Exception as error:
            self.failed.append(repr(error))
        self.seconds.append(time.monotonic() - began)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with new_stack() as stack:
        stack.need("envoy", "triton", "mlflow")
        models = tmp_path_factory.mktemp("models")
        python = envs.python("ml", stack.settings)
        subprocess.run([python, Path(__file__).with_name("serving_models.py"), models, *map(str, range(1, 8))], check=True)
        yield Serving(stack=stack, models=models, lake=Lake(stack.settings.lake), router=EnvoyRouter(stack.settings))


def test_first_release_goes_live_and_again_changes_nothing(serving: Serving) -> None:
    first = serving.release(1)
    assert first.facts["slot"] == "blue"
    assert first.facts["route"] == {"version": 1, "weights": {"blue": 100}}
    assert serving.answers(1)
    assert serving.aliases() == {"champion": "1"}
    pid = serving.pid("blue")
    again = serving.release(1)
    assert again.path == first.path
    assert serving.pid("blue") == pid
    assert serving.router.read(MODEL).version == 1


def test_repairs_only_what_differs(serving: Serving) -> None:
    serving.release(1)
    route, place = serving.router.read(MODEL), slot(serving.settings, MODEL, serving.router.read(MODEL).live)
    serving.mlflow().delete_registered_model_alias(MODEL, "champion")
    rds = serving.settings.state / "envoy" / "rds.yaml"
    lost = {**json.loads(rds.read_text()), "version_info": "lost", "resources": []}
    rds.with_suffix(".new").write_text(json.dumps(lost))
    rds.with_suffix(".new").rename(rds)
    supervisor.stop_program(serving.settings, place.program)
    serving.release(1)
    assert serving.answers(1)
    assert serving.aliases()["champion"] == "1"
    assert serving.router.read(MODEL) == route


@pytest.mark.parametrize("victim", ["server", "python backend"])
def test_killed_triton_is_not_noticed(victim: str, serving: Serving) -> None:
    serving.release(1)
    live = serving.router.read(MODEL).live
    with Client(serving=serving) as client:
        time.sleep(1)
        for _ in range(2):
            pid = serving.pid(live)
            os.kill(pid if victim == "server" else stub(pid), signal.SIGKILL)
            serving.stack.wait("another Triton", lambda pid=pid: serving.pid(live) not in (0, pid) and serving.answers(1))
            time.sleep(1)
    assert client.failed == []
    assert len(client.seconds) > 60
    print(f"slowest answer {max(client.seconds):.1f} s of {len(client.seconds)}")


def stub(server: int) -> int:
    """Process id of the python backend that a Triton server has started."""
    return next(p.pid for p in psutil.Process(server).children() if "triton_python_backend_stub" in " ".join(p.cmdline()))


def test_without_retries_the_kill_is_noticed(serving: Serving) -> None:
    """Must fail: the same kill with Envoy's retries taken out."""
    serving.release(1)
    live = serving.router.read(MODEL).live
    rds = serving.settings.state / "envoy" / "rds.yaml"
    table = json.loads(rds.read_text())
    for route in table["resources"][0]["virtual_hosts"][0]["routes"]:
        route.get("route", {}).pop("retry_policy", None)
    rds.with_suffix(".new").write_text(json.dumps({**table, "version_info": "no-retries"}))
    rds.with_suffix(".new").rename(rds)
    time.sleep(1)
    with Client(serving=serving) as client:
        time.sleep(0.5)
        pid = serving.pid(live)
        os.kill(pid, signal.SIGKILL)
        time.sleep(1)
    assert client.failed
    serving.release(1)  # puts the recorded routes back


def test_large_requests_survive_a_kill(serving: Serving) -> None:
    """A body above Envoy's default buffer of 1 MiB is kept for a retry too."""
    serving.release(1)
    live = serving.router.read(MODEL).live
    tensor = {"name": "input", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.0] * 64}
    body = json.dumps({"inputs": [tensor]}).encode() + b" " * (2 << 20)
    url = f"{serving.settings.endpoint}/v2/models/{MODEL}/infer"
    os.kill(serving.pid(live), signal.SIGKILL)
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as answer:  # noqa: S310
        assert len(json.load(answer)["outputs"][0]["data"]) == 10


def test_next_release_is_not_noticed(serving: Serving) -> None:
    serving.release(1)
    old = serving.router.read(MODEL).live
    with Client(serving=serving) as client:
        time.sleep(0.5)
        receipt = serving.release(2)
        time.sleep(0.5)
    assert client.failed == []
    assert receipt.facts["slot"] != old
    assert serving.answers(2)
    aliases = serving.aliases()
    assert (aliases["previous"], aliases["champion"]) == (receipt.facts["previous"], receipt.facts["version"])
    assert "challenger" not in aliases
    assert triton.ready(f"127.0.0.1:{slot(serving.settings, MODEL, old).http_port}", MODEL, receipt.facts["previous"])


def test_failing_smoke_test_leaves_what_is_live(serving: Serving) -> None:
    serving.release(2)
    route, aliases = serving.router.read(MODEL), serving.aliases()
    serving.gate(3, damaged=True)
    with Client(serving=serving) as client, pytest.raises(Refused, match="golden answers"):
        serving.release(3, damaged=True)
    assert client.failed == []
    assert serving.router.read(MODEL) == route
    assert serving.answers(2)
    assert serving.aliases()["champion"] == aliases["champion"]
    idle = slot(serving.settings, MODEL, "green" if route.live == "blue" else "blue")
    assert supervisor.processes(serving.settings)[idle.program].state == "stopped"
    assert repository.installed(idle, MODEL) is None


def test_a_model_that_does_not_load_is_refused_with_tritons_reason(serving: Serving) -> None:
    serving.release(2)
    (serving.models / "99.onnx").write_bytes(b"no model")
    (serving.models / "99.npz").write_bytes((serving.models / "1.npz").read_bytes())
    with pytest.raises(Refused, match=r"(?s)could not load.*INVALID_PROTOBUF"):
        serving.release(99)
    assert serving.answers(2)


def test_router_is_compare_and_swap(serving: Serving) -> None:
    serving.release(2)
    route = serving.router.read(MODEL)
    with pytest.raises(Conflict, match="somebody else"):
        serving.router.swap(route.version - 1, Route(model=MODEL, weights={"blue": 50, "green": 50}))
    assert serving.router.read(MODEL) == route


def test_route_comes_back_when_envoy_does_not_take_it(serving: Serving) -> None:
    serving.release(2)
    route = serving.router.read(MODEL)
    supervisor.stop_program(serving.settings, "envoy")
    try:
        with pytest.raises(Unavailable, match="route before is in force"):
            EnvoyRouter(serving.settings, in_force_s=1).swap(route.version, Route(model=MODEL, weights={"blue": 50, "green": 50}))
    finally:
        serving.stack.need("envoy")
    assert serving.router.read(MODEL).weights == route.weights
    assert serving.answers(2)


def test_mlflow_away_delays_the_aliases_only(serving: Serving) -> None:
    serving.release(2)
    serving.gate(4)
    supervisor.stop_program(serving.settings, "mlflow")
    try:
        with pytest.raises(Unavailable, match="MLflow"):
            serving.release(4)
        assert serving.answers(4)
    finally:
        serving.stack.need("mlflow")
    version = serving.router.read(MODEL).version
    receipt = serving.release(4)
    assert serving.router.read(MODEL).version == version
    assert serving.aliases()["champion"] == receipt.facts["version"]


@pytest.mark.parametrize("line", ["into slot", "golden answers", "all requests go"])
def test_killed_release_converges_on_retry(line: str, serving: Serving) -> None:
    seed = {"into slot": 5, "golden answers": 1, "all requests go": 6}[line]
    serving.gate(seed)
    with Client(serving=serving) as client:
        process = serving.spawn(seed)
        assert process.stdout is not None
        for text in process.stdout:
            if line in text:
                os.killpg(process.pid, signal.SIGKILL)
                break
        process.wait()
        assert process.returncode == -signal.SIGKILL
        receipt = serving.release(seed)
    assert client.failed == []
    assert serving.answers(seed)
    assert serving.aliases()["champion"] == receipt.facts["version"]


def test_two_releases_at_once_end_in_one_of_them(serving: Serving) -> None:
    serving.gate(3)
    serving.gate(7)
    with Client(serving=serving) as client:
        both = [serving.spawn(3), serving.spawn(7)]
        output = [p.communicate(timeout=120)[0] for p in both]
    print(*output, sep="\n")
    assert client.failed == []
    assert [p.returncode for p in both] == [0, 0], output
    assert sorted((serving.answers(3), serving.answers(7))) == [False, True]
