"""The command that finds Triton's settings for a model and a machine: tune."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forja.settings import Settings

if TYPE_CHECKING:
    from forja.tune.sweep import Sweep


def register(app: typer.Typer) -> None:
    """Put tune on ``app``."""
    app.command("tune", help="Find batch size, delay, instances and queue under which Triton bears most within the recipe's p99.")(tune)


def tune(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a file in include/forja/recipes.")],
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the results; <state>/tune/RECIPE when left out.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the table into the site file.")] = False,
    seconds: Annotated[float, typer.Option("--seconds", min=0.5, max=60, help="Length of one measurement.")] = 2.0,
    protocol: Annotated[str, typer.Option("--protocol", help="http or grpc.")] = "http",
) -> None:
    """Serve the model that the newest gate chose with many settings, load each, and choose."""
    from forja.tune import command

    settings = Settings.from_env()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", file=sys.stderr, flush=True)

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="forja-tune-") as scratch:
        folder = out or settings.state / "tune" / recipe
        result, sweep = command.run(settings, recipe, folder, Path(scratch), seconds=seconds, protocol=protocol, write=write, say=say)
    if json_:
        print(json.dumps(result))
    else:
        _show(result, sweep)
    if result["best"] is None:
        raise typer.Exit(3)


def _show(result: dict[str, Any], sweep: Sweep) -> None:
    from rich.console import Console
    from rich.table import Table

    from forja.tune import picture

    console, bound = Console(highlight=False), result["p99_ms"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("instances", "batch", "delay", "queue", "at most", "within bound", "p99", ""):
        table.add_column(title, justify="right" if title else "left")
    for trial in picture.rows(sweep, bound):
        mine = sweep.best is not None and bool(trial.loads) and trial.loads == sweep.best.loads
        shown = sweep.best if mine and sweep.best else trial
        table.add_row(*picture.cells(shown, bound), style="bold green" if mine else None)
    console.print(table)
    console.print(f"[dim]{result['machine']}, {result['protocol']}, p99 within {bound:g} ms[/]")
    if result["best"] is None:
        console.print(
            f"[red]No candidate kept its p99 within {bound:g} ms.[/] Measure on a quiet machine, or allow more in serving.p99_ms."
        )
    else:
        last = result["last"]
        console.print(f"[bold]best[/]  {result['title']}: {last['throughput']:.0f}/s at p99 {last['p99_ms']:.1f} ms")
        if result["gain"] is not None:
            console.print(f"[bold]gain[/]  {result['gain']:.2f} times what Triton bears within the bound without settings")
        console.print(f"\n{result['table']}", markup=False)
        console.print("written to the site file" if result["written"] else f"--write puts it into {result['site_file']}", markup=False)
    console.print(f"[dim]{result['out']}[/]", soft_wrap=True)
