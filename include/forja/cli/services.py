"""Commands for the services of this machine: up, down, status, logs."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forja.errors import BadInput
from forja.settings import Settings

if TYPE_CHECKING:
    from rich.table import Table

    from forja.services.stack import ProgramStatus

Only = Annotated[str, typer.Option("--only", help="Services to start, with commas: kafka,mlflow,envoy,triton,airflow.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def register(app: typer.Typer) -> None:
    """Put up, down, status and logs on ``app``."""
    app.command("up", help="Start the services and wait until they answer.")(up)
    app.command("down", help="Stop them all.")(down)
    app.command("status", help="Show each program; exit 1 if one that should run doesn't answer.")(status)
    app.command("logs", help="Show the end of a program's log.")(logs)


def up(only: Only = "", json_: Json = False) -> None:
    """Start what doesn't run, with a live table of progress on a terminal."""
    from forja.services import stack

    settings = Settings.from_env()
    began = time.monotonic()
    with _Board(live=sys.stderr.isatty() and not json_) as board:
        found = stack.up(settings, [s.strip() for s in only.split(",") if s.strip()] or None, board.tell)
    seconds = time.monotonic() - began
    if json_:
        print(json.dumps({"seconds": round(seconds, 2), "programs": [dataclasses.asdict(s) for s in found]}))
    else:
        running = [s for s in found if s.ready]
        print(f"{len(running)} programs are up after {seconds:.1f} s; ./forja status shows them")


def down(json_: Json = False) -> None:
    """Stop everything."""
    from forja.services import stack

    began = time.monotonic()
    stack.down(Settings.from_env())
    seconds = time.monotonic() - began
    print(json.dumps({"seconds": round(seconds, 2)}) if json_ else f"all stopped after {seconds:.1f} s")


def status(json_: Json = False) -> None:
    """Show how each program is."""
    from forja.services import stack

    found = stack.status(Settings.from_env())
    up_at_all = any(s.state != "down" for s in found)
    if json_:
        total = sum(s.pss_bytes for s in found)
        print(json.dumps({"up": up_at_all, "pss_gib": round(total / 2**30, 3), "programs": [dataclasses.asdict(s) for s in found]}))
    elif up_at_all:
        _show(found)
    else:
        print("nothing is up; ./forja up starts the services")
    raise typer.Exit(0 if up_at_all and not any(s.wrong for s in found) else 1)


def logs(
    name: Annotated[str, typer.Argument(help="Program, as ./forja status names it.")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as the log grows.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", help="Lines from the end.")] = 50,
) -> None:
    """Show the end of a log."""
    from forja.services import supervisor

    settings = Settings.from_env()
    path = supervisor.log(settings, name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.log")))
        raise BadInput("log", value=name, allowed=known or "none yet", do="see ./forja status for the names")
    print(supervisor.tail(settings, name, lines))
    if follow:
        _follow(path)


def _follow(path: Path) -> None:
    file = path.open(errors="replace")
    file.seek(0, os.SEEK_END)
    while True:
        text = file.read()
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
        elif path.stat().st_ino != os.fstat(file.fileno()).st_ino or path.stat().st_size < file.tell():
            file = path.open(errors="replace")  # the supervisor turned the log over
        else:
            time.sleep(0.2)


def _show(found: list[ProgramStatus]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("program", "state", "ready"):
        table.add_column(title)
    for title in ("pid", "port", "up", "memory"):
        table.add_column(title, justify="right")
    for s in found:
        colour = "red" if s.wrong else "green" if s.ready else "dim"
        ready = "yes" if s.ready else "no" if s.pid else ""
        numbers = (_duration(s.uptime_s), f"{s.pss_bytes / 2**20:.0f} MiB") if s.pid else ("", "")
        table.add_row(s.name, f"[{colour}]{s.state}[/]", ready, str(s.pid or ""), str(s.port or ""), *numbers)
    table.add_section()
    table.add_row("total", "", "", "", "", "", f"{sum(s.pss_bytes for s in found) / 2**20:.0f} MiB", style="bold")
    Console().print(table)


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


class _Board:
    """Progress of ``up``: one line a step, or on a terminal one table that changes."""

    def __init__(self, *, live: bool) -> None:
        from rich.console import Console
        from rich.live import Live

        self.rows: dict[str, tuple[str, float]] = {}
        self.live = Live(console=Console(stderr=True), refresh_per_second=8, get_renderable=self.table) if live else None

    def __enter__(self) -> _Board:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()

    def tell(self, name: str, what: str, seconds: float) -> None:
        self.rows[name] = (what, seconds)
        if not self.live:
            sys.stderr.write(f"{name:<24} {seconds:6.1f} s  {what}\n")

    def table(self) -> Table:
        from rich.spinner import Spinner
        from rich.table import Table

        table = Table(box=None, show_header=False, pad_edge=False)
        for name, (what, seconds) in list(self.rows.items()):
            mark = "[green]✓[/]" if what == "ready" else Spinner("dots")
            table.add_row(mark, name, what, f"{seconds:.1f} s" if what == "ready" else "")
        return table
