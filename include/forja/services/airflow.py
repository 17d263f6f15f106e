"""Airflow's four parts on this machine: LocalExecutor on SQLite, one user, everything configured by environment.

Only its command line and its HTTP interface are used: nothing here imports it.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from forja import envs
from forja.errors import Unavailable
from forja.services import probes
from forja.services.folders import load_json, locked, private, secret, write, write_if_new
from forja.services.program import Port, Program
from forja.settings import PORTS, ROOT, Settings
from forja.sites import load_site

USER = "admin"

PARTS = {
    "airflow-api": ("api-server",),
    # Task logs lie on this machine, so nobody needs to serve them.
    "airflow-scheduler": ("scheduler", "--skip-serve-logs"),
    "airflow-dag-processor": ("dag-processor",),
    "airflow-triggerer": ("triggerer", "--skip-serve-logs"),
}
"""Program and its airflow command."""


def programs(settings: Settings) -> list[Program]:
    """The four parts. The api-server is ready when it answers, the others when it has seen their heartbeat."""
    env = environment(settings)
    command = _command(settings)
    port = settings.ports["airflow"]
    base = f"http://127.0.0.1:{port}"
    return [
        Program(
            name=name,
            service="airflow",
            command=(*command, *arguments),
            cwd=settings.state / "airflow",
            env=env,
            ports=(Port(number=port, setting="airflow"),) if name == "airflow-api" else (),
            ready=lambda started, name=name: healthy(base, name, started),  # type: ignore[misc]
            stop_seconds=10,
        )
        for name, arguments in PARTS.items()
    ]


def environment(settings: Settings) -> dict[str, str]:
    """Variables that every part, task and ``airflow`` command needs; they hold secrets."""
    home = settings.state / "airflow"
    url = f"http://127.0.0.1:{settings.ports['airflow']}"
    options = {
        "core__dags_folder": ROOT / "dags",
        "core__plugins_folder": ROOT / "plugins",
        "core__load_examples": False,
        "core__executor": "LocalExecutor",
        # Worker processes that LocalExecutor keeps alive: 32 of them take 600 MiB more than 6.
        "core__parallelism": 6,
        "core__execution_api_server_url": f"{url}/execution/",
        "core__fernet_key": secret(settings, "airflow-fernet-key", lambda: base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()),
        "core__auth_manager": "airflow.api_fastapi.auth.managers.simple.simple_auth_manager.SimpleAuthManager",
        "core__simple_auth_manager_users": f"{USER}:admin",
        "core__simple_auth_manager_passwords_file": _passwords(settings),
        "database__sql_alchemy_conn": f"sqlite:///{home / 'airflow.db'}",
        "api__host": "127.0.0.1",
        "api__port": settings.ports["airflow"],
        "api__base_url": url,
        "api__workers": 1,
        "api__secret_key": secret(settings, "airflow-api-key"),
        "api__expose_config": False,
        "api_auth__jwt_secret": secret(settings, "airflow-jwt", lambda: secrets.token_urlsafe(64)),
        # A task starts 0.2 to 0.4 s after the one before it, instead of 1.1 s; its slot is free 1 s after its end, instead of 5 s.
        "scheduler__scheduler_idle_sleep_time": 0.1,
        "workers__min_heartbeat_interval": 1,
        # A new DAG file shows within ten seconds.
        "dag_processor__refresh_interval": 5,
        "dag_processor__bundle_refresh_check_interval": 2,
        "dag_processor__parsing_processes": 1,
        "logging__base_log_folder": home / "logs",
        "logging__dag_processor_child_process_log_directory": home / "logs" / "dag_processor",
        "logging__file_task_handler_new_folder_permissions": "0o700",
        "logging__file_task_handler_new_file_permissions": "0o600",
        "logging__colored_console_log": False,
    }
    return {
        **{f"AIRFLOW__{key.upper()}": str(value) for key, value in options.items()},
        "AIRFLOW_HOME": str(home),
        **_connections(settings),
        **_own(settings),
        "PYTHONPATH": f"{ROOT / 'include'}:{ROOT / 'plugins'}",
        "DO_NOT_TRACK": "1",
        # Airflow's own use of pathspec, which it would put into every task's log.
        "PYTHONWARNINGS": "ignore:GitWildMatchPattern:DeprecationWarning",
        # setproctitle would overwrite the variables that tell whose process this is.
        "SPT_NOENV": "1",
        "NO_PROXY": ",".join(x for x in (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1", "localhost") if x),
    }


def _connections(settings: Settings) -> dict[str, str]:
    """Connections: each says which variables a stage gets from it."""
    env = {
        "forja_lake": {"FORJA_LAKE": settings.lake},
        "forja_kafka": {"FORJA_KAFKA": settings.kafka},
        "forja_mlflow": {"MLFLOW_TRACKING_URI": settings.mlflow},
    }
    return {f"AIRFLOW_CONN_{k.upper()}": json.dumps({"conn_type": "generic", "extra": {"env": v}}) for k, v in env.items()}


def _own(settings: Settings) -> dict[str, str]:
    """Forja's own settings, as whoever ran ``forja up`` had them: tasks have them from the connections, pages from here."""
    ports = {f"FORJA_PORT_{name.upper()}": str(settings.ports[name]) for name in PORTS}
    places = {"FORJA_STATE": str(settings.state), "FORJA_CACHE": str(settings.cache), "FORJA_LAKE": settings.lake}
    addresses = {"FORJA_KAFKA": settings.kafka, "MLFLOW_TRACKING_URI": settings.mlflow, "FORJA_ENDPOINT": settings.endpoint}
    return {**ports, **places, **addresses, "FORJA_SITE": settings.site}


