"""The sweep as a picture: throughput against p99 of every candidate, the latency bound, the winner, and a table of all beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forja.serving.config import bounded
from forja.tune import choose
from forja.tune.choose import Trial
from forja.tune.sweep import Sweep

BEST, PLAIN, OTHER, BOUND = "#c2410c", "#1d4ed8", "#94a3b8", "#b91c1c"
ROWS = 16
"""Candidates in the table at most, the best first."""


def draw(sweep: Sweep, title: str, bound_ms: float, paths: Sequence[Path]) -> None:
    """Draw it into files (PNG or SVG by their ending; letters of an SVG are shapes, so it needs no fonts)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = rows(sweep, bound_ms)
    with pyplot.rc_context(
        {"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "path", "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(13.5, 6.2), gridspec_kw={"width_ratios": [1, 0.98]}, layout="constrained", facecolor="white"
        )
        _curves(left, sweep, bound_ms)
        _table(right, order, sweep, bound_ms)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        for path in paths:
            figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def rows(sweep: Sweep, bound_ms: float) -> list[Trial]:
    """Trials for the table: the winner, then as ranked, those that bore nothing within the bound, and those that failed."""
    ranked = sorted(choose.ranked(sweep.trials, bound_ms), key=lambda t: sweep.best is None or t.loads != sweep.best.loads)
    rest = [t for t in sweep.trials if all(t.candidate != r.candidate for r in ranked)]
    return [*ranked, *sorted(rest, key=lambda t: (bool(t.failed), -(t.top.throughput if t.top else 0.0)))]


def _curves(axes: Any, sweep: Sweep, bound_ms: float) -> None:
    winner = sweep.best.candidate if sweep.best else None
    kept = next((t for t in sweep.trials if sweep.best and t.loads == sweep.best.loads), None)
    others = [t for t in sweep.trials if t is not kept and t.candidate != sweep.plainest.candidate]
    highest = bound_ms
    for trial, colour, width, order in (
        *((t, OTHER, 1.0, 1) for t in others),
        *((t, PLAIN, 1.8, 2) for t in sweep.trials if t.candidate == sweep.plainest.candidate),
        *((t, BEST, 2.4, 3) for t in [kept] if t is not None),
    ):
        points = sorted((load.offered or 0.0, load.p99_ms, load.throughput) for load in trial.loads if load.p99_ms is not None)
        highest = max([highest, *(p99 for _, p99, _ in points)])
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            "-",
            color=colour,
            linewidth=width,
            zorder=order,
            alpha=0.9 if order > 1 else 0.6,
        )
        for offered, p99, throughput in points:
            borne = throughput >= choose.KEPT_UP * offered and p99 <= bound_ms
            axes.plot(
                [offered], [p99], "o", color=colour, markersize=4 + order, markerfacecolor=colour if borne else "white", zorder=order + 3
            )
    _refused(axes, sweep, highest)
    if winner is not None and sweep.last is not None and sweep.last.offered is not None and sweep.last.p99_ms is not None:
        axes.plot([sweep.last.offered], [sweep.last.p99_ms], "*", color=BEST, markersize=17, markeredgecolor="white", zorder=9)
    axes.axhline(bound_ms, color=BOUND, linewidth=1.0, linestyle=(0, (5, 3)), zorder=0)
    axes.annotate(
        f"bound {bound_ms:g} ms",
        (1.0, bound_ms),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=BOUND,
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(left=0)
    axes.grid(True, which="major", color="#e2e8f0", linewidth=0.8, zorder=0)
    axes.set_xlabel("offered load, requests per second")
    axes.set_ylabel("p99 latency in ms, from the moment a request was due")
    _legend(axes, winner is not None)


def _refused(axes: Any, sweep: Sweep, highest: float) -> None:
    """Loads without a p99: crosses on top where more than one request in a hundred failed, question marks where nothing was measured."""
    top = highest * 1.6
    for trial in sweep.trials:
        colour = PLAIN if trial.candidate == sweep.plainest.candidate else OTHER
        for load in trial.loads:
            if load.p99_ms is None:
                axes.plot([load.offered], [top], marker="$?$" if load.saturated else "x", color=colour, markersize=6, zorder=4)


def _legend(axes: Any, won: bool) -> None:
    from matplotlib.lines import Line2D

    def line(colour: str, label: str, **more: Any) -> Any:
        return Line2D([], [], color=colour, label=label, **more)

    best = [line(BEST, "best within the bound", linewidth=2.4), line(BEST, "its longer run", marker="*", linestyle="", markersize=11)]
    entries = [
        *(best if won else []),
        line(PLAIN, "Triton without settings", linewidth=1.8),
        line(OTHER, "other candidates", linewidth=1.0),
        line("#475569", "borne", marker="o", linestyle=""),
        line("#475569", "not borne", marker="o", markerfacecolor="white", linestyle=""),
        line("#475569", "over 1 % without an answer", marker="x", linestyle=""),
        line("#475569", "generator too slow", marker="$?$", linestyle=""),
    ]
    axes.legend(handles=entries, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, frameon=False, fontsize=8, columnspacing=1.4)


def _table(axes: Any, order: Sequence[Trial], sweep: Sweep, bound_ms: float) -> None:
    axes.axis("off")
    won = sweep.best
    body, colours = [], []
    for trial in order[:ROWS]:
        mine = won is not None and bool(trial.loads) and trial.loads == won.loads
        body.append(cells(won if won is not None and mine else trial, bound_ms))
        colours.append(BEST if mine else PLAIN if trial.candidate == sweep.plainest.candidate else "#0f172a")
    head = ["inst.", "batch", "delay", "queue", "at most", "within bound", "p99", ""]
    widths = [0.07, 0.09, 0.1, 0.11, 0.13, 0.17, 0.13, 0.24]
    table = axes.table(cellText=body, colLabels=head, loc="upper left", cellLoc="right", colWidths=widths)
    table.auto_set_font_size(False)
    table.set_fontsize(8.5)
    table.scale(1, 1.4)
    for (row, column), cell in table.get_celld().items():
        cell.set_linewidth(0)
        cell.set_facecolor("#f1f5f9" if row == 0 else "white")
        text = cell.get_text()
        text.set_color("#475569" if row == 0 else colours[row - 1])
        if row and colours[row - 1] == BEST:
            text.set_fontweight("bold")
        if column == len(head) - 1:
            text.set_ha("left")
    axes.text(
        0.0, 0.0, "\n".join(_below(order, sweep)), color="#475569", transform=axes.transAxes, va="bottom", fontsize=8.5, linespacing=1.5
    )


def _below(order: Sequence[Trial], sweep: Sweep) -> list[str]:
    """Lines under the table: what it leaves out, and what the queue's ends do under more than can be borne."""
    lines = [f"and {len(order) - ROWS} more in result.json"] if len(order) > ROWS else []
    for trial in sweep.queues:
        for load in trial.loads:
            what = f"queue {trial.candidate.serving.queue} at {load.offered or 0:.0f}/s: {load.throughput:.0f}/s answered"
            p99 = "latency not measured" if load.answered_p99_ms is None else f"their p99 {load.answered_p99_ms:.0f} ms"
            lines.append(f"{what}, {p99}, {load.error_share:.0%} refused or failed")
    return lines


def cells(trial: Trial, bound_ms: float) -> list[str]:
    """A candidate's row: instances, batch, delay, queue, throughput at most and within the bound with its p99, and what is the matter."""
    candidate, best = trial.candidate, choose.within(trial, bound_ms)
    serving = candidate.serving
    batch = str(candidate.max_batch) if candidate.batching else "no"
    delay = f"{serving.delay_us / 1000:g} ms" if candidate.batching else "-"
    queue = str(serving.queue) if candidate.batching and bounded(serving) else "no end"
    top = f"{trial.top.throughput:.0f}/s" if trial.top else "-"
    note = ""
    if trial.failed:
        note = "failed"
    elif not trial.loads:
        note = "latency not measured"
    elif best is None:
        note = "generator too slow" if all(load.saturated for load in trial.loads) else "over the bound"
    return [
        str(serving.instances),
        batch,
        delay,
        queue,
        top,
        f"{best.throughput:.0f}/s" if best else "-",
        f"{best.p99_ms:.1f} ms" if best else "-",
        note,
    ]
