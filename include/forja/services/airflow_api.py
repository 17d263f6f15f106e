"""Airflow's REST interface, as far as ``forja run`` needs it: trigger a DAG, follow its tasks, read what they say."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from forja.errors import ForjaError, Unavailable
from forja.services import airflow
from forja.settings import Settings

ENDED = ("success", "failed")
APPEAR_S = 60.0
"""Longest wait for a DAG to be parsed after Airflow started."""


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One task of a run."""

    task: str
    map_index: int
    label: str
    state: str
    """none, scheduled, queued, running, deferred, success, failed, skipped, up_for_retry, upstream_failed, ..."""
    started: str
    ended: str
    seconds: float
    tries: int


class Airflow:
    """A session with the api-server of this machine."""

    def __init__(self, settings: Settings) -> None:
        import httpx

        self.url = f"http://127.0.0.1:{settings.ports['airflow']}"
        self._login = airflow.login(settings)
        # No proxy: the server is on this machine.
        self._http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def __enter__(self) -> Self:
        user, password = self._login
        token = self._ask("POST", "/auth/token", json={"username": user, "password": password})["access_token"]
        self._http.headers["Authorization"] = f"Bearer {token}"
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    def _ask(self, method: str, path: str, missing: Any = None, **options: Any) -> Any:
        """The answer's JSON; ``missing`` for 404 when it is given."""
        import httpx

        for attempt in range(20):
            try:
                answer = self._http.request(method, path, **options)
            except httpx.TransportError as error:
                # The api-server may be restarting; the supervisor brings it back.
                if method != "GET" or attempt == 19:
                    raise Unavailable("Airflow doesn't answer", value=self.url, do="./forja status; ./forja logs airflow-api") from error
                time.sleep(1)
                continue
            if answer.status_code == 404 and missing is not None:
                return missing
            if answer.status_code >= 400:
                raise ForjaError(f"Airflow refused {method} {path}", value=f"{answer.status_code}: {answer.text[:300]}")
            return answer.json()
        raise AssertionError

    def wait_for_dag(self, dag: str) -> None:
        """Wait until the DAG's file has been parsed.

        Raises:
            ForjaError: its file doesn't import; the message holds the traceback's end.
        """
        deadline = time.monotonic() + APPEAR_S
        while time.monotonic() < deadline:
            found = self._ask("GET", "/api/v2/dags", params={"dag_id_pattern": dag, "limit": 100})
            if any(d["dag_id"] == dag for d in found["dags"]):
                return
            for error in self._ask("GET", "/api/v2/importErrors")["import_errors"]:
                if Path(error["filename"]).stem == dag.removesuffix("_ingest"):
                    raise ForjaError(f"DAG file {error['filename']} doesn't import", value=error["stack_trace"][-600:])
            time.sleep(0.5)
        raise ForjaError(
            f"Airflow has no DAG {dag}", do=f"is there a file dags/{dag.removesuffix('_ingest')}.py? ./forja logs airflow-dag-processor"
        )

    def trigger(self, dag: str, run_id: str, conf: dict[str, Any]) -> None:
        """Start a run by hand."""
        self._ask("POST", f"/api/v2/dags/{dag}/dagRuns", json={"dag_run_id": run_id, "logical_date": None, "conf": conf})

    def run(self, dag: str, run_id: str) -> dict[str, Any]:
        """A run as the API describes it: state, start_date, end_date, ..."""
        found: dict[str, Any] = self._ask("GET", f"/api/v2/dags/{dag}/dagRuns/{run_id}")
        return found

    def tasks(self, dag: str, run_id: str) -> list[TaskRun]:
        """Tasks of a run; a mapped one counts once for each member."""
        found = self._ask("GET", f"/api/v2/dags/{dag}/dagRuns/{run_id}/taskInstances", params={"limit": 200})
        return [
            TaskRun(
                task=t["task_id"], map_index=t["map_index"], label=t.get("rendered_map_index") or "", state=t["state"] or "none",
                started=t["start_date"] or "", ended=t["end_date"] or "", seconds=float(t["duration"] or 0),
                tries=int(t["try_number"] or 0),
            )
            for t in found["task_instances"]
        ]  # fmt: skip

    def xcom(self, dag: str, run_id: str, task: TaskRun, key: str = "return_value") -> Any:
        """A value that a task pushed, None when it pushed none."""
        path = f"/api/v2/dags/{dag}/dagRuns/{run_id}/taskInstances/{task.task}/xcomEntries/{key}"
        answer = self._ask("GET", path, params={"map_index": task.map_index}, missing={"value": None})
        return answer["value"]

    def log(self, dag: str, run_id: str, task: TaskRun) -> list[str]:
        """Lines of the last try's log."""
        path = f"/api/v2/dags/{dag}/dagRuns/{run_id}/taskInstances/{task.task}/logs/{max(task.tries, 1)}"
        found = self._ask("GET", path, params={"map_index": task.map_index, "full_content": True}, headers={"Accept": "application/json"})
        return [line for entry in found["content"] for line in _lines(entry)]

    def follow(self, dag: str, run_id: str, seen: Callable[[list[TaskRun]], None], *, limit_s: float) -> str:
        """Tell ``seen`` about the tasks until the run ends; its state.

        Raises:
            Unavailable: it hasn't ended after ``limit_s`` seconds.
        """
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            state = str(self.run(dag, run_id)["state"])
            seen(self.tasks(dag, run_id))
            if state in ENDED:
                return state
            time.sleep(0.3)
        raise Unavailable(f"run {run_id} of {dag} hasn't ended after {limit_s:.0f} s", do=f"{self.url}/dags/{dag}/runs/{run_id}")

    def page(self, dag: str, run_id: str) -> str:
        """Address of a run in the UI."""
        return f"{self.url}/dags/{dag}/runs/{run_id}"


def _lines(entry: Any) -> list[str]:
    """Text of one log entry; of an exception its type and message, without the frames."""
    if not isinstance(entry, dict):
        return [str(entry)]
    event = str(entry.get("event", ""))
    errors = [f"{e.get('exc_type')}: {e.get('exc_value')}" for e in entry.get("error_detail") or []]
    return ([] if event.startswith("::") else [event]) + errors