def login(settings: Settings) -> tuple[str, str]:
    """User and password of the UI; the password is generated on first use."""
    return USER, secret(settings, "airflow-password")


def _passwords(settings: Settings) -> Path:
    return settings.state / "secrets" / "airflow-passwords.json"


def prepare(settings: Settings) -> None:
    """Make or migrate the database once for each version of Airflow, and the pools of the site once for each change.

    Raises:
        Unavailable: an airflow command failed; the message holds its last words.
    """
    home = private(settings.state / "airflow")
    user, password = login(settings)
    write_if_new(_passwords(settings), json.dumps({user: password}) + "\n")
    wanted = pools(settings)
    version = envs.python("control", settings).parents[1].name
    command, env = _command(settings), {**os.environ, **environment(settings)}
    with locked(settings, "airflow"):
        done = load_json(home / "prepared.json")
        if done.get("environment") != version or not (home / "airflow.db").is_file():
            run(command, "db", "migrate", env=env, cwd=home)
            done = {"environment": version}
            write(home / "prepared.json", json.dumps(done))
        if done.get("pools") != wanted:
            write(home / "pools.json", json.dumps(wanted, indent=1))
            run(command, "pools", "import", str(home / "pools.json"), env=env, cwd=home)
            write(home / "prepared.json", json.dumps({**done, "pools": wanted}))


def pools(settings: Settings) -> dict[str, dict[str, Any]]:
    """The site's pools, as ``airflow pools import`` reads them."""
    site = load_site(settings.site)
    return {name: {"slots": slots, "description": f"site {site.name}", "include_deferred": False} for name, slots in site.pools.items()}


def _command(settings: Settings) -> tuple[str, str]:
    python = envs.python("control", settings)
    return str(python), str(python.parent / "airflow")


def run(command: Sequence[str], *arguments: str, env: Mapping[str, str], cwd: Path) -> None:
    """Run an airflow command to its end; Unavailable with its last words when it fails."""
    done = subprocess.run([*command, *arguments], env=env, cwd=cwd, capture_output=True, text=True, check=False, umask=0o077)
    if done.returncode:
        raise Unavailable(f"airflow {' '.join(arguments)} failed", value=(done.stdout + done.stderr)[-800:])


def healthy(base: str, name: str, started: float = 0.0) -> bool:
    """Whether a part is healthy by the word of the api-server at ``base``.

    A heartbeat from before ``started``, in seconds since 1970, is its predecessor's.
    """
    health = probes.http_json(f"{base}/api/v2/monitor/health")
    if name == "airflow-api":
        return bool(health)
    part = name.removeprefix("airflow-").replace("-", "_")
    heartbeat = health.get(part, {}).get(f"latest_{part}_heartbeat")
    return bool(heartbeat) and health[part]["status"] == "healthy" and datetime.fromisoformat(heartbeat).timestamp() >= started
