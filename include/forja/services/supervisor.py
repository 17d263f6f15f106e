"""supervisord: its configuration, its life, and what it is told over a unix socket.

Each program is a group of its own and is started on request only, so that the configuration of a program never changes
because of what it happens to serve; once started, it is restarted whenever it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forja.errors import BadInput, Unavailable
from forja.services import launch
from forja.services.folders import private, write, write_if_new
from forja.services.program import Program
from forja.settings import Settings

SOCKET_LENGTH = 107
"""Longest path of a unix socket on Linux, in bytes."""

SAFE_PATH = re.compile(r"[\w/.+,@=~-]+")

BAD_NAME, ALREADY_STARTED, NOT_RUNNING = 10, 60, 70
"""Faults of supervisor's XML-RPC interface."""

OWN_VARIABLES = ("FORJA_", "AIRFLOW_", "_AIRFLOW_", "MLFLOW_", "PYTHON", "VIRTUAL_ENV", "SUPERVISOR_")
"""Variables with these beginnings are not passed on to the services: each gets its own, whoever starts them."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """What supervisord knows about a program."""

    name: str
    state: str
    """starting, running, backoff, stopping, stopped, exited or fatal."""
    pid: int
    """0 when it isn't running."""
    started: float
    """When it was started last, in seconds since 1970; 0 when never."""


def socket(settings: Settings) -> Path:
    """Where supervisord listens.

    Raises:
        BadInput: the state folder's path is too long for a unix socket, or holds a character that a service trips over:
            supervisor expands ``%``, and Triton's python backend hands paths to a shell without quotes.
    """
    path = settings.state / "run" / "supervisor.sock"
    if len(os.fsencode(path)) > SOCKET_LENGTH or not SAFE_PATH.fullmatch(str(path)):
        allowed = f"at most {SOCKET_LENGTH - len('/run/supervisor.sock')} bytes of letters, digits and /._+,@=~-"
        raise BadInput("state folder", value=str(settings.state), allowed=allowed, do="set FORJA_STATE to another one")
    return path


def socket_of(settings: Settings, program: str) -> Path:
    """Where the supervisord of one program alone listens: in Compose each Triton slot is a container with one of its own."""
    return settings.state / "run" / f"{program}.sock"


def log(settings: Settings, name: str) -> Path:
    """The log file of a program."""
    return settings.state / "log" / f"{name}.log"


def configure(settings: Settings, programs: Iterable[Program]) -> None:
    """Write supervisord's configuration and one JSON file for each program, all with mode 0600."""
    sections = [_section(settings, p) for p in programs]
    private(settings.state / "log")
    private(settings.state / "run")
    write_if_new(settings.state / "conf" / "supervisord.conf", _head(settings, socket(settings)) + "".join(sections))


def alone(settings: Settings, program: Program) -> str:
    """Configuration of a supervisord that keeps one program, which starts with it when it should."""
    return _head(settings, socket_of(settings, program.name)) + _section(settings, program, autostart=program.autostart)


def _head(settings: Settings, listens: Path) -> str:
    state = _escaped(settings.state)
    return f"""[unix_http_server]
file={_escaped(listens)}
chmod=0600
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[supervisord]
logfile={state}/log/{listens.stem}d.log
pidfile={state}/run/{listens.stem}d.pid
childlogdir={state}/log
directory={state}
nodaemon=true
minfds=1024
"""


def _section(settings: Settings, program: Program, *, autostart: bool = False) -> str:
    env = {**program.env, "FORJA_STATE": str(settings.state), "FORJA_PROGRAM": program.name, "MALLOC_ARENA_MAX": "2"}
    text = json.dumps(
        {
            "command": program.command,
            "cwd": str(program.cwd),
            "env": env,
            "shm_prefix": program.shm_prefix,
            "stack_mib": program.stack_mib,
        },
        indent=1,
        sort_keys=True,
    )
    file = settings.state / "conf" / f"{program.name}.json"
    write_if_new(file, text)
    command = [sys.executable, "-I", "-S", launch.__file__, str(file), hashlib.sha256(text.encode()).hexdigest()[:12]]
    return f"""[program:{program.name}]
command={_escaped(shlex.join(command))}
stdout_logfile={_escaped(log(settings, program.name))}
stdout_logfile_maxbytes=10MB
stdout_logfile_backups=2
redirect_stderr=true
autostart={str(autostart).lower()}
autorestart=true
startsecs={program.start_seconds}
startretries=10
stopwaitsecs={program.stop_seconds}
stopasgroup={str(program.stop_group).lower()}
killasgroup=true
"""


def _escaped(text: object) -> str:
    return str(text).replace("%", "%%")


@contextlib.contextmanager
def connection(settings: Settings, program: str = "") -> Iterator[Any]:
    """XML-RPC interface of the supervisord that keeps ``program``: its own, if it has one. Unavailable when it doesn't run."""
    from supervisor.xmlrpc import SupervisorTransport

    own = socket_of(settings, program)
    transport = SupervisorTransport(None, None, f"unix://{own if own.exists() else socket(settings)}")
    try:
        with xmlrpc.client.ServerProxy("http://127.0.0.1", transport) as proxy:
            yield proxy.supervisor
    except (OSError, xmlrpc.client.ProtocolError) as error:
        raise Unavailable("the supervisor of the services", value=str(error), do="run ./forja up, or docker compose up -d") from error


