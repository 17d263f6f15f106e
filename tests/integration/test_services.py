"""The real services: a killed one comes back with its data; ports, secrets, up and down behave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from integration.conftest import Stack

from forja.services import airflow, envoy, launch, ports, supervisor, triton
from forja.services import stack as services
from forja.services.folders import write
from forja.settings import ROOT

MODEL = """
import numpy
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", self.twice(r))]) for r in requests]

    def twice(self, request):
        return (2 * pb_utils.get_input_tensor_by_name(request, "X").as_numpy()).astype(numpy.float32)
"""
CONFIG = """
backend: "python"
max_batch_size: 8
input [{ name: "X" data_type: TYPE_FP32 dims: [ 2 ] }]
output [{ name: "Y" data_type: TYPE_FP32 dims: [ 2 ] }]
"""


def get(url: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def kill(stack: Stack, name: str) -> None:
    """kill -9 of a program; returns when another process of that name answers."""
    pid = stack.status()[name]["pid"]
    assert pid > 0
    os.kill(pid, signal.SIGKILL)
    stack.wait(f"{name} again", lambda: (s := stack.status()[name])["ready"] and s["pid"] not in (0, pid))


def family(stack: Stack, name: str = "") -> set[int]:
    return set(launch.family(str(stack.settings.state), name))


def test_up_again_changes_nothing_and_is_quick(stack: Stack) -> None:
    stack.need("envoy")
    before = stack.status()["envoy"]["pid"]
    began = time.monotonic()
    stack.need("envoy")
    assert time.monotonic() - began < 3
    assert stack.status()["envoy"]["pid"] == before


def test_kafka_killed_comes_back_with_its_records(stack: Stack) -> None:
    from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer

    stack.need("kafka")
    server = stack.settings.kafka
    admin = KafkaAdminClient(bootstrap_servers=server)
    admin.create_topics({"test.kill": {"num_partitions": 1, "replication_factor": 1}})
    admin.close()
    producer = KafkaProducer(bootstrap_servers=server)
    producer.send("test.kill", key=b"k", value=b"before").get(30)
    producer.close()
    kill(stack, "kafka")
    consumer = KafkaConsumer(
        "test.kill", bootstrap_servers=server, auto_offset_reset="earliest", enable_auto_commit=False, consumer_timeout_ms=20_000
    )
    assert next(iter(consumer)).value == b"before"
    consumer.close()


def test_mlflow_killed_comes_back_with_its_runs(stack: Stack, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    stack.need("mlflow")
    client = MlflowClient(tracking_uri=stack.settings.mlflow)
    run = client.create_run(client.create_experiment("kill")).info.run_id
    client.log_metric(run, "loss", 0.25, step=3)
    (tmp_path / "note.txt").write_text("kept")
    client.log_artifact(run, str(tmp_path / "note.txt"))
    kill(stack, "mlflow")
    assert [(m.value, m.step) for m in client.get_metric_history(run, "loss")] == [(0.25, 3)]
    assert [a.path for a in client.list_artifacts(run)] == ["note.txt"]


def test_envoy_follows_its_files_and_comes_back_with_them(stack: Stack) -> None:
    stack.need("envoy")
    file = envoy.rds(stack.settings)
    before = file.read_text()
    assert get(stack.settings.endpoint) == (503, "no model has been released yet\n")
    try:
        write(file, before.replace("503", "418").replace("no model has been released yet", "teapot"))
        stack.wait("the new route", lambda: get(stack.settings.endpoint) == (418, "teapot\n"), 5)
        kill(stack, "envoy")
        assert get(stack.settings.endpoint) == (418, "teapot\n")
    finally:
        write(file, before)


def test_triton_slot_serves_and_comes_back_without_leftovers(stack: Stack) -> None:
    stack.need("triton")
    slot = triton.slot(stack.settings, "ai4i", "green")
    assert stack.status()[slot.program]["state"] == "stopped", "an empty slot doesn't start"
    write(slot.repository / "twice" / "config.pbtxt", CONFIG)
    write(slot.repository / "twice" / "1" / "model.py", MODEL)
    stack.need("triton")
    body = {"inputs": [{"name": "X", "shape": [1, 2], "datatype": "FP32", "data": [1.5, -2.0]}]}

    def ask() -> list[float]:
        status, text = get(f"http://127.0.0.1:{slot.http_port}/v2/models/twice/infer", body)
        assert status == 200, text
        return list(json.loads(text)["outputs"][0]["data"])

    assert ask() == [3.0, -4.0]
    prefix = next(p for p in services.programs(stack.settings) if p.name == slot.program).shm_prefix
    before, regions = family(stack, slot.program), {p.name for p in Path("/dev/shm").glob(f"{prefix}*")}  # noqa: S108
    assert len(before) >= 2, "a server and its python stub"
    assert regions
    kill(stack, slot.program)
    assert ask() == [3.0, -4.0]
    assert not before & family(stack, slot.program), "a stub of the killed server lives on"
    assert len(list(Path("/dev/shm").glob(f"{prefix}*"))) == len(regions), "shared memory was left behind"  # noqa: S108
    supervisor.stop_program(stack.settings, slot.program)
    supervisor.stop_program(stack.settings, slot.program)
    assert not family(stack, slot.program)
    supervisor.restart_program(stack.settings, slot.program)
    stack.wait("the slot again", lambda: ask() == [3.0, -4.0])


@pytest.mark.timeout(400)
def test_airflow_scheduler_killed_comes_back_alone(stack: Stack) -> None:
    stack.need("airflow")
    before = family(stack, "airflow-scheduler")
    assert len(before) > 1, "a scheduler and its workers"
    kill(stack, "airflow-scheduler")
    assert not before & family(stack, "airflow-scheduler"), "workers of the killed scheduler live on"
    user, password = airflow.login(stack.settings)
    url = f"http://127.0.0.1:{stack.settings.ports['airflow']}"
    assert get(f"{url}/auth/token", {"username": user, "password": password})[0] in (200, 201)
    assert get(f"{url}/auth/token", {"username": user, "password": "wrong"})[0] == 401


@pytest.mark.timeout(400)
def test_everything_up_stays_small_private_and_local(stack: Stack) -> None:
    stack.forja("up", "--json")
    state = stack.settings.state
    open_ = [str(p) for p in state.rglob("*") if not p.is_symlink() and not p.is_socket() and p.stat().st_mode & 0o077]
    assert not open_, "others may read these"
    import psutil

    mine = family(stack)
    listening = {c.laddr[0] for c in psutil.net_connections("tcp") if c.pid in mine and c.status == psutil.CONN_LISTEN and c.laddr}
    # Java writes an IPv4 address into an IPv6 socket.
    assert {a.removeprefix("::ffff:") for a in listening} == {"127.0.0.1"}
    total = sum(p["pss_bytes"] for p in stack.status().values()) / 2**30
    assert total < 2.5, f"{total:.2f} GiB"


def test_a_busy_port_is_named_with_its_holder_and_nothing_starts(small_stack: Stack) -> None:
    port = str(small_stack.settings.ports["mlflow"])
    holder = subprocess.Popen([sys.executable, "-m", "http.server", "--bind", "127.0.0.1", port], stderr=subprocess.DEVNULL)
    try:
        small_stack.wait("the holder", lambda: not ports.free(int(port)), 20)
        done = small_stack.forja("up", "--only", "mlflow,envoy", check=False)
    finally:
        holder.kill()
        holder.wait()
    assert done.returncode == 2
    for part in (port, "mlflow", str(holder.pid), "http.server", "FORJA_PORT_MLFLOW"):
        assert part in done.stderr
    assert not family(small_stack)


def test_down_leaves_nothing_and_a_killed_supervisor_is_recovered(small_stack: Stack) -> None:
    small_stack.need("envoy")
    assert small_stack.forja("status").returncode == 0
    os.kill(small_stack.status()["supervisor"]["pid"], signal.SIGKILL)
    small_stack.wait("its children's end", lambda: not family(small_stack), 15)
    assert small_stack.forja("status", check=False).returncode == 1
    small_stack.need("envoy")
    small_stack.forja("down")
    assert not family(small_stack)
    assert ports.free(small_stack.settings.ports["envoy"])
    small_stack.forja("down")


def test_a_changed_setting_restarts_only_what_it_changes(small_stack: Stack) -> None:
    small_stack.need("envoy", "kafka")
    before = small_stack.status()
    port = str(small_stack.settings.ports["triton"] - 1 + 40)
    small_stack.forja("up", "--only", "envoy,kafka", FORJA_PORT_ENVOY=port)
    after = {p["name"]: p for p in json.loads(small_stack.forja("status", "--json", FORJA_PORT_ENVOY=port).stdout)["programs"]}
    assert after["kafka"]["pid"] == before["kafka"]["pid"]
    assert after["envoy"]["pid"] != before["envoy"]["pid"]
    assert get(f"http://127.0.0.1:{port}")[0] == 503


def test_a_program_that_keeps_failing_is_shown_with_its_log(small_stack: Stack) -> None:
    small_stack.need("envoy")
    write(small_stack.settings.state / "conf" / "envoy.json", json.dumps({"env": {}}))
    os.kill(small_stack.status()["envoy"]["pid"], signal.SIGKILL)

    def shown() -> bool:
        """Between two tries the supervisor says backoff, during one it says starting."""
        done = small_stack.forja("status", check=False)
        return done.returncode == 1 and "backoff" in done.stdout

    small_stack.wait("its failure", shown, 30)
    assert "KeyError" in small_stack.forja("logs", "envoy", "-n", "5").stdout
    unknown = small_stack.forja("logs", "nothing", check=False)
    assert unknown.returncode == 2
    assert "envoy" in unknown.stderr
    small_stack.need("envoy")


@pytest.mark.timeout(120)
def test_killed_tests_leave_no_stack_behind() -> None:
    script = (
        "import os, signal, sys; from integration.conftest import new_stack\n"
        "with new_stack() as s: s.need('envoy'); print(s.settings.state, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'include'}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    state = done.stdout.strip()
    deadline = time.monotonic() + 30
    while launch.family(state) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not launch.family(state)
    with contextlib.suppress(OSError):
        subprocess.run(["rm", "-rf", state], check=True)
