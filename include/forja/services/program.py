"""A program: one supervised process, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

NAME = re.compile(r"[a-z][a-z0-9_-]*")


@dataclass(frozen=True, kw_only=True)
class Port:
    """One port on 127.0.0.1 that a program listens on."""

    number: int
    setting: str
    """Entry of ``settings.PORTS`` that moves it: the environment variable is FORJA_PORT_<SETTING>."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """One process that the supervisor keeps alive."""

    name: str
    service: str
    """What people call it: kafka, mlflow, envoy, triton or airflow, the word of ``forja up --only``."""
    command: tuple[str, ...]
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to what the supervisor itself was started with."""
    ports: tuple[Port, ...] = ()
    ready: Callable[[float], bool]
    """Whether it answers. Its argument is when the process started, in seconds since 1970: an answer that a process
    before it left behind doesn't count. It may raise OSError or ValueError for no."""
    autostart: bool = True
    """Whether ``forja up`` starts it: an empty Triton slot has nothing to serve."""
    start_seconds: int = 1
    """Seconds that it must live to count as started; one that dies sooner is tried again later and later."""
    stop_seconds: int = 10
    """Seconds from SIGTERM to SIGKILL."""
    stop_group: bool = False
    """Whether SIGTERM goes to its children too: for parents that don't pass it on."""
    shm_prefix: str = ""
    """Files in /dev/shm that begin with this are its own, and are removed before it starts."""
    stack_mib: int = 0
    """Stack of its threads in MiB; 0 leaves the system's."""
