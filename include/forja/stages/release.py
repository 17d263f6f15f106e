"""release: the variant that the gate chose goes live.

What it does: writes the Triton repository into the model's idle slot, starts that slot, asks it for the golden samples,
moves the router to it, asks again through the router, and sets MLflow's aliases. When this very release is live already it
changes nothing but what differs: a slot that is down, a route that Envoy lost, an alias that is missing. The gate says which
variant; the version is that of this run's register receipt, since a gate that was adopted may know one that MLflow lost.

When it fails: before traffic moved, the live slot and the route are as they were. A failed smoke test names the
difference; Unavailable names the service, and a retry goes on from what it finds.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from forja import tracking
from forja.errors import BadInput, Damaged, ForjaError, Refused, Unavailable
from forja.lake import canonical
from forja.receipts import Receipt
from forja.recipes.base import Images, Recipe, Table
from forja.services import supervisor
from forja.services.folders import locked
from forja.services.triton import SLOTS, Slot, slot
from forja.serving import repository, triton
from forja.serving.repository import Release
from forja.serving.router import EnvoyRouter, Route, Router
from forja.stages.base import Inputs, Outcome, Plan, Stage, Work

if TYPE_CHECKING:
    from mlflow import MlflowClient

STAGE = Stage(environment="control", repeat="reconciled", inputs=("gate", "model"))
LOAD_S = 60.0
"""Seconds that a slot gets to load a release."""
PATIENCE_S = 20.0
"""Seconds that a live server which runs gets to answer: under load, or just restarted by its supervisor, it is late."""
SEEN_S = 3.0
"""Seconds until every worker thread of the router must follow a route that is in force."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What release reads of the recipe."""

    dataset: Images | Table
    max_batch: int
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is to be live: the release, its files, and the answers that it must give."""

    release: Release
    contents: Mapping[str, bytes]
    golden: triton.Golden
    tolerance: float
    run_id: str | None
    """The model's run in MLflow."""

    def smoke(self, address: str) -> float:
        """Largest difference from the golden answers at host:port; errors as for ``triton.smoke``."""
        release = self.release
        limit, batch = self.tolerance, release.max_batch
        return triton.smoke(address, release.model, self.golden, tolerance=limit, max_batch=batch, version=release.version)


def plan(recipe: Recipe, inputs: Inputs, variant: str = "") -> Plan[Parts]:
    """See ``forja.stages.base``."""
    parts = Parts(dataset=recipe.dataset, max_batch=recipe.optimize.max_batch, tolerance=recipe.rollout.tolerance)
    return Plan(stage="release", recipe=recipe.name, team=recipe.team, parts=parts, inputs=inputs)


def run(plan: Plan[Parts], work: Work) -> Outcome:
    """Bring the model's slots, route and aliases to what the gate chose.

    Raises:
        BadInput: the gate judged another model than ``model``.
        Refused: the gate chose nothing, Triton could not load the release, or its golden answers differ.
        Conflict: somebody else moved the route meanwhile.
        Unavailable: Triton, Envoy, the supervisor or MLflow doesn't answer.
    """
    # Importing mlflow takes seconds, which pass while Triton starts.
    registry = ThreadPoolExecutor(1).submit(tracking.client, work.settings.mlflow)
    candidate = _candidate(plan, work)
    router = EnvoyRouter(work.settings)
    # One release of a model at a time, on this machine: both would write into the same idle slot. The kernel drops the
    # lock of a process that is killed.
    with locked(work.settings, f"release-{plan.recipe}"):
        route = router.read(plan.recipe)
        if route.weights:
            # A release that was killed may have recorded a route that Envoy doesn't follow yet. Before anything is stopped, the
            # slot that takes the requests must be the one that the record calls live.
            router.ensure()
        live = _live(work, route, candidate)
        if live is None:
            route, live, worst = _deploy(work, router, route, candidate)
        else:
            worst = _through_router(work, candidate)
            work.say(f"version {live.version} ({live.variant}) is live already in slot {route.live}")
        # Last, and after traffic moved: aliases only tell what the router does, and a model that mends something must
        # not wait for a registry. When MLflow is away this raises Unavailable, and the retry finds the release live.
        _aliases(work, registry.result(), live)
    return _outcome(work, route, live, worst, candidate.run_id)


