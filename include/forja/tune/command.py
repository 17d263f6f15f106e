"""``./forja tune RECIPE``: from the newest gate's choice to a table for the site file, a config.pbtxt, a picture and all numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from forja import recipes
from forja.errors import BadInput, Refused
from forja.lake import Lake
from forja.services.folders import private
from forja.settings import Settings
from forja.sites import SITES, load_site
from forja.tune import choose, picture, site_file, subject, sweep
from forja.tune.choose import Candidate
from forja.tune.subject import Subject
from forja.tune.sweep import Setup, Sweep


def run(
    settings: Settings, name: str, out: Path, scratch: Path, *, seconds: float, protocol: str, write: bool, say: Callable[[str], None]
) -> tuple[dict[str, Any], Sweep]:
    """Measure, choose, and write config.pbtxt, result.json, tune.svg and tune.png into ``out``.

    Args:
        write: put the table into the site file too.

    Returns:
        What result.json holds, and the sweep.

    Raises:
        BadInput: no such recipe, or no gate has chosen a model of it.
        Refused: ``write`` for a site that isn't this machine.
    """
    recipe, site = recipes.load(name), load_site(settings.site)
    if protocol not in ("http", "grpc"):
        raise BadInput("protocol", value=protocol, allowed="http or grpc")
    if write and site.gateway is not None:
        do = "run it there, and copy the table"
        raise Refused(
            f"--write to site {site.name}", value="a cluster's site", allowed="the site of this machine, which was measured", do=do
        )
    serving, most = site.serving_of(recipe), site.max_batch_of(recipe)
    found = subject.find(Lake(settings.lake), recipe)
    kind: Literal["http", "grpc"] = "grpc" if protocol == "grpc" else "http"
    setup = Setup(
        settings=settings, subject=found, bound_ms=serving.p99_ms, seconds=seconds, protocol=kind, scratch=scratch, say=say,
        most=recipe.optimize.max_batch,
    )  # fmt: skip
    now = Candidate(max_batch=most, serving=serving)
    say(f"{name} {found.release.variant}, gate {found.gate}")
    say(f"at most about {sweep.estimate(now, setup) / 60:.0f} minutes; the machine should do nothing else meanwhile")
    done = sweep.run(now, setup)
    path = SITES / f"{site.name}.toml"
    result = summary(done, setup, found, out, path)
    if write and result["fields"]:
        site_file.put(path, name, result["fields"])
        result["written"] = True
    _save(out, result, done, setup)
    return result, done


def summary(done: Sweep, setup: Setup, found: Subject, out: Path, path: Path) -> dict[str, Any]:
    """What result.json holds."""
    best = done.best
    plain, last = choose.within(done.plainest, setup.bound_ms), done.last
    fields = site_file.fields(best.candidate, setup.most) if best else {}
    name = found.release.model
    return {
        "recipe": name, "variant": found.release.variant, "gate": found.gate, "protocol": setup.protocol, "p99_ms": setup.bound_ms,
        "seconds": setup.seconds, "machine": f"{setup.cores} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "best": dataclasses.asdict(best.candidate) if best else None, "title": best.candidate.title if best else "",
        "last": _load(last) if last else None, "plainest": _load(plain) if plain else None,
        "gain": round(last.throughput / plain.throughput, 3) if last and plain else None, "fields": fields,
        "table": site_file.table(name, fields) if best else "", "site_file": str(path), "written": False, "out": str(out),
        "trials": [_trial(trial) for trial in done.trials], "queues": [_trial(trial) for trial in done.queues],
    }  # fmt: skip


def _trial(trial: choose.Trial) -> dict[str, Any]:
    return {
        "candidate": dataclasses.asdict(trial.candidate), "failed": trial.failed, "top": _load(trial.top) if trial.top else None,
        "loads": [_load(load) for load in trial.loads],
    }  # fmt: skip


def _load(load: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(load), "error_share": round(load.error_share, 5), "rate_error": load.rate_error}


def _save(out: Path, result: dict[str, Any], done: Sweep, setup: Setup) -> None:
    private(out)
    (out / "result.json").write_text(json.dumps(result, indent=1))
    title = f"{result['recipe']} {result['variant']} in Triton, {result['machine']}, {setup.protocol.upper()}"
    picture.draw(done, title, setup.bound_ms, [out / "tune.svg", out / "tune.png"])
    (out / "config.pbtxt").unlink(missing_ok=True)
    if done.best:
        (out / "config.pbtxt").write_bytes(subject.files(setup.subject, done.best.candidate)["config.pbtxt"])
