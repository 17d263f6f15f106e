"""The platform that cluster tests share: object storage, Kafka, MLflow and Airflow's four parts, beside a running cluster.

All of it runs in the cluster's network: ``python -m cluster.kit exec -- python -m pytest tests/cluster``. Airflow is the product's own,
``./forja up --only airflow`` with FORJA_SITE=small-cluster, in a state folder of its own; beside the product's DAGs it has those of
tests/cluster/dags. Tests ask for the fixture ``platform``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import access, services
from cluster.kit.places import ROOT, places

from forja import kube
from forja.errors import ForjaError
from forja.kube import Kube
from forja.lake import Lake
from forja.services import airflow, airflow_api, launch, supervisor
from forja.services.airflow_api import TaskRun
from forja.services.folders import private
from forja.settings import Settings
from forja.sites import Site, load_site

SITE = "small-cluster"
DAGS = Path(__file__).parent / "dags"
BUNDLE = "airflow.dag_processing.bundles.local.LocalDagBundle"

CONFIG = f"""[dag_processor]
dag_bundle_config_list = [
    {{"name": "dags-folder", "classpath": "{BUNDLE}", "kwargs": {{}}}},
    {{"name": "tests", "classpath": "{BUNDLE}", "kwargs": {{"path": "{DAGS}"}}}}]
