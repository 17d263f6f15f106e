"""The command for benchmarks: bench."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from forja.errors import BadInput

NAMES = ("run", "cluster", "engines")


def register(app: typer.Typer) -> None:
    """Put bench on ``app``."""
    app.command("bench", help="Measure: ./forja bench run --json, and likewise cluster, engines.")(bench)


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=", ".join(NAMES))],
    parts: Annotated[str, typer.Option("--parts", help="With commas; all when left out.")] = "",
    data: Annotated[Path | None, typer.Option("--data", help="run: the CSV of AI4I 2020; engines: a folder or zip of CIFAR-10.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Run a benchmark."""
    from forja.bench import cluster, engines, run

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    wanted = tuple(p for p in parts.split(",") if p)
    match name:
        case "run":
            found = run.main(wanted or run.PARTS, data, say)
        case "cluster":
            found = cluster.main(wanted or tuple(cluster.PARTS), say)
        case "engines":
            found = engines.main(wanted or engines.PARTS, data, say)
        case _:
            raise BadInput("benchmark", value=name, allowed=", ".join(NAMES))
    print(json.dumps(found)) if json_ else _show(found)


def _show(found: dict[str, Any]) -> None:
    for key, value in found.items():
        print(f"{key:<28} {value}")