def _candidate(plan: Plan[Parts], work: Work) -> Candidate:
    import numpy

    gate = work.receipt(plan.input("gate"))
    chosen = gate.facts.get("chosen")
    if not chosen:
        raise Refused("gate chose no variant", value=gate.facts.get("reason"), do=f"see ./forja show {gate.path}")
    optimize = next((r for r in map(work.receipt, gate.inputs["optimize"]) if r.variant == chosen), None)
    if optimize is None:
        raise Damaged(f"gate receipt {gate.path}: inputs have no variant", value=chosen)
    registered = work.receipt(plan.input("model"))
    _same_model(registered, work.receipt(optimize.inputs["model"][0]))
    dataset = plan.parts.dataset
    release = Release(
        model=plan.recipe,
        version=str(registered.facts["version"]),
        variant=chosen,
        classes=dataset.classes,
        shape=dataset.shape,
        max_batch=plan.parts.max_batch,
        preprocess=repository.preprocess(dataset),
        receipts={"gate": gate.path, "optimize": optimize.path, "register": registered.path},
    )
    contents = repository.files(release, work.load(optimize, "model.onnx"))
    with numpy.load(io.BytesIO(work.load(optimize, "golden.npz")), allow_pickle=False) as arrays:
        golden = triton.Golden(inputs=arrays["inputs"], probabilities=arrays["probabilities"])
    return Candidate(
        release=repository.sealed(release, contents), contents=contents, golden=golden, tolerance=plan.parts.tolerance,
        run_id=registered.facts.get("mlflow_run"),
    )  # fmt: skip


def _same_model(registered: Receipt, judged: Receipt) -> None:
    given, wanted = registered.output("model.onnx").sha256, judged.output("model.onnx").sha256
    if given != wanted:
        raise BadInput(
            "input model of release: not the model that the gate judged", value=f"{registered.path} (ONNX {given[:12]})",
            allowed=f"a register receipt of ONNX {wanted[:12]}, as {judged.path}", do="pass gate and model of one run",
        )  # fmt: skip


def _live(work: Work, route: Route, candidate: Candidate) -> Release | None:
    """The live slot's release when it is the candidate, whole and answering as it should; its server is started if need be."""
    if not route.weights:
        return None
    place = _slot(work, candidate, route.live)
    found = _installed(place, candidate.release.model)
    if found is None or found.identity != candidate.release.identity or not repository.intact(place, found):
        return None
    _wake(work, place, found)
    try:
        candidate.smoke(_address(place))
    except Refused as error:
        work.say(f"slot {place.name} holds this release but answers wrongly ({error}): releasing it again")
        return None
    return found


def _wake(work: Work, place: Slot, release: Release) -> None:
    """Make the live slot's server answer. One probe that times out is no reason to kill a server that clients use."""
    address = _address(place)
    if triton.ready(address, release.model, release.version):
        return
    if supervisor.process(work.settings, place.program).state in ("starting", "running", "backoff"):
        work.say(f"slot {place.name} is live, runs, and does not answer: waiting up to {PATIENCE_S:g} s")
        try:
            triton.wait_ready(address, release.model, release.version, PATIENCE_S, work.check)
            return
        except (Refused, Unavailable) as error:
            work.say(f"slot {place.name}: {error}")
    work.say(f"slot {place.name} is live but does not answer: starting it")
    supervisor.restart_program(work.settings, place.program)
    triton.wait_ready(address, release.model, release.version, LOAD_S, work.check)


def _deploy(work: Work, router: Router, route: Route, candidate: Candidate) -> tuple[Route, Release, float]:
    """Load the candidate into the idle slot, prove it there, move traffic, prove it through the router."""
    old = _installed(_slot(work, candidate, route.live), candidate.release.model) if route.weights else None
    release = dataclasses.replace(candidate.release, replaces=_replaced(old, candidate.release))
    place = _slot(work, candidate, next(s for s in SLOTS if s != route.live))
    _load(work, place, release, candidate)
    work.check()
    taken = router.swap(route.version, Route(model=release.model, weights={place.name: 100}))
    try:
        worst = _through_router(work, candidate)
    except ForjaError:
        router.swap(taken.version, Route(model=release.model, weights=route.weights, mirror=route.mirror))
        raise
    work.say(f"all requests go to slot {place.name}")
    return taken, release, worst


