"""``./forja bench serve``: how true the load generator is, what Envoy adds, what tuning gains. The platform needn't be up.

It measures cifar10's network (32x32 pixels, about 16 million multiply-adds) in Triton's python backend on the loopback, each part on
servers of its own. Server, Envoy and generator share the machine's cores, so it should do nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forja import envs, recipes
from forja.bench import peers
from forja.errors import BadInput, ForjaError, Refused, Unavailable
from forja.recipes.base import Images, Serving
from forja.serving import repository
from forja.serving.repository import Release
from forja.settings import ROOT, Settings
from forja.tune import choose, perf_analyzer, sweep
from forja.tune.choose import Candidate, Trial
from forja.tune.load import Offer, closed_loop, open_loop
from forja.tune.measured import Load
from forja.tune.subject import Served, Subject, serve
from forja.tune.sweep import Setup

PARTS = {
    "rate": ("rate_error",),
    "loadgen": ("loadgen_ratio",),
    "gateway": ("gateway_p99_ratio",),
    "batching": ("batching_gain",),
}
"""Keys that each part measures."""
RECIPE = "cifar10"
NOW = Serving(instances=1)
"""What is served where nothing is tuned: one instance leaves a core to the clients."""
PAIRS, LONG_PAIRS = 15, 7
"""Interleaved pairs of a ratio; fewer where each measurement is a search of several loads."""
SPARE = 10
"""Pairs that may be lost because the generator was too slow, since something else ran."""
IN_FLIGHT = 16
SECONDS = 3.0
DRAWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What all parts share."""

    settings: Settings
    subject: Subject
    scratch: Path
    say: Callable[[str], None]


def main(parts: tuple[str, ...], say: Callable[[str], None]) -> dict[str, Any]:
    """Run the parts; a figure that isn't measured is null with its reason under ``missing``.

    Raises:
        BadInput: an unknown part, or no serving or ml environment.
    """
    if unknown := set(parts) - set(PARTS):
        raise BadInput("parts of the benchmark", value=sorted(unknown), allowed=", ".join(PARTS))
    found: dict[str, Any] = dict.fromkeys(key for keys in PARTS.values() for key in keys)
    missing: dict[str, str] = {}
    load_before, began = os.getloadavg(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="forja-bench-serve-") as folder:
        settings = Settings.from_env({**os.environ, "FORJA_STATE": f"{folder}/state"})
        stage = Stage(settings=settings, subject=_subject(settings, Path(folder)), scratch=Path(folder), say=say)
        measures = {"rate": rate, "loadgen": loadgen, "gateway": gateway, "batching": batching}
        for part, measure in measures.items():
            (key,) = PARTS[part]
            if part not in parts:
                missing[key] = "not asked for: see --parts"
                continue
            say(f"{part} ...")
            try:
                found |= measure(stage)
            except (Refused, Unavailable) as error:
                missing[key] = str(error)[:300]
            say(f"{key} {found[key]}")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        **found, "missing": missing, "cpus": os.cpu_count(), "seconds": round(time.monotonic() - began, 1),
        "cpu_s": round(sum(u.ru_utime + u.ru_stime for u in used), 1), "load": [round(load_before[0], 2), round(os.getloadavg()[0], 2)],
    }  # fmt: skip


def _subject(settings: Settings, scratch: Path) -> Subject:
    import numpy

    recipe = recipes.load(RECIPE)
    command = [str(envs.python("ml", settings)), "-m", "forja.bench.serve_models", RECIPE, str(scratch)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT / "include")}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ForjaError(f"model of {RECIPE}", value=(done.stdout + done.stderr)[-500:])
    dataset = recipe.dataset
    assert isinstance(dataset, Images)  # noqa: S101 - our own recipe
    release = Release(
        model=RECIPE, version="1", variant="fp32", classes=dataset.classes, shape=dataset.shape, max_batch=recipe.optimize.max_batch,
        preprocess=repository.preprocess(dataset), receipts={},
    )  # fmt: skip
    with numpy.load(scratch / "inputs.npz", allow_pickle=False) as arrays:
        inputs = arrays["inputs"]
    return Subject(release=release, model=(scratch / "model.onnx").read_bytes(), inputs=inputs)


