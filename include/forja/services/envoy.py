"""Envoy: one listener for the clients of all models. Its routes and clusters are files that the router rewrites."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from forja import envs
from forja.services import probes
from forja.services.folders import write, write_if_new
from forja.services.program import Port, Program
from forja.settings import Settings

ROUTES = "forja"
"""Name of the route configuration in rds.yaml."""

TYPE = "type.googleapis.com/envoy"


def rds(settings: Settings) -> Path:
    """The file with the routes: replaced by renaming, never written in place."""
    return settings.state / "envoy" / "rds.yaml"


def cds(settings: Settings) -> Path:
    """The file with the clusters: replaced by renaming, never written in place."""
    return settings.state / "envoy" / "cds.yaml"


def programs(settings: Settings) -> list[Program]:
    """The one program, ready when its admin interface says LIVE."""
    python = envs.python("serving", settings)
    binary = next(iter(python.parents[1].glob("lib/python3.*/site-packages/envoy/_bin/envoy")))
    admin = settings.ports["envoy_admin"]
    return [
        Program(
            name="envoy",
            service="envoy",
            # Hot restart would share memory with any other Envoy of this machine.
            command=(str(binary), "-c", str(_bootstrap_file(settings)), "--disable-hot-restart", "--concurrency", "2", "-l", "warning"),
            cwd=settings.state / "envoy",
            env={"FORJA_CONFIG": hashlib.sha256(_text(settings).encode()).hexdigest()},
            ports=tuple(Port(number=settings.ports[s], setting=s) for s in ("envoy", "envoy_admin")),
            ready=lambda started: probes.http_ok(f"http://127.0.0.1:{admin}/ready"),
        )
    ]


def prepare(settings: Settings) -> None:
    """Write the bootstrap, and routes and clusters where there are none yet; those of a router are left alone."""
    write_if_new(_bootstrap_file(settings), _text(settings))
    if not cds(settings).is_file():
        write(cds(settings), _text_of({"version_info": "0", "resources": []}))
    if not rds(settings).is_file():
        routes = {"@type": f"{TYPE}.config.route.v3.RouteConfiguration", "name": ROUTES, "virtual_hosts": [_nothing_served()]}
        write(rds(settings), _text_of({"version_info": "0", "resources": [routes]}))


def bootstrap(settings: Settings) -> dict[str, Any]:
    """Envoy's static configuration."""
    router = {"@type": f"{TYPE}.extensions.filters.http.router.v3.Router"}
    manager = {
        "@type": f"{TYPE}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "forja",
        "codec_type": "AUTO",  # HTTP/1.1, and HTTP/2 for gRPC, on one port
        "use_remote_address": True,
        "rds": {"route_config_name": ROUTES, "config_source": _source(rds(settings))},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}],
    }
    listener = {
        "name": "forja",
        "address": _address(settings.ports["envoy"]),
        "filter_chains": [{"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}],
    }
    return {
        "node": {"id": "forja", "cluster": "forja"},
        "admin": {"address": _address(settings.ports["envoy_admin"])},
        "dynamic_resources": {"cds_config": _source(cds(settings))},
        "static_resources": {"listeners": [listener]},
    }


def _nothing_served() -> dict[str, Any]:
    answer = {"status": 503, "body": {"inline_string": "no model has been released yet\n"}}
    return {"name": "none", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "direct_response": answer}]}


def _source(path: Path) -> dict[str, Any]:
    """Where Envoy reads a resource: it looks again when something is renamed into the folder."""
    return {"resource_api_version": "V3", "path_config_source": {"path": str(path), "watched_directory": {"path": str(path.parent)}}}


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _bootstrap_file(settings: Settings) -> Path:
    return settings.state / "envoy" / "bootstrap.yaml"


def _text(settings: Settings) -> str:
    return _text_of(bootstrap(settings))


def _text_of(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"  # JSON is YAML, without YAML's surprises such as a bare no or 1e3
