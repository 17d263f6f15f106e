"""Forja's commands. Each module of this package holds some, and ``register`` puts them on the app."""

from __future__ import annotations

import sys

import typer

from forja.cli import baseline, bench, data, edge, mig, run, services, tune
from forja.errors import ForjaError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="From events in Kafka to gated, optimised models in Triton.",
)  # fmt: skip
services.register(app)
run.register(app)
data.register(app)
bench.register(app)
baseline.register(app)
mig.register(app)
tune.register(app)
edge.register(app)


@app.command("setup", help="Make the environments and fetch Kafka's jars (the launcher does this on the system's Python).")
def setup(names: list[str] = typer.Argument(None, metavar="[NAME]...")) -> None:  # noqa: B008
    """Only here so that ``./forja --help`` lists it: the launcher never passes it on."""
    from forja import envs

    raise typer.Exit(envs.main(names or []))


def main() -> None:
    """Run the app; an error that Forja raised on purpose is one line on stderr and its exit status."""
    try:
        app(prog_name="./forja")
    except ForjaError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
