"""MLflow's tracking server and model registry: SQLite and artifacts under the state folder."""

from __future__ import annotations

from forja import envs
from forja.services import probes
from forja.services.folders import private
from forja.services.program import Port, Program
from forja.settings import Settings


def programs(settings: Settings) -> list[Program]:
    """The one program, ready when /health answers."""
    python = envs.python("control", settings)
    folder = settings.state / "mlflow"
    port = settings.ports["mlflow"]
    options = (
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination", (folder / "artifacts").as_uri(), "--serve-artifacts",
    )  # fmt: skip
    return [
        Program(
            name="mlflow",
            service="mlflow",
            command=(str(python), str(python.parent / "mlflow"), "server", *options),
            cwd=folder,
            env={
                # Without the job runner 2 processes and 0.5 GB instead of 10 and 2 GB.
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "DO_NOT_TRACK": "true",
            },
            ports=(Port(number=port, setting="mlflow"),),
            ready=lambda started: probes.http_ok(f"http://127.0.0.1:{port}/health"),
            stop_group=True,
        )
    ]


def prepare(settings: Settings) -> None:
    """Make the folders."""
    private(settings.state / "mlflow" / "artifacts")
