"""What runs in the containers of docker-compose.yaml: the same programs as on one machine, each in a container of its own.

    python -m forja.services.container slot NAME       a Triton slot, kept by a supervisord of its own that the release stage talks to
    python -m forja.services.container envoy           Envoy, its listener on every interface of the container
    python -m forja.services.container prepare         once before Airflow: database, pools, login, bucket of the lake
    python -m forja.services.container healthy NAME    exit status of a health check

The state folder is a volume that they share. Only the standard library is imported, apart from what ``prepare`` needs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from forja.errors import BadInput, ForjaError
from forja.services import airflow, envoy, supervisor, triton
from forja.services.folders import locked, private, write, write_if_new
from forja.services.program import Program
from forja.settings import Settings


def slot(settings: Settings, name: str) -> None:
    """Become the supervisord of one slot; it starts the slot's server when the slot holds a release.

    Raises:
        BadInput: no recipe has such a slot.
    """
    with locked(settings, "stack"):  # the folders are the same for all slots, which start at the same moment
        triton.prepare(settings)
        known = {p.name: p for p in triton.programs(settings)}
    if name not in known:
        raise BadInput("slot", value=name, allowed=", ".join(known), do="name the service in docker-compose.yaml like the slot")
    file = settings.state / "conf" / f"{name}.conf"
    private(settings.state / "log")
    write(file, supervisor.alone(settings, known[name]))
    supervisor.socket_of(settings, name).unlink(missing_ok=True)
    # Not the slot's own name: what carries that is ended before the server starts.
    os.environ["FORJA_PROGRAM"] = "supervisor"
    os.execv(sys.executable, [sys.executable, "-m", "supervisor.supervisord", "-c", str(file)])  # noqa: S606 (no shell is wanted)


def run_envoy(settings: Settings) -> None:
    """Become Envoy. Its admin interface stays on the loopback; the listener can't, or its port could not be published."""
    with locked(settings, "stack"):
        envoy.prepare(settings)
        program = envoy_program(settings)
    _become(program)


def envoy_program(settings: Settings) -> Program:
    """Envoy's program, its bootstrap rewritten so that the listener takes connections from outside the container."""
    (program,) = envoy.programs(settings)
    bootstrap = envoy.bootstrap(settings)
    for listener in bootstrap["static_resources"]["listeners"]:
        listener["address"]["socket_address"]["address"] = "0.0.0.0"  # noqa: S104 - of the container; Compose publishes it on 127.0.0.1
    write(Path(program.command[program.command.index("-c") + 1]), json.dumps(bootstrap, indent=1) + "\n")
    return program


def _become(program: Program) -> None:
    os.chdir(program.cwd)
    os.execve(program.command[0], program.command, {**os.environ, **program.env})  # noqa: S606 (no shell is wanted)


def prepare(settings: Settings, env: Mapping[str, str]) -> None:
    """Everything that must be there before Airflow starts; repeating it changes nothing.

    Raises:
        BadInput: a variable is missing.
        Unavailable: an airflow command failed; the message holds its last words.
    """
    home = private(Path(_need(env, "AIRFLOW_HOME")))
    login = json.dumps({airflow.USER: _need(env, "FORJA_AIRFLOW_PASSWORD")}) + "\n"
    write_if_new(Path(_need(env, "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE")), login)
    make_bucket(settings.lake, env)
    write(home / "pools.json", json.dumps(airflow.pools(settings), indent=1))
    airflow.run(["airflow"], "db", "migrate", env=env, cwd=home)
    airflow.run(["airflow"], "pools", "import", str(home / "pools.json"), env=env, cwd=home)


def make_bucket(lake: str, env: Mapping[str, str]) -> bool:
    """Make the bucket of an ``s3://`` lake unless it is there; True if this call made it."""
    if not lake.startswith("s3://"):
        return False
    from pyarrow import fs

    url, bucket = urlsplit(_need(env, "AWS_ENDPOINT_URL")), urlsplit(lake).netloc
    store = fs.S3FileSystem(
        access_key=_need(env, "AWS_ACCESS_KEY_ID"), secret_key=_need(env, "AWS_SECRET_ACCESS_KEY"), region=_need(env, "AWS_REGION"),
        scheme=url.scheme, endpoint_override=url.netloc, allow_bucket_creation=True,
    )  # fmt: skip
    if store.get_file_info(bucket).type == fs.FileType.Directory:
        return False
    store.create_dir(bucket)
    return True


def healthy(settings: Settings, name: str, env: Mapping[str, str]) -> bool:
    """Whether the program of this container is as it should be.

    A Triton slot without a release is: its supervisord answers and its server isn't wanted. One that should run must answer.
    """
    if name.startswith("airflow-"):
        base = _need(env, "AIRFLOW__CORE__EXECUTION_API_SERVER_URL").removesuffix("/execution/")
        return airflow.healthy(base, name)
    if name == "envoy":
        (program,) = envoy.programs(settings)
        return program.ready(0.0)
    program = next(p for p in triton.programs(settings) if p.name == name)
    state = supervisor.process(settings, name).state
    return state == "stopped" or (state == "running" and program.ready(0.0))


def _need(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        raise BadInput(f"environment variable {name}", allowed="a value", do="set it for this service in docker-compose.yaml")
    return env[name]


def main(arguments: list[str]) -> int:
    """Command line; the exit status."""
    os.umask(0o077)
    settings = Settings.from_env()
    try:
        match arguments:
            case ["slot", name]:
                slot(settings, name)
            case ["envoy"]:
                run_envoy(settings)
            case ["prepare"]:
                prepare(settings, os.environ)
            case ["healthy", name]:
                return 0 if healthy(settings, name, os.environ) else 1
            case _:
                raise BadInput("command", value=" ".join(arguments), allowed="slot NAME, envoy, prepare or healthy NAME")
    except (ForjaError, OSError, ValueError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code if isinstance(error, ForjaError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