@contextlib.contextmanager
def _served(stage: Stage, candidate: Candidate, name: str) -> Iterator[Served]:
    with serve(stage.settings, stage.subject, candidate, stage.scratch / name) as served:
        yield served


def _now(stage: Stage) -> Candidate:
    return Candidate(max_batch=stage.subject.release.max_batch, serving=NOW)


def _most(stage: Stage, served: Served, protocol: str) -> float:
    """Throughput of a closed loop, in answers per second."""
    found = closed_loop(served.target(protocol), stage.subject.samples, in_flight=IN_FLIGHT, seconds=SECONDS, statistics=served.http)
    return found.throughput


def rate(stage: Stage) -> dict[str, Any]:
    """What arrived at the server, by its own count, against what was offered at half of what it bears; the worse protocol counts."""
    loads = {}
    with _served(stage, _now(stage), "rate") as served:
        for protocol in ("http", "grpc"):
            half = _most(stage, served, protocol) / 2
            offer = Offer(rate=half, seconds=10.0, warmup_s=1.0)
            loads[protocol] = open_loop(served.target(protocol), stage.subject.samples, offer, statistics=served.http)
            stage.say(f"{protocol}: {half:.0f}/s offered, error {loads[protocol].rate_error}, p99 {loads[protocol].p99_ms} ms")
    errors = [load.rate_error for load in loads.values()]
    if None in errors:
        raise Unavailable("Triton's statistics", do="see its log")
    return {
        "rate_error": round(max(e for e in errors if e is not None), 5),
        "rate": {name: dataclasses.asdict(load) for name, load in loads.items()},
    }  # fmt: skip


def loadgen(stage: Stage) -> dict[str, Any]:
    """Throughput that our generator finds with as many requests under way, over what wrk finds: the same bytes to the same server."""
    binary = peers.wrk()
    if not binary:
        raise Unavailable("wrk isn't installed", do="apt-get install wrk")
    ours, theirs = [], []
    analyzer, found = perf_analyzer.find(), None
    with _served(stage, _now(stage), "loadgen") as served:
        target, sample = served.target("http"), stage.subject.samples[0]

        def own() -> None:
            ours.append(closed_loop(target, [sample], in_flight=IN_FLIGHT, seconds=SECONDS, warmup_s=0.2).throughput)

        def peer() -> None:
            theirs.append(peers.wrk_throughput(binary, target, sample, in_flight=IN_FLIGHT, seconds=SECONDS, scratch=stage.scratch))

        for pair in range(PAIRS):
            for measure in (own, peer) if pair % 2 else (peer, own):
                measure()
            stage.say(f"pair {pair + 1}: {ours[-1]:.0f}/s, wrk {theirs[-1]:.0f}/s")
        if analyzer:
            found = perf_analyzer.throughput(analyzer, target, sample, in_flight=IN_FLIGHT, seconds=SECONDS, scratch=stage.scratch)
    ratio = ratio_of(ours, theirs)
    return {"loadgen_ratio": ratio["ratio"], "loadgen": {**ratio, "ours": ours, "wrk": theirs, "perf_analyzer": found}}


def gateway(stage: Stage) -> dict[str, Any]:
    """p99 through Envoy over p99 of Triton alone, at half of what Triton alone bears."""
    through: list[float] = []
    alone: list[float] = []
    lost = 0
    with (
        _served(stage, _now(stage), "gateway") as served,
        peers.gateway(stage.settings, RECIPE, served.http, stage.scratch) as address,
    ):
        direct = served.target("http")
        routed = dataclasses.replace(direct, address=address)
        half = _most(stage, served, "http") / 2
        while len(alone) < PAIRS and lost <= SPARE:
            offer = Offer(rate=half, seconds=SECONDS, warmup_s=0.5, seed=len(alone) + lost)
            order = (direct, routed) if offer.seed % 2 else (routed, direct)
            loads = {target.address: open_loop(target, stage.subject.samples, offer, statistics=served.http) for target in order}
            p99 = [loads[target.address].p99_ms for target in (routed, direct)]
            if p99[0] is None or p99[1] is None:
                lost += 1
                stage.say("a pair is lost: the load generator was too slow, or not all was answered")
                continue
            through.append(p99[0])
            alone.append(p99[1])
            stage.say(f"pair {len(alone)}: p99 {p99[0]:.2f} ms through Envoy, {p99[1]:.2f} ms without, at {half:.0f}/s")
    if len(alone) < PAIRS:
        raise Unavailable(f"{PAIRS} pairs", value=f"{len(alone)} pairs, {lost} lost", do="measure on a machine that does nothing else")
    ratio = ratio_of(through, alone)
    return {
        "gateway_p99_ratio": ratio["ratio"],
        "gateway": {**ratio, "rate": round(half, 1), "through": through, "alone": alone, "lost": lost},
    }


