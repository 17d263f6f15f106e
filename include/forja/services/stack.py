"""The whole stack: up, down, status. One supervisor for each state folder."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType

from forja.errors import BadInput, Unavailable
from forja.services import airflow, envoy, kafka, launch, mlflow, ports, supervisor, triton
from forja.services.folders import locked, private
from forja.services.program import Program
from forja.services.supervisor import Process
from forja.settings import Settings

SERVICES: dict[str, ModuleType] = {"kafka": kafka, "mlflow": mlflow, "envoy": envoy, "triton": triton, "airflow": airflow}
"""Each module says its programs(settings), and has a prepare(settings) that is quick when nothing changed."""

READY_SECONDS = 150
"""Longest wait for a program to answer."""

BACKOFF_SECONDS = 12
"""Longest time that a program may keep failing at its start before ``up`` gives it up; the supervisor goes on trying."""

Progress = Callable[[str, str, float], None]
"""Told of each step: program, what happens to it (preparing, starting, ready), seconds since ``up`` began."""


@dataclass(frozen=True, kw_only=True)
class ProgramStatus:
    """How a program is."""

    name: str
    service: str
    state: str
    """starting, running, backoff, stopping, stopped, exited, fatal; ``down`` when no supervisor runs."""
    pid: int
    """0 when it isn't running."""
    port: int
    """The port that people use; 0 for a program that listens on none."""
    uptime_s: float
    ready: bool
    """Whether it answers."""
    pss_bytes: int
    """Memory of the process and its children, shared pages counted in proportion."""

    @property
    def wrong(self) -> bool:
        """Whether it should run but doesn't, or runs but doesn't answer."""
        return self.state not in ("stopped", "down") and not self.ready


def programs(settings: Settings) -> list[Program]:
    """All programs of all services."""
    return [p for module in SERVICES.values() for p in module.programs(settings)]


def up(settings: Settings, only: Iterable[str] | None = None, on_progress: Progress = lambda name, what, s: None) -> list[ProgramStatus]:
    """Start what doesn't run, restart what changed, wait until all of it answers.

    Args:
        settings: where and on which ports.
        only: services to start, all by default; the others are left as they are.
        on_progress: called from several threads.

    Raises:
        BadInput: an unknown service, a port that is taken, an environment that is missing. Nothing was started.
        Unavailable: a program doesn't start or doesn't answer; the message holds the end of its log.
    """
    services = list(only or SERVICES)
    for name in services:
        if name not in SERVICES:
            raise BadInput("service", value=name, allowed=", ".join(SERVICES))
    private(settings.state)
    with locked(settings, "stack"):
        everything = programs(settings)
        chosen = [p for p in everything if p.service in services]
        alive = supervisor.alive(settings)
        if not alive:
            launch.end(str(settings.state))
        ports.check(settings, chosen)
        supervisor.configure(settings, everything)
        if alive:
            supervisor.apply(settings)
        else:
            supervisor.start(settings)
        _start_all(settings, services, chosen, on_progress)
    return [s for s in status(settings) if s.service in services]


def _start_all(settings: Settings, services: list[str], chosen: list[Program], on_progress: Progress) -> None:
    began, give_up = time.monotonic(), threading.Event()
    errors: list[BaseException] = []

    def tell(name: str, what: str) -> None:
        on_progress(name, what, time.monotonic() - began)

    def start(program: Program) -> None:
        tell(program.name, "starting")
        supervisor.start_program(settings, program.name)
        wait_ready(settings, program, give_up=give_up)
        tell(program.name, "ready")

    def serve(service: str) -> None:
        mine = [p for p in chosen if p.service == service and p.autostart]
        try:
            for program in mine:
                tell(program.name, "preparing")
            SERVICES[service].prepare(settings)
            with ThreadPoolExecutor(max_workers=max(1, len(mine))) as pool:
                list(pool.map(start, mine))
        except BaseException as error:
            errors.append(error)
            give_up.set()

    with ThreadPoolExecutor(max_workers=len(services)) as pool:
        list(pool.map(serve, services))
    if errors:
        raise errors[0]  # the others only say that they were not waited for


def wait_ready(settings: Settings, program: Program, seconds: float = READY_SECONDS, give_up: threading.Event | None = None) -> None:
    """Wait until a started program answers.

    Raises:
        Unavailable: it keeps ending, or doesn't answer in time, or ``give_up`` was set because another one failed.
    """
    give_up = give_up or threading.Event()
    deadline, failing = time.monotonic() + seconds, 0.0
    while not give_up.is_set():
        process = supervisor.processes(settings).get(program.name)
        if process is None:
            break
        if process.state in ("starting", "running") and _ready(settings, program, process):
            return
        now = time.monotonic()
        failing = (failing or now) if process.state in ("backoff", "fatal", "exited") else failing
        if now > deadline or process.state in ("fatal", "stopped") or (failing and now - failing > BACKOFF_SECONDS):
            what = f"program {program.name} is {process.state} and doesn't answer"
            raise Unavailable(what, value=supervisor.tail(settings, program.name), do=f"./forja logs {program.name}")
        give_up.wait(0.2)
    raise Unavailable(f"program {program.name} was not waited for, since another one failed")


def _ready(settings: Settings, program: Program, process: Process) -> bool:
    # Until a restarted program has become itself, a child of its predecessor may still answer in its place.
    if launch.program_of(process.pid, str(settings.state)) != program.name:
        return False
    try:
        return program.ready(process.started)
    except (OSError, ValueError):
        return False


def down(settings: Settings) -> None:
    """Stop everything that ``up`` started, stages that Airflow runs included; returns when none of it is left."""
    private(settings.state)
    with locked(settings, "stack"):
        supervisor.stop(settings)


def status(settings: Settings) -> list[ProgramStatus]:
    """How each program is, in the order of SERVICES."""
    known = supervisor.processes(settings)
    memory = _memory(settings) if known else {}
    with ThreadPoolExecutor(max_workers=16) as pool:
        found = list(pool.map(lambda p: _status(settings, p, known.get(p.name), memory.get(p.name, 0)), programs(settings)))
    return [*found, _supervisor_status(settings, memory)]


def _status(settings: Settings, program: Program, process: Process | None, pss: int) -> ProgramStatus:
    running = process is not None and process.state in ("starting", "running")
    return ProgramStatus(
        name=program.name,
        service=program.service,
        state=process.state if process else "down",
        pid=process.pid if process else 0,
        port=program.ports[0].number if program.ports else 0,
        uptime_s=round(time.time() - process.started, 1) if process and running else 0.0,
        ready=running and process is not None and _ready(settings, program, process),
        pss_bytes=pss,
    )


def _supervisor_status(settings: Settings, memory: dict[str, int]) -> ProgramStatus:
    pid, started = supervisor.identity(settings)
    return ProgramStatus(
        name="supervisor",
        service="supervisor",
        state="running" if pid else "down",
        pid=pid,
        port=0,
        uptime_s=round(time.time() - started, 1) if pid else 0.0,
        ready=pid > 0,
        pss_bytes=memory.get("supervisor", 0),
    )


def _memory(settings: Settings) -> dict[str, int]:
    """Proportional set size of each program's family, in bytes."""
    import psutil

    total: dict[str, int] = {}
    for pid, name in launch.family(str(settings.state)).items():
        try:
            total[name] = total.get(name, 0) + int(psutil.Process(pid).memory_full_info().pss)
        except psutil.Error:
            continue
    return total
