"""Services as data: ports, secrets, configuration files, and whose processes are whose."""

from __future__ import annotations

import base64
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import types
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from forja import envs, recipes
from forja.errors import BadInput, Unavailable
from forja.services import airflow, envoy, folders, kafka, launch, ports, probes, stack, supervisor, triton
from forja.services.program import Port, Program
from forja.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env(
        {"HOME": os.environ["HOME"], "FORJA_STATE": str(tmp_path / "s"), "FORJA_CACHE": str(Settings.from_env().cache)}
    )


def program(name: str, *numbers: int) -> Program:
    listens = tuple(Port(number=n, setting="mlflow") for n in numbers)
    return Program(name=name, service=name, command=("/bin/true",), cwd=Path("/"), ports=listens, ready=lambda started: True)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


# Ports


def test_a_new_recipe_moves_no_ports(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: ports.triton_base(settings, name) for name in recipes.names()}
    monkeypatch.setattr(recipes, "names", lambda: ("aaa", *before))
    assert {name: ports.triton_base(settings, name) for name in before} == before
    assert ports.triton_base(settings, "aaa") == settings.ports["triton"] + ports.PER_RECIPE * len(before)


def test_slots_share_no_port_and_name_their_place(settings: Settings) -> None:
    slots = [triton.slot(settings, recipe, name) for recipe in recipes.names() for name in triton.SLOTS]
    numbers = [n for s in slots for n in (s.http_port, s.grpc_port, s.metrics_port)]
    assert len(set(numbers)) == len(numbers)
    assert slots[-1].repository == settings.state / "serving" / recipes.names()[-1] / "green" / "repository"
    for recipe, name in (("nothing", "blue"), (recipes.names()[0], "red")):
        with pytest.raises(BadInput, match="allowed"):
            triton.slot(settings, recipe, name)


def test_a_range_of_ports_that_ends_too_high_is_refused(settings: Settings) -> None:
    with pytest.raises(BadInput, match="FORJA_PORT_TRITON"):
        ports.triton_base(replace(settings, ports={**settings.ports, "triton": 65533}), recipes.names()[0])


