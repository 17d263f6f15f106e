"""MLflow runs: metrics while they come, and a full series even if MLflow was away.

A point is a metric's value at a step, and a step is sent once: a retry that does an epoch again leaves the point of the
first try. What a run that ended couldn't send, ``register`` sends from the history in the lake.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from forja.errors import Unavailable

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY_TAG = "forja.key"
FLUSH_S = 10.0
"""Seconds that a finished training waits for MLflow to take the rest of its points."""


def client(uri: str) -> MlflowClient:
    """A client that gives up fast; the caller repeats."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # Without this a model carries this project's own lock files along.
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")
    # Its import sets the level again, from this variable.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


class reachable:
    """Turn the client's ways to say that MLflow doesn't answer into Unavailable."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None or error is None:
            return
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException

        away = isinstance(error, RequestException | ConnectionError)
        if isinstance(error, MlflowException):
            away = getattr(error, "error_code", "") in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")
        if away:
            raise Unavailable(
                "MLflow doesn't answer", value=self.uri, do="./forja status, then ./forja up; the run goes on from here"
            ) from error


def run_for(mlflow: MlflowClient, experiment: str, key: str, name: str, tags: Mapping[str, str]) -> str:
    """Id of the run of some work, made when there is none: a retry goes on in the run of the first try."""
    found = mlflow.get_experiment_by_name(experiment)
    experiment_id = found.experiment_id if found else _create_experiment(mlflow, experiment)
    runs = mlflow.search_runs(
        [experiment_id], filter_string=f"tags.`{KEY_TAG}` = '{key}'", max_results=1, order_by=["attributes.start_time ASC"]
    )
    if runs:
        return str(runs[0].info.run_id)
    run = mlflow.create_run(experiment_id, run_name=name, tags={KEY_TAG: key, **tags})
    return str(run.info.run_id)


def _create_experiment(mlflow: MlflowClient, name: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        # Without this tag its pages open on an empty view of chat traces instead of the training runs.
        return str(mlflow.create_experiment(name, tags={"mlflow.experimentKind": "custom_model_development"}))
    except MlflowException:
        found = mlflow.get_experiment_by_name(name)  # somebody else was faster
        if found is None:
            raise
        return str(found.experiment_id)


def taken(mlflow: MlflowClient, run: str) -> set[tuple[str, int]]:
    """Metric and step of every point that a run has."""
    names = mlflow.get_run(run).data.metrics
    return {(name, int(point.step)) for name in names for point in mlflow.get_metric_history(run, name)}


def send(mlflow: MlflowClient, run: str, points: Iterable[Mapping[str, Any]], have: Collection[tuple[str, int]]) -> None:
    """Send the points of a history that the run doesn't ``have``: ``{"step": 1, "time": 1700000000.0, "metrics": {"loss": 0.3}}``."""
    from mlflow.entities import Metric

    metrics = [
        Metric(name, float(value), int(p["time"] * 1000), int(p["step"]))
        for p in points
        for name, value in p["metrics"].items()
        if (name, int(p["step"])) not in have
    ]
    for start in range(0, len(metrics), 500):
        mlflow.log_batch(run, metrics=metrics[start : start + 500])


@dataclass(kw_only=True)
class RunLog:
    """Sends points in a thread, so that training never waits for MLflow and never fails with it."""

    uri: str
    experiment: str
    key: str
    name: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    run: str | None = None
    _points: list[Mapping[str, Any]] = field(default_factory=list)
    _sent: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def add(self, point: Mapping[str, Any]) -> None:
        """Queue one point."""
        self._points.append(point)

    def close(self) -> tuple[str | None, int]:
        """Wait ``FLUSH_S`` at most for the rest.

        Returns:
            The run's id, None when MLflow never answered, and how many points it has not taken.
        """
        deadline = time.monotonic() + FLUSH_S
        while (self.run is None or self._sent < len(self._points)) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._stop.set()
        return self.run, len(self._points) - self._sent

    def _work(self) -> None:
        mlflow, have = None, set[tuple[str, int]]()
        while not self._stop.is_set():
            try:
                mlflow = mlflow or client(self.uri)
                if self.run is None:
                    run = run_for(mlflow, self.experiment, self.key, self.name, self.tags)
                    for name, value in self.params.items():
                        mlflow.log_param(run, name, value)
                    # Epochs after the last checkpoint are done twice; the first try sent them already.
                    have = taken(mlflow, run)
                    self.run = run
                points = self._points[self._sent :]
                send(mlflow, self.run, points, have)
                self._sent += len(points)
            except Exception as error:
                print(f"MLflow at {self.uri} doesn't take metrics now, training goes on: {type(error).__name__}", flush=True)
                self._stop.wait(2.0)
            self._stop.wait(0.2)
