"""Where Forja's things are, read from the environment alone: paths, ports and addresses.

Only the standard library is imported: the launcher reads this before any environment exists.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forja.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]

PORTS = {
    "airflow": 18080,
    "mlflow": 15000,
    "kafka": 19092,
    "kafka_controller": 19093,
    "envoy": 18000,
    "envoy_admin": 18001,
    "triton": 18100,
}
"""Default port of each service on 127.0.0.1. ``triton`` is the first of a range: six ports for each recipe."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that differs from place to place, apart from the profiles of the site file."""

    state: Path
    """Folder of this checkout's services, their data, logs and passwords (``FORJA_STATE``)."""
    cache: Path
    """Folder that checkouts share: environments and jars (``FORJA_CACHE``)."""
    site: str
    """Name of the site file in include/sites (``FORJA_SITE``)."""
    lake: str
    """URL of the object store: a folder, ``file://``, ``s3://bucket/prefix`` or ``memory://`` (``FORJA_LAKE``)."""
    kafka: str
    """Bootstrap server, host:port (``FORJA_KAFKA``)."""
    mlflow: str
    """Tracking server's URL (``MLFLOW_TRACKING_URI``)."""
    endpoint: str
    """URL that clients of the served models use (``FORJA_ENDPOINT``)."""
    ports: Mapping[str, int]
    """Port of each service on this machine (``FORJA_PORT_<NAME>``)."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the settings.

        Raises:
            BadInput: a port is no number from 1024 to 65535, or two services share one.
        """
        env = os.environ if env is None else env
        ports = {name: _port(env, name, default) for name, default in PORTS.items()}
        if len(set(ports.values())) != len(ports):
            raise BadInput("ports", value=dict(ports), allowed="each service a port of its own", do="change one FORJA_PORT_<NAME>")
        state = Path(env.get("FORJA_STATE") or ROOT / ".forja").absolute()
        cache_home = Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME") or "/root") / ".cache")
        return cls(
            state=state,
            cache=Path(env.get("FORJA_CACHE") or cache_home / "forja").absolute(),
            site=env.get("FORJA_SITE") or "local",
            lake=env.get("FORJA_LAKE") or str(state / "lake"),
            kafka=env.get("FORJA_KAFKA") or f"127.0.0.1:{ports['kafka']}",
            mlflow=env.get("MLFLOW_TRACKING_URI") or f"http://127.0.0.1:{ports['mlflow']}",
            endpoint=env.get("FORJA_ENDPOINT") or f"http://127.0.0.1:{ports['envoy']}",
            ports=ports,
        )


def _port(env: Mapping[str, str], name: str, default: int) -> int:
    variable = f"FORJA_PORT_{name.upper()}"
    text = env.get(variable) or str(default)
    if not text.isdigit() or not 1024 <= int(text) <= 65535:
        raise BadInput(f"environment variable {variable}", value=text, allowed="a port from 1024 to 65535")
    return int(text)