def test_a_held_port_is_refused_with_its_holder(settings: Settings, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(BadInput) as caught:
        ports.check(settings, [program("mlflow", port)])
    for part in (str(port), f"pid {os.getpid()}", "pytest", "FORJA_PORT_MLFLOW"):
        assert part in str(caught.value)
    listener.close()
    ports.check(settings, [program("mlflow", port)])


def test_a_port_that_two_programs_want_is_refused(settings: Settings) -> None:
    with pytest.raises(BadInput, match="one that a doesn't have"):
        ports.check(settings, [program("a", 23456), program("b", 23456)])


# Folders and secrets


def test_secrets_are_private_and_made_once(settings: Settings) -> None:
    first = folders.secret(settings, "x")
    assert folders.secret(settings, "x") == first
    assert folders.secret(settings, "y") != first
    for path in (settings.state, settings.state / "secrets", settings.state / "secrets" / "x"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_file_is_written_whole_and_only_when_it_changes(tmp_path: Path) -> None:
    assert folders.write_if_new(tmp_path / "f", "a")
    inode = (tmp_path / "f").stat().st_ino
    assert not folders.write_if_new(tmp_path / "f", "a")
    assert folders.write_if_new(tmp_path / "f", "b")
    assert (tmp_path / "f").stat().st_ino != inode, "renamed into place"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


# Processes


def sleeper(state: str, name: str) -> subprocess.Popen[bytes]:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    env = {"FORJA_STATE": state, "FORJA_PROGRAM": name}
    return subprocess.Popen([sys.executable, "-c", child], env=env, start_new_session=True)


def wait(count: int, state: str, name: str = "") -> None:
    deadline = time.monotonic() + 15
    while len(launch.family(state, name)) != count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(launch.family(state, name)) == count


def test_only_the_family_of_the_named_program_is_ended(tmp_path: Path) -> None:
    state, other = str(tmp_path / "a"), str(tmp_path / "b")
    started = [sleeper(state, "one"), sleeper(state, "two"), sleeper(other, "one")]
    try:
        wait(4, state)
        wait(2, other)
        launch.end(state, "one")
        assert started[0].wait(5) != 0
        wait(0, state, "one")
        wait(2, state)
        wait(2, other)
        launch.end(state)
        wait(0, state)
        wait(2, other)
    finally:
        launch.end(state)
        launch.end(other)
        for process in started:
            process.wait(5)


# Configuration


def test_programs_restart_by_themselves_but_start_on_request(settings: Settings) -> None:
    supervisor.configure(settings, [program("x")])
    from supervisor.options import ServerOptions

    options = ServerOptions()
    options.realize(["-c", str(settings.state / "conf" / "supervisord.conf")], doc="")
    [group] = options.process_group_configs
    [process] = group.process_configs
    assert str(settings.state / "conf" / "x.json") in process.command
    assert process.stdout_logfile == str(settings.state / "log" / "x.log")
    assert process.autorestart
    assert not process.autostart


def test_a_changed_program_changes_the_supervisors_configuration(settings: Settings) -> None:
    conf = settings.state / "conf" / "supervisord.conf"
    supervisor.configure(settings, [program("x")])
    before = conf.read_text()
    supervisor.configure(settings, [program("x")])
    assert conf.read_text() == before
    supervisor.configure(settings, [replace(program("x"), env={"A": "1"})])
    assert conf.read_text() != before


@pytest.mark.parametrize("name", ["x" * 100, "50%", "my project", "a'b"])
def test_a_state_folder_that_supervisor_cannot_take_is_refused(settings: Settings, tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="FORJA_STATE"):
        supervisor.configure(replace(settings, state=tmp_path / name), [])


def test_program_names_are_unique_and_unknown_services_refused(settings: Settings) -> None:
    names = [p.name for p in stack.programs(settings)]
    assert len(set(names)) == len(names)
    assert {p.service for p in stack.programs(settings)} == set(stack.SERVICES)
    with pytest.raises(BadInput, match="kafka, mlflow"):
        stack.up(settings, only=["zookeeper"])


def test_every_address_is_loopback(settings: Settings) -> None:
    text = json.dumps(envoy.bootstrap(settings)) + kafka.properties(settings) + json.dumps(airflow.environment(settings))
    text += json.dumps([p.command for p in stack.programs(settings)])
    assert "127.0.0.1" in text
    assert "0.0.0.0" not in text  # noqa: S104


@pytest.mark.parametrize("broken", [False, True])
def test_envoy_accepts_its_bootstrap(settings: Settings, broken: bool) -> None:
    envoy.prepare(settings)
    [command] = [p.command for p in envoy.programs(settings)]
    if broken:
        file = Path(command[2])
        file.write_text(file.read_text().replace("stat_prefix", "stat_prefux"))
    done = subprocess.run([*command, "--mode", "validate"], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is not broken, done.stderr
    assert envs.python("serving", settings).is_file()


def test_routes_of_a_router_survive_the_next_up(settings: Settings) -> None:
    envoy.prepare(settings)
    folders.write(envoy.rds(settings), "{}")
    envoy.prepare(settings)
    assert envoy.rds(settings).read_text() == "{}"


def test_connections_say_what_a_stage_gets(settings: Settings) -> None:
    env = airflow.environment(settings)
    assert json.loads(env["AIRFLOW_CONN_FORJA_KAFKA"])["extra"]["env"] == {"FORJA_KAFKA": settings.kafka}
    assert json.loads(env["AIRFLOW_CONN_FORJA_LAKE"])["extra"]["env"] == {"FORJA_LAKE": settings.lake}
    assert json.loads(env["AIRFLOW_CONN_FORJA_MLFLOW"])["extra"]["env"] == {"MLFLOW_TRACKING_URI": settings.mlflow}
    assert env["FORJA_PORT_KAFKA"] == str(settings.ports["kafka"])


def test_airflows_parts_read_the_settings_of_who_started_them(settings: Settings) -> None:
    mine = replace(settings, lake="s3://mine/lake", kafka="kafka:1", mlflow="http://mlflow:2", endpoint="http://models:3", site="cluster")
    assert Settings.from_env(airflow.environment(mine)) == mine


# Probes


def test_a_heartbeat_from_before_the_start_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    health = {"scheduler": {"status": "healthy", "latest_scheduler_heartbeat": "2026-01-01T00:00:10+00:00"}}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(health).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        beat, base = 1767225610.0, f"http://127.0.0.1:{server.server_port}"
        assert airflow.healthy(base, "airflow-scheduler", beat - 1)
        assert not airflow.healthy(base, "airflow-scheduler", beat + 1)
        assert not airflow.healthy(base, "airflow-triggerer", beat - 1)
        health["scheduler"]["status"] = "unhealthy"
        assert not airflow.healthy(base, "airflow-scheduler", beat - 1)
        server.shutdown()


def test_nobody_there_is_not_ready(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    listener.close()
    assert not probes.kafka_ok(f"127.0.0.1:{port}")
    with pytest.raises(OSError, match="refused"):
        probes.http_ok(f"http://127.0.0.1:{port}/")


def test_a_cluster_id_is_never_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kafka's tool would take an id that begins with a dash for an option: one new state folder in 64."""
    ids = iter([uuid.UUID(bytes=b"\xfb" * 16), uuid.UUID(bytes=b"\x01" * 16)])
    assert base64.urlsafe_b64encode(b"\xfb" * 16).startswith(b"-")
    monkeypatch.setattr(kafka.uuid, "uuid4", lambda: next(ids))
    assert not kafka._cluster_id().startswith("-")


def test_up_names_the_service_that_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not the one that was only not waited for."""
    settings = Settings.from_env({"FORJA_STATE": str(tmp_path)})

    def fail(settings: Settings) -> None:
        raise Unavailable("Kafka's storage can't be formatted")

    def never(*args: object, give_up: threading.Event, **kwargs: object) -> None:
        give_up.wait(10)
        raise Unavailable("program envoy was not waited for")

    envoy = Program(name="envoy", service="envoy", command=("x",), cwd=tmp_path, ready=lambda started: True)
    monkeypatch.setitem(stack.SERVICES, "kafka", types.SimpleNamespace(prepare=fail))
    monkeypatch.setitem(stack.SERVICES, "envoy", types.SimpleNamespace(prepare=lambda settings: None))
    monkeypatch.setattr(stack.supervisor, "start_program", lambda settings, name: None)
    monkeypatch.setattr(stack, "wait_ready", never)
    with pytest.raises(Unavailable, match="formatted"):
        stack._start_all(settings, ["envoy", "kafka"], [envoy], lambda name, what, s: None)