def _load(work: Work, place: Slot, release: Release, candidate: Candidate) -> None:
    """Put the release into an idle slot and prove it there; on any error that slot is emptied and stopped."""
    work.say(f"version {release.version} ({release.variant}) into slot {place.name}")
    supervisor.stop_program(work.settings, place.program)
    try:
        repository.install(place, release, candidate.contents)
        supervisor.start_program(work.settings, place.program)
        triton.wait_ready(_address(place), release.model, release.version, LOAD_S, work.check)
        worst = candidate.smoke(_address(place))
    except ForjaError:
        supervisor.stop_program(work.settings, place.program)
        repository.remove(place, release.model)
        raise
    work.say(f"slot {place.name} repeats {len(candidate.golden.inputs)} golden answers, differing by {worst:.1e} at most")


def _through_router(work: Work, candidate: Candidate) -> float:
    """The smoke test as a client: its threads may follow a new route a moment later than the one that reports it."""
    address = urlsplit(work.settings.endpoint).netloc
    deadline = time.monotonic() + SEEN_S
    while True:
        try:
            return candidate.smoke(address)
        except ForjaError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _replaced(old: Release | None, new: Release) -> str:
    """Version that ``previous`` will name: another variant of the same version doesn't replace that version."""
    if old is None:
        return ""
    return old.replaces if old.version == new.version else old.version


def _aliases(work: Work, client: MlflowClient, live: Release) -> None:
    """Make MLflow's aliases say what is live."""
    with tracking.reachable(work.settings.mlflow):
        if not _alias(work, client, live.model, "champion", live.version):
            do = f"it is live; register again with the inputs of {live.receipts['register']} to have it in MLflow"
            raise Damaged(f"MLflow lacks version {live.version} of {live.model}", do=do)
        if live.replaces and not _alias(work, client, live.model, "previous", live.replaces):
            # Somebody deleted it, or MLflow's database was lost. What is live is served and named all the same.
            work.say(f"alias previous is left as it is: MLflow has no version {live.replaces}")
        if str(client.get_registered_model(live.model).aliases.get("challenger")) == live.version:
            client.delete_registered_model_alias(live.model, "challenger")


def _alias(work: Work, client: MlflowClient, model: str, name: str, version: str) -> bool:
    """Make an alias name a version; False when MLflow has no such version."""
    from mlflow.exceptions import MlflowException

    try:
        if str(client.get_registered_model(model).aliases.get(name)) != version:
            client.set_registered_model_alias(model, name, version)
            work.say(f"alias {name} is version {version}")
        client.get_model_version(model, version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def _installed(place: Slot, model: str) -> Release | None:
    try:
        return repository.installed(place, model)
    except Damaged:
        return None  # as good as empty: the candidate goes into the other slot


def _slot(work: Work, candidate: Candidate, name: str) -> Slot:
    return slot(work.settings, candidate.release.model, name)


def _address(place: Slot) -> str:
    return f"127.0.0.1:{place.http_port}"


def _outcome(work: Work, route: Route, live: Release, worst: float, run_id: str | None) -> Outcome:
    facts: dict[str, Any] = {
        "model": live.model,
        "version": live.version,
        "variant": live.variant,
        "slot": route.live,
        "endpoint": f"{work.settings.endpoint}/v2/models/{live.model}",
        "route": {"version": route.version, "weights": dict(route.weights)},
        "previous": live.replaces or None,
        "mlflow_run": run_id,
    }
    body = canonical({**dataclasses.asdict(live), "identity": live.identity})
    report = [
        f"{live.model} version {live.version} ({live.variant}) is live in slot {route.live}: {facts['endpoint']}",
        f"golden answers differ by {worst:.1e} at most",
    ]
    versions = {name: installed_version(name) for name in ("tritonclient", "mlflow")}
    return Outcome(
        outputs={"release.json": work.save("release.json", body)},
        metrics={"smoke_difference": worst},
        facts=facts,
        report=report,
        versions=versions,
    )
