"""What pods need beside the cluster, as processes on the node's address: object storage, Kafka, MLflow. Ended by their process ids."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.kit.build import binary
from cluster.kit.places import ROOT, places
from cluster.kit.versions import NODE_IP

from forja import envs
from forja.services import kafka, mlflow, probes
from forja.services.folders import private, secret, write
from forja.settings import Settings

S3_PORT, KAFKA_PORT, MLFLOW_PORT = 7070, 9092, 5000
BUCKET = "forja"
ADDRESSES = {"s3": S3_PORT, "kafka": KAFKA_PORT, "mlflow": MLFLOW_PORT}
"""Port of each Service in namespace forja, which is also that of the process behind it."""


def lake_env(settings: Settings) -> dict[str, str]:
    """Variables with which anything reaches the lake: those of the Secret forja-lake."""
    return {
        "AWS_ACCESS_KEY_ID": "forja-tests",
        "AWS_SECRET_ACCESS_KEY": secret(settings, "s3-key"),
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://s3.forja.svc:{S3_PORT}",
        "AWS_ALLOW_HTTP": "true",
    }


WATCH = """
import subprocess, sys
forja, include, family = sys.argv[1:]
sys.path[:0] = [include]
from forja.services import launch
sys.stdin.read()
subprocess.run([forja, "down"], stdout=subprocess.DEVNULL)
launch.end(family)
"""
"""Waits until its pipe closes, which happens however the tests end; then stops Airflow and all families of processes."""


@contextlib.contextmanager
def watched(settings: Settings, env: Mapping[str, str]) -> Iterator[None]:
    """Whatever runs for this state folder is ended with the block, and with this process, even when that is killed."""
    command = [sys.executable, "-c", WATCH, ROOT / "forja", ROOT / "include", _family(settings.state)]
    watcher = subprocess.Popen(command, env=dict(env), stdin=subprocess.PIPE, start_new_session=True)
    assert watcher.stdin is not None
    try:
        yield
    finally:
        watcher.stdin.close()
        watcher.wait(timeout=90)


def _family(state: Path) -> str:
    """Mark of the processes of this module; not the state folder itself, whose processes ``./forja up`` ends as left behind."""
    return f"{state}/beside"


class Processes:
    """Processes that end with the block, and with their children when ``watched``."""

    def __init__(self, state: Path) -> None:
        self._family, self._logs, self._running = _family(state), private(state / "log"), dict[str, subprocess.Popen[bytes]]()

    def start(self, name: str, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        """Start a process, its output in a file of its name."""
        mark = {"FORJA_STATE": self._family, "FORJA_PROGRAM": name}
        with (self._logs / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                list(map(str, command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **(env or {}), **mark}, cwd=cwd, start_new_session=True,
            )  # fmt: skip

    def wait(self, name: str, answers: Callable[[], object], seconds: float = 90) -> None:
        """Wait until a process answers; an error counts as no, its end doesn't."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._running[name].poll() is None:
            with contextlib.suppress(OSError, ValueError, KeyError):
                if answers():
                    return
            time.sleep(0.2)
        raise AssertionError(f"{name} doesn't answer; its last words: {(self._logs / f'{name}.log').read_text(errors='replace')[-1500:]}")

    def stop(self) -> None:
        """SIGTERM to all and to what they started, SIGKILL after ten seconds."""
        for wanted, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
            for process in self._running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, wanted)
            for process in self._running.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)


def start_s3(processes: Processes, settings: Settings) -> None:
    """versitygw on a folder, with one bucket."""
    data = settings.state / "s3"
    (data / BUCKET).mkdir(parents=True)
    env = lake_env(settings)
    keys = {"ROOT_ACCESS_KEY": env["AWS_ACCESS_KEY_ID"], "ROOT_SECRET_KEY": env["AWS_SECRET_ACCESS_KEY"]}
    options = ("--port", f"{NODE_IP}:{S3_PORT}", "--region", env["AWS_REGION"], "--quiet")
    sidecar = private(settings.state / "objects-metadata")  # works on any file system
    processes.start("s3", [binary(places(), "versitygw"), *options, "posix", "--sidecar", sidecar, data], env=keys)
    processes.wait("s3", lambda: _answers(f"http://{NODE_IP}:{S3_PORT}/"))


def start_kafka(processes: Processes, settings: Settings) -> None:
    """The product's Kafka, listening where pods reach it and known by its Service's name."""
    folder = private(settings.state / "kafka")
    there = f"PLAINTEXT://127.0.0.1:{KAFKA_PORT}"
    text = kafka.properties(settings).replace(
        f"advertised.listeners={there}", f"advertised.listeners=PLAINTEXT://kafka.forja.svc:{KAFKA_PORT}"
    )
    write(folder / "server.properties", text.replace(f"listeners={there}", f"listeners=PLAINTEXT://{NODE_IP}:{KAFKA_PORT}"))
    program = kafka.programs(settings)[0]
    java, *_, classes, _, config = program.command
    tool = [java, "-cp", classes, "kafka.tools.StorageTool", "format", "-t", secret(settings, "kafka-cluster-id", kafka._cluster_id)]
    subprocess.run([*tool, "-c", config], check=True, capture_output=True, cwd=folder)
    processes.start("kafka", program.command, cwd=folder)
    processes.wait("kafka", lambda: probes.kafka_ok(f"{NODE_IP}:{KAFKA_PORT}"))


def start_mlflow(processes: Processes, settings: Settings) -> None:
    """The product's MLflow, listening where pods reach it."""
    mlflow.prepare(settings)
    program = mlflow.programs(settings)[0]
    command = [NODE_IP if word == "127.0.0.1" else word for word in program.command]
    names = ",".join(f"{host}:{MLFLOW_PORT}" for host in ("mlflow.forja.svc", NODE_IP, "localhost", "127.0.0.1"))
    python = envs.python("control", settings)
    processes.start("mlflow", [*command, "--allowed-hosts", names], env={**program.env, "PATH": f"{python.parent}:{os.environ['PATH']}"})
    processes.wait("mlflow", lambda: probes.http_ok(f"http://{NODE_IP}:{MLFLOW_PORT}/health"))


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()  # noqa: S310 - http
    except urllib.error.HTTPError:
        return True  # it wants a signature
    return True


@contextlib.contextmanager
def all_of_them(settings: Settings) -> Iterator[Processes]:
    """Object storage, Kafka and MLflow, until the end of the block."""
    for name, port in ADDRESSES.items():
        free(name, NODE_IP, port)
    processes = Processes(settings.state)
    try:
        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(start, processes, settings) for start in (start_s3, start_kafka, start_mlflow)]:
                done.result()
        yield processes
    finally:
        processes.stop()


def free(name: str, host: str, port: int) -> None:
    """Refuse an address on which somebody listens: what answers there would be taken for ours."""
    with socket.socket() as probe:
        taken = probe.connect_ex((host, port)) == 0
    assert not taken, f"{name}: something listens on {host}:{port} already; end it first (ss -ltnp names it)"
