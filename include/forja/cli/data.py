"""Commands for one recipe's events, stages, receipts and answers: produce, stage, show, predict, evaluate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forja.settings import ROOT, Settings

if TYPE_CHECKING:
    from forja.receipts import Receipt

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a file in include/forja/recipes.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]


def register(app: typer.Typer) -> None:
    """Put the commands on ``app``."""
    app.command("produce", help="Put a recipe's samples into Kafka; those that the topic has are skipped.")(produce)
    app.command("stage", help="Run one stage in its environment; inputs that aren't named are the newest.")(stage)
    app.command("show", help="Show a receipt.")(show)
    app.command("predict", help="Ask the live model about files.")(predict)
    app.command("evaluate", help="Send labelled samples through the live endpoint.")(evaluate)


def produce(
    recipe: RecipeName,
    data: Annotated[Path | None, typer.Option("--data", help="File with the samples, where the recipe needs one.")] = None,
    json_: Json = False,
) -> None:
    """Send samples as a producer in a plant would."""
    from forja import events, recipes, samples

    loaded = recipes.load(recipe)
    found = samples.samples(loaded, data)
    sent, skipped = events.produce(Settings.from_env().kafka, loaded.source, found)
    if json_:
        print(json.dumps({"topic": loaded.source.topic, "sent": sent, "skipped": skipped}))
    else:
        print(f"{sent} samples sent to topic {loaded.source.topic}, {skipped} skipped: it has them")


def stage(
    verb: Annotated[str, typer.Argument(help="ingest, transform, train, register, optimize, gate, release, export or score.")],
    recipe: Annotated[str, typer.Option("--recipe")],
    inputs: Annotated[
        list[str] | None, typer.Option("--in", metavar="NAME=REF", help="An input: a receipt's path, or TABLE@VERSION.")
    ] = None,
    variant: Annotated[str, typer.Option("--variant", help="For optimize: fp32, fp16 or int8.")] = "",
    json_: Json = False,
) -> None:
    """Run a stage as an Airflow task does."""
    from forja import receipts, recipes, stages
    from forja.lake import Lake
    from forja.stages import latest
    from forja.stages.__main__ import parse_refs

    settings, loaded, kind = Settings.from_env(), recipes.load(recipe), stages.load(verb).STAGE
    lake = Lake(settings.lake)
    refs = parse_refs(inputs or [])
    for name, found in latest.inputs(lake, loaded, verb, known=refs).items():
        refs[name] = found
        sys.stderr.write(f"{name}: the newest, {', '.join(found)}\n")
    arguments = ["--recipe", recipe, *(f"--in={n}={r}" for n, items in refs.items() for r in items)]
    arguments += [f"--variant={variant}"] if variant else []
    code, path = _run_stage(settings, kind.environment, [verb, *arguments], quiet=json_)
    if json_ and path:
        print(receipts.load(lake, path).to_json().decode())
    raise typer.Exit(code)


def _run_stage(settings: Settings, environment: str, arguments: list[str], *, quiet: bool) -> tuple[int, str]:
    """Run the stage; its exit status, and the receipt that its last line names."""
    command = [*_python(settings, environment), "-m", "forja.stages", *arguments]
    path = ""
    with subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None  # noqa: S101 - we asked for a pipe
        for line in process.stdout:
            (sys.stderr if quiet else sys.stdout).write(line)
            path = line.split()[1] if line.startswith("receipt ") else path
    return process.returncode, path


def _python(settings: Settings, environment: str) -> list[str]:
    from forja import envs

    return [str(envs.python(environment, settings))]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "include"), "PYTHONUNBUFFERED": "1"}


def show(
    receipt: Annotated[str, typer.Argument(help="Path of a receipt in the lake, or RECIPE/STAGE for the newest.")],
    json_: Json = False,
) -> None:
    """Show what a stage did."""
    from forja import receipts, recipes
    from forja.errors import BadInput
    from forja.lake import Lake

    lake = Lake(Settings.from_env().lake)
    name, slash, verb = receipt.partition("/")
    if slash and name in recipes.names() and "/" not in verb:
        found = receipts.newest(lake, recipes.load(name).team, name, verb)
        if found is None:
            raise BadInput(f"receipt of {verb} of {name}", allowed="a stage that has run", do=f"./forja stage {verb} --recipe {name}")
    else:
        found = receipts.load(lake, receipt)
    print(found.to_json().decode()) if json_ else _print_receipt(found)


def _print_receipt(receipt: Receipt) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    variant = f" {receipt.variant}" if receipt.variant else ""
    console.print(f"[bold]{receipt.stage}{variant}[/] of [bold]{receipt.recipe}[/], {receipt.finished}, {receipt.seconds:.1f} s")
    for line in receipt.report:
        console.print(f"  {line}", markup=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, items in receipt.inputs.items():
        for item in items:
            table.add_row("[dim]in[/]", name, item.ref)
    for name, output in receipt.outputs.items():
        table.add_row("[dim]out[/]", name, f"{output.path}  [dim]{output.bytes / 1e3:.1f} kB[/]")
    for name, value in sorted(receipt.metrics.items()):
        table.add_row("[dim]metric[/]", name, f"{value:.6g}")
    for name, text in sorted(receipt.versions.items()):
        table.add_row("[dim]version[/]", name, text)
    console.print(table)
    console.print(f"[dim]again:[/] {receipt.command}", soft_wrap=True)


def predict(
    recipe: RecipeName, files: Annotated[list[Path], typer.Argument(help="Images, JSON or CSV files.")], json_: Json = False
) -> None:
    """Ask the live model."""
    answers = ask("predict", recipe, files)
    if json_:
        print(json.dumps(answers))
        return
    for a in answers:
        print(f"{a['sample']}: {a['answer']} (probability {a['probability']:.3f}, version {a['version']})")


def evaluate(
    recipe: RecipeName,
    data: Annotated[
        Path | None, typer.Option("--data", help="Labelled samples: a CSV, or a folder or zip of class folders of images.")
    ] = None,
    json_: Json = False,
) -> None:
    """Measure the live endpoint: one request a sample, one after the other."""
    numbers = ask("evaluate", recipe, [data] if data else [])
    if json_:
        print(json.dumps(numbers))
        return
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items()))


def ask(verb: str, recipe: str, paths: list[Path], *options: str) -> Any:
    """Run ``forja.client`` in the ml environment; what it printed, or this process ends with its status."""
    command = [*_python(Settings.from_env(), "ml"), "-m", "forja.client", verb, recipe, *map(str, paths), *options]
    done = subprocess.run(command, env=_environment(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])
