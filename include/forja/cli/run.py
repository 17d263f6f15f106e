"""The command that does it all: run."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forja import lineage
from forja.cli.data import ask, produce
from forja.cli.services import up
from forja.settings import Settings

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from forja.chain import ChainRun
    from forja.services.airflow_api import TaskRun

COLOURS = {
    "success": "green", "running": "cyan", "deferred": "cyan", "failed": "red", "upstream_failed": "red", "up_for_retry": "yellow",
    "skipped": "magenta",
}  # fmt: skip


def register(app: typer.Typer) -> None:
    """Put run on ``app``."""
    app.command("run", help="Start, produce, trigger, follow, and ask the model: from events to a prediction.")(run)


def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a file in include/forja/recipes.")] = "digits",
    data: Annotated[Path | None, typer.Option("--data", help="File with the samples, where the recipe needs one.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """From events to a prediction from the served model.

    Services of this machine are started; those of a cluster are there, Airflow included, and are found by the environment.
    """
    from forja import chain, recipes, samples
    from forja.sites import load_site

    settings, loaded, began = Settings.from_env(), recipes.load(recipe), time.monotonic()
    samples.samples(loaded, data)  # a path that is wrong is said before anything starts
    out, sys.stdout = sys.stdout, sys.stderr if json_ else sys.stdout
    try:
        if load_site(settings.site).gateway is None:
            up()
        produce(recipe, data)
        with Board() as board:
            done = chain.run(settings, loaded, board, board.say)
        answer = ask("predict", recipe, [data] if data else [], "--limit=1")[0]
    finally:
        sys.stdout = out
    seconds = time.monotonic() - began
    summary = {"seconds": round(seconds, 1), **summarize(settings, done), "prediction": answer}
    print(json.dumps(summary)) if json_ else show(settings, summary)


def summarize(settings: Settings, done: ChainRun) -> dict[str, Any]:
    """What a person wants to know after a run, from its receipts."""
    from forja.chain import name, overhead
    from forja.lake import Lake
    from forja.services import airflow

    found = lineage.of_release(Lake(settings.lake), done.release)
    user, password = airflow.login(settings)
    tasks = [_task(t, done.facts[name(t)]) for t in done.tasks]
    return {
        "recipe": done.recipe, "run_id": done.run_id, "overhead_s_per_task": overhead(done), "tasks": tasks,
        "variants": found.variants(), "gate": found.gate.facts,
        "test": {k: v for k, v in found.model.metrics.items() if k.startswith("test_")}, "release": done.release.facts,
        "receipt": done.release.path,
        "ui": {
            "airflow": f"http://127.0.0.1:{settings.ports['airflow']}/dags/{done.recipe}/runs/{done.run_id}", "user": user,
            "password": password, "mlflow": settings.mlflow,
        },
    }  # fmt: skip


def _task(task: TaskRun, facts: dict[str, Any]) -> dict[str, Any]:
    from forja.chain import name

    return {"task": name(task), "state": task.state, "seconds": round(task.seconds, 1), "adopted": bool(facts.get("adopted"))}


def show(settings: Settings, summary: dict[str, Any]) -> None:
    """Print the summary."""
    from rich.console import Console

    from forja.services.triton import SLOTS

    console = Console(highlight=False)
    release, gate, answer, ui = summary["release"], summary["gate"], summary["prediction"], summary["ui"]
    console.print()
    console.print(variants_table(summary["variants"], gate))
    console.print(f"[bold]gate[/]        {gate['reason']}")
    test = "  ".join(f"{k.removeprefix('test_')} {v:.4f}" for k, v in summary["test"].items())
    console.print(f"[bold]test split[/]  {test}  [dim](fp32, reported once)[/]")
    here = release["slot"] in SLOTS
    place = f"{'slot' if here else 'deployment'} {release['slot']}"
    console.print(f"[bold]live[/]        {release['model']} version {release['version']}, {release['variant']}, {place}")
    console.print(f"[bold]endpoint[/]    {settings.endpoint}/v2/models/{release['model']}/infer")
    console.print(f"[bold]prediction[/]  {answer['sample']}: {answer['answer']} (probability {answer['probability']:.3f})")
    console.print(f"[bold]Airflow[/]     {ui['airflow']}  [dim]user {ui['user']}, password {ui['password']}[/]", soft_wrap=True)
    console.print(f"[bold]MLflow[/]      {ui['mlflow']}")
    console.print(f"[bold]receipt[/]     ./forja show {summary['receipt']}", soft_wrap=True)
    console.print(f"\nEverything is up and stays up{'; make down stops it' if here else ''}. {summary['seconds']:.0f} s in all.")


def variants_table(variants: list[dict[str, Any]], gate: dict[str, Any]) -> Table:
    """One line for each variant: numbers, verdict, sizes."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("variant")
    metrics = [m for m in ("accuracy", "average_precision", "agreement") if any(m in v["metrics"] for v in variants)]
    for title in [*metrics, "ONNX", "engine", "GPU latency"]:
        table.add_column(title.replace("_", " "), justify="right")
    table.add_column("gate")
    for v in variants:
        passed = all(r["passed"] for r in gate["verdicts"] if r["variant"] == v["variant"])
        verdict = "[green]passed[/]" if passed else "[red]refused[/]"
        chosen = " ◀ live" if v["variant"] == gate["chosen"] else ""
        numbers = [f"{v['metrics'][m]:.4f}" if m in v["metrics"] else "missing" for m in metrics]
        sizes = [f"{v['metrics'][s] / 1e6:.2f} MB" if s in v["metrics"] else "none" for s in ("onnx_bytes", "engine_bytes")]
        latency = v["engine"].get("latency_ms")
        table.add_row(v["variant"], *numbers, *sizes, "not measured" if latency is None else f"{latency:.3f} ms", verdict + chosen)
    return table


class Board:
    """Live progress of every task: a table that changes on a terminal, one line a change elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self.tasks: dict[str, list[TaskRun]] = {}
        self.states: dict[tuple[str, str], str] = {}
        self.console = Console(file=sys.stdout, highlight=False)
        self.live = Live(console=self.console, refresh_per_second=4, get_renderable=self.table) if self.console.is_terminal else None

    def __enter__(self) -> Board:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        """One line above the table."""
        self.console.print(text, markup=False)

    def __call__(self, dag: str, tasks: list[TaskRun]) -> None:
        """See ``forja.chain.Watch``."""
        from forja.chain import name

        self.tasks[dag] = tasks
        for task in tasks:
            key, state = (dag, name(task)), task.state
            if self.states.get(key) != state and state not in ("none", "scheduled", "queued"):
                if self.live is None:
                    self.console.print(f"{name(task):<16} {state:<10} {task.seconds:6.1f} s", markup=False)
                self.states[key] = state

    def table(self) -> RenderableType:
        """The table as it is now."""
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        from forja.chain import name

        table = Table(box=None, show_header=False, pad_edge=False)
        for dag, tasks in list(self.tasks.items()):
            table.add_row("", f"[bold]{dag}[/]", "", "")
            for t in tasks:
                colour = COLOURS.get(t.state, "dim")
                mark: RenderableType = Spinner("dots") if t.state == "running" else Text("●", style=colour)
                table.add_row(mark, Text(name(t)), f"[{colour}]{t.state}[/]", f"{t.seconds:.1f} s" if t.started else "")
        return table