[scheduler]
task_instance_heartbeat_timeout = 20
task_instance_heartbeat_timeout_detection_interval = 3
orphaned_tasks_check_interval = 10
"""
"""What tests set beside the product: their own DAGs, and a dead task is noticed within half a minute instead of five."""


@dataclass(frozen=True, kw_only=True)
class Platform:
    """The running platform, and what tests do with it."""

    settings: Settings
    site: Site
    env: Mapping[str, str]
    """Environment of processes that use it: the lake, Kafka, MLflow, Airflow's state folder."""
    kube: Kube
    """The cluster as its administrator."""
    kubeconfig: Path
    """The administrator's."""
    accounts: Path
    """Folder with the kubeconfig of each service account of namespace forja: ``forja-launcher.kubeconfig`` and so on."""
    airflow: airflow_api.Airflow

    @property
    def lake_env(self) -> dict[str, str]:
        """Variables with which anything reaches the lake."""
        return services.lake_env(self.settings)

    @property
    def lake(self) -> Lake:
        """The lake that stages and Airflow use."""
        return Lake(self.settings.lake)

    def forja(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ./forja against this platform."""
        done = subprocess.run([ROOT / "forja", *arguments], env=dict(self.env), capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"./forja {' '.join(arguments)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def trigger(self, dag: str, conf: Mapping[str, Any] | None = None, run: str = "") -> str:
        """Start a run by hand, once its DAG is there; its id."""
        run = run or f"test-{uuid.uuid4().hex[:8]}"
        self.airflow.wait_for_dag(dag)
        self._tell(lambda: self.airflow.trigger(dag, run, dict(conf or {})))
        return run

    def wait(self, dag: str, run: str, seconds: float = 180) -> str:
        """Wait for a run's end: success or failed."""
        self.until(f"the end of {run} of {dag}", lambda: self.airflow.run(dag, run)["state"] in airflow_api.ENDED, seconds)
        return str(self.airflow.run(dag, run)["state"])

    def tasks(self, dag: str, run: str) -> dict[str, TaskRun]:
        """Tasks of a run by name; of a mapped one the last member."""
        return {task.task: task for task in self.airflow.tasks(dag, run)}

    def wait_task(self, dag: str, run: str, task: str, *states: str, seconds: float = 120) -> TaskRun:
        """Wait until a task is in one of these states."""
        self.until(f"{task} of {run} to be {' or '.join(states)}", lambda: self.tasks(dag, run)[task].state in states, seconds)
        return self.tasks(dag, run)[task]

    def log(self, dag: str, run: str, task: str, tries: int = 0) -> str:
        """Log of a task's last try, or of another."""
        found = self.tasks(dag, run)[task]
        return "\n".join(self.airflow.log(dag, run, dataclasses.replace(found, tries=tries or found.tries)))

    def end_task(self, dag: str, run: str, task: str, state: str = "failed") -> None:
        """What a person does with the buttons: mark a task failed or success."""
        path = f"/api/v2/dags/{dag}/dagRuns/{run}/taskInstances/{task}"
        self._tell(lambda: self.airflow._ask("PATCH", path, json={"new_state": state}))

    def clear_task(self, dag: str, run: str, task: str) -> None:
        """What a person does with the buttons: clear a task, so that it runs again."""
        what = {"dry_run": False, "task_ids": [task], "dag_run_id": run, "only_failed": False, "reset_dag_runs": True}
        self._tell(lambda: self.airflow._ask("POST", f"/api/v2/dags/{dag}/clearTaskInstances", json=what))

    def _tell(self, what: Callable[[], object], times: int = 6) -> None:
        """Do it, again when Airflow's SQLite was locked for longer than it waits: it has one writer, and this machine is busy."""
        for left in reversed(range(times)):
            try:
                what()
                return
            except ForjaError as error:
                if "409" in str(error):  # the first time it was done after all
                    return
                if left == 0 or "Database error" not in str(error):
                    raise

    def pods(self, namespace: str, labels: str = "app.kubernetes.io/managed-by=forja") -> list[dict[str, Any]]:
        """Pods of a namespace."""
        return self.kube.list("Pod", namespace, labels=labels)

    def kill(self, part: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Kill one of Airflow's parts, for example ``airflow-scheduler``; the supervisor starts it again. Its old process id."""
        pid = supervisor.process(self.settings, part).pid
        os.kill(pid, number)
        return pid

    def task_processes(self, dag: str, run: str, task: str) -> tuple[int, int]:
        """Process ids of the LocalExecutor worker that runs a task now, and of the task itself."""
        there = self.airflow._ask("GET", f"/api/v2/dags/{dag}/dagRuns/{run}/taskInstances/{task}")["id"]
        found = {}
        for pid in launch.family(str(self.settings.state), "airflow-scheduler"):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if there in line:
                    found["LocalExecutor" in line] = pid
        return found[True], found[False]

    def wait_part(self, part: str, seconds: float = 90) -> None:
        """Wait until a part of Airflow that was killed is healthy again."""
        self.until(f"{part} to be back", lambda: self._healthy(part), seconds)

    def _healthy(self, part: str) -> bool:
        process = supervisor.process(self.settings, part)
        return process.state == "running" and airflow.healthy(self.airflow.url, part, process.started)

    def until(self, what: str, ask: Callable[[], object], seconds: float = 90) -> None:
        """Wait until ``ask()`` is true; an error counts as no."""
        deadline, last = time.monotonic() + seconds, "no"
        while time.monotonic() < deadline:
            try:
                if ask():
                    return
            except Exception as error:
                last = f"{type(error).__name__}: {error}"
            time.sleep(0.3)
        raise AssertionError(f"not within {seconds} s: {what}; last answer: {last}")


@contextlib.contextmanager
def running() -> Iterator[Platform]:
    """The platform, until the end of the block. Needs the cluster, and to run inside its network, where there is room for one."""
    with (places().state / "platform.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = Path(tempfile.mkdtemp(prefix="forja-cluster-"))
        try:
            yield from _started(state)
        finally:
            shutil.rmtree(state, ignore_errors=True)


def _started(state: Path) -> Iterator[Platform]:
    env = environment(state)
    with _as_environment(env), services.watched(Settings.from_env(), env), ThreadPoolExecutor(1) as pool:
        settings, admin = Settings.from_env(), kube.connect(places().kubeconfig)
        access.install(admin, load_site(SITE), services.ADDRESSES, services.lake_env(settings))
        up = pool.submit(_airflow, settings, env)
        with services.all_of_them(settings):
            up.result()
            with airflow_api.Airflow(settings) as session:
                _connect(admin, session, settings)
            with attached(state) as made:
                yield made


@contextlib.contextmanager
def attached(state: Path) -> Iterator[Platform]:
    """A platform that runs already, by its state folder."""
    env = environment(state)
    with _as_environment(env), airflow_api.Airflow(Settings.from_env()) as session:
        yield Platform(
            settings=Settings.from_env(), site=load_site(SITE), env=env, kube=kube.connect(places().kubeconfig),
            kubeconfig=places().kubeconfig, accounts=state / "accounts", airflow=session,
        )  # fmt: skip


@contextlib.contextmanager
def _as_environment(env: Mapping[str, str]) -> Iterator[None]:
    """Make this process's environment the platform's: what a test asks here, it asks of what Airflow asks."""
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(env)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def environment(state: Path) -> dict[str, str]:
    """Environment of everything of the platform; nothing of a proxy, another stack or another cluster."""
    strange = ("FORJA_", "AIRFLOW_", "MLFLOW_", "AWS_", "KUBE")
    env = {k: v for k, v in os.environ.items() if not k.startswith(strange) and "proxy" not in k.lower()}
    cache = os.environ.get("FORJA_CACHE")
    env |= {"FORJA_CACHE": cache} if cache else {}
    ports = {"FORJA_PORT_KAFKA": str(services.KAFKA_PORT), "FORJA_PORT_MLFLOW": str(services.MLFLOW_PORT)}
    env |= {"FORJA_STATE": str(state), "FORJA_SITE": SITE, "FORJA_LAKE": f"s3://{services.BUCKET}/lake", **ports}
    site = load_site(SITE)
    env |= {k: v for k, v in site.profile("light").env.items() if k != "FORJA_LAKE"}
    return {**env, **services.lake_env(Settings.from_env(env)), "NO_PROXY": "*"}


def _airflow(settings: Settings, env: Mapping[str, str]) -> None:
    home = private(settings.state / "airflow")
    (home / "airflow.cfg").write_text(CONFIG)
    done = subprocess.run([ROOT / "forja", "up", "--only", "airflow"], env=dict(env), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def _connect(admin: Kube, session: airflow_api.Airflow, settings: Settings) -> None:
    """Give Airflow its connections to the cluster, each with the token of its own service account."""
    folder = private(settings.state / "accounts")
    for connection, account in access.accounts().items():
        path = access.kubeconfig(admin, places().kubeconfig, account, folder)
        extra = json.dumps({"kube_config_path": str(path)})
        session._ask("POST", "/api/v2/connections", json={"connection_id": connection, "conn_type": "kubernetes", "extra": extra})


def main() -> None:
    """Start the platform, say how tests attach to it, and hold it until standard input ends or SIGINT: for work on the tests."""
    with running() as made:
        print(f"FORJA_PLATFORM={made.settings.state}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            sys.stdin.read()


if __name__ == "__main__":
    main()