def batching(stage: Stage) -> dict[str, Any]:
    """Throughput within the recipe's p99, tuned, over Triton's without settings: no dynamic batching, one instance."""
    recipe = recipes.load(RECIPE)
    setup = Setup(
        settings=stage.settings, subject=stage.subject, bound_ms=recipe.serving.p99_ms, seconds=2.0, protocol="http",
        scratch=stage.scratch / "sweep", say=stage.say, most=recipe.optimize.max_batch,
    )  # fmt: skip
    found = sweep.run(_now(stage), setup)
    if found.best is None:
        raise Unavailable(f"a candidate with its p99 within {setup.bound_ms:g} ms", do="measure on a machine that does nothing else")
    tuned, plain = found.best.candidate, found.plainest.candidate
    stage.say(f"{LONG_PAIRS} pairs: {tuned.title} against {plain.title}")
    borne: dict[Candidate, list[float]] = {tuned: [], plain: []}
    lost = 0
    with _served(stage, tuned, "tuned") as one, _served(stage, plain, "plain") as other:
        while len(borne[plain]) < LONG_PAIRS and lost <= SPARE:
            order = [(tuned, one), (plain, other)]
            most = {c: _within(setup, c, served, lost + len(borne[plain])) for c, served in (order if lost % 2 else order[::-1])}
            if any(load is None for load in most.values()):
                lost += 1
                continue
            for candidate, load in most.items():
                borne[candidate].append(load.throughput if load else math.nan)
            stage.say(f"pair {len(borne[plain])}: {borne[tuned][-1]:.0f}/s against {borne[plain][-1]:.0f}/s")
    if len(borne[plain]) < LONG_PAIRS:
        raise Unavailable(f"{LONG_PAIRS} pairs", value=f"{len(borne[plain])} pairs, {lost} lost")
    ratio = ratio_of(borne[tuned], borne[plain])
    facts = {"tuned": tuned.title, "plain": plain.title, "tuned_per_s": borne[tuned], "plain_per_s": borne[plain], "lost": lost}
    return {"batching_gain": ratio["ratio"], "batching": {**ratio, **facts, "p99_ms": setup.bound_ms}}


def _within(setup: Setup, candidate: Candidate, served: Served, seed: int) -> Load | None:
    """The largest load within the bound that a search over a server that runs finds."""
    trial = Trial(candidate=candidate, top=sweep.closed(setup, served, candidate))
    while (rate := choose.next_rate(trial, setup.bound_ms, sweep.RUNS)) is not None:
        trial = dataclasses.replace(trial, loads=(*trial.loads, sweep.opened(setup, served, rate, 100 * seed + len(trial.loads), 1)))
    return choose.within(trial, setup.bound_ms)


def ratio_of(over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """Geometric mean of the pairs' ratios, with its 95 % interval by bootstrap over pairs."""
    import numpy

    logs = numpy.log(numpy.array(over) / numpy.array(under))
    draws = numpy.random.default_rng(0).choice(logs, (DRAWS, len(logs))).mean(axis=1)
    low, high = numpy.exp(numpy.percentile(draws, [2.5, 97.5]))
    return {
        "ratio": round(float(numpy.exp(logs.mean())), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "pairs": len(logs),
    }