def alive(settings: Settings) -> bool:
    """Whether supervisord answers."""
    try:
        with connection(settings) as supervisor:
            return bool(supervisor.getState()["statename"] == "RUNNING")
    except Unavailable:
        return False


def start(settings: Settings, seconds: float = 10.0) -> None:
    """Start supervisord in a session of its own and wait until it answers; what a killed one left behind is ended."""
    launch.end(str(settings.state))
    socket(settings).unlink(missing_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(OWN_VARIABLES)}
    env |= {"FORJA_STATE": str(settings.state), "FORJA_PROGRAM": "supervisor"}
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(settings.state / "conf" / "supervisord.conf")]
    output = settings.state / "log" / "supervisord.out"
    write(output, "")
    with output.open("wb") as out:
        # The mask is passed on to every program: what they write is for this user alone.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=env, cwd="/", umask=0o077
        )
    deadline = time.monotonic() + seconds
    while not alive(settings):
        if process.poll() is not None or time.monotonic() > deadline:
            raise Unavailable("the supervisor didn't start", value=output.read_text()[-500:], do=f"see {output}")
        time.sleep(0.05)


def stop(settings: Settings, seconds: float = 60.0) -> None:
    """Stop all programs at once, then supervisord, then whatever is left of them; nothing to do when nothing runs."""
    pid, _ = identity(settings)
    with contextlib.suppress(Unavailable), connection(settings) as supervisor:
        supervisor.stopAllProcesses()
        supervisor.shutdown()
    deadline = time.monotonic() + seconds
    while pid and Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    launch.end(str(settings.state))


def identity(settings: Settings) -> tuple[int, float]:
    """Process id of this state folder's supervisord and when it started, in seconds since 1970; zeros when none runs."""
    family = launch.family(str(settings.state), "supervisor")
    # A program that is just being started has its parent's environment until it becomes itself; the parent is older.
    found = sorted((Path(f"/proc/{pid}").stat().st_ctime, pid) for pid in family if Path(f"/proc/{pid}").exists())
    return (found[0][1], found[0][0]) if found else (0, 0.0)


def apply(settings: Settings) -> None:
    """Make a running supervisord follow its configuration: what changed is stopped, and starts again on request."""
    with connection(settings) as supervisor:
        added, changed, removed = supervisor.reloadConfig()[0]
        for name in (*changed, *removed):
            supervisor.stopProcessGroup(name)
            supervisor.removeProcessGroup(name)
        for name in (*added, *changed):
            supervisor.addProcessGroup(name)


def processes(settings: Settings) -> dict[str, Process]:
    """All programs that supervisord knows, by name; none when it doesn't run."""
    try:
        with connection(settings) as supervisor:
            found = supervisor.getAllProcessInfo()
    except Unavailable:
        return {}
    return {p["name"]: _process(p) for p in found}


def process(settings: Settings, name: str) -> Process:
    """What the supervisord that keeps program ``name`` knows about it; Unavailable when it doesn't run."""
    with connection(settings, name) as supervisor:
        return _process(supervisor.getProcessInfo(name))


def _process(info: dict[str, Any]) -> Process:
    return Process(name=info["name"], state=info["statename"].lower(), pid=info["pid"], started=float(info["start"]))


def start_program(settings: Settings, name: str) -> None:
    """Start program ``name`` and wait until it counts as started; nothing to do when it runs.

    Raises:
        BadInput: there is no such program.
        Unavailable: it ended at once; the message holds the end of its log. Or the supervisor doesn't run.
    """
    _tell(settings, name, lambda supervisor: supervisor.startProcess(name), ALREADY_STARTED)


def stop_program(settings: Settings, name: str) -> None:
    """Stop program ``name`` and wait for its end; nothing to do when it doesn't run. Errors as for ``start_program``."""
    _tell(settings, name, lambda supervisor: supervisor.stopProcess(name), NOT_RUNNING)


def restart_program(settings: Settings, name: str) -> None:
    """Stop program ``name``, if it runs, and start it. Errors as for ``start_program``."""
    stop_program(settings, name)
    start_program(settings, name)


def _tell(settings: Settings, name: str, call: Callable[[Any], object], harmless: int) -> None:
    with connection(settings, name) as supervisor:
        try:
            call(supervisor)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == BAD_NAME:
                known = ", ".join(sorted(processes(settings)))
                raise BadInput("program", value=name, allowed=known, do="run ./forja up after adding a recipe") from fault
            if fault.faultCode != harmless:
                raise Unavailable(f"program {name} ended at once", value=tail(settings, name), do=f"./forja logs {name}") from fault


def tail(settings: Settings, name: str, lines: int = 8) -> str:
    """The last lines of a program's log."""
    path = log(settings, name)
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.is_file() else ""
