"""release: the variant that the gate chose goes live.

What it does: keeps the Triton repository in the lake, brings it up beside what is live (in the idle slot of one machine, or in
a Deployment of a cluster, as the site says), asks it for the golden samples, moves the router to it, asks again through the
router, and sets MLflow's aliases. When this very release is live already it changes nothing but what differs: a server that is
down, a route that was lost, an alias that is missing. The gate says which variant; the version is that of this run's register
receipt, since a gate that was adopted may know one that MLflow lost.

When it fails: before traffic moved, the live server and the route are as they were. A failed smoke test names the
difference; Unavailable names the service, and a retry goes on from what it finds.
"""

from __future__ import annotations

import dataclasses
import io
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from forja import kube, tracking
from forja.errors import BadInput, Conflict, Damaged, ForjaError, Refused
from forja.lake import sha256
from forja.receipts import Output, Receipt
from forja.recipes.base import Images, Recipe, Table
from forja.serving import repository, triton
from forja.serving.place import Place
from forja.serving.repository import Bundle, Release
from forja.serving.router import Route
from forja.sites import load_site
from forja.stages.base import Inputs, Outcome, Plan, Stage, Work

if TYPE_CHECKING:
    from mlflow import MlflowClient

STAGE = Stage(environment="control", repeat="reconciled", inputs=("gate", "model"))
SEEN_S = 3.0
"""Seconds until every worker thread of the router must follow a route that is in force."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What release reads of the recipe."""

    dataset: Images | Table
    max_batch: int
    tolerance: float
    profile: str


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is to be live: the release, its files, and the answers that it must give."""

    release: Release
    contents: dict[str, bytes]
    stored: dict[str, Output]
    """Its files as they lie in the lake."""
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
    parts = Parts(
        dataset=recipe.dataset, max_batch=recipe.optimize.max_batch, tolerance=recipe.rollout.tolerance, profile=recipe.profiles.release
    )
    return Plan(stage="release", recipe=recipe.name, team=recipe.team, parts=parts, inputs=inputs)


def run(plan: Plan[Parts], work: Work) -> Outcome:
    """Bring the model's servers, route and aliases to what the gate chose.

    Raises:
        BadInput: the gate judged another model than ``model``.
        Refused: the gate chose nothing, Triton could not load the release, or its golden answers differ.
        Conflict: somebody else moved the route meanwhile.
        Unavailable: Triton, the router, what keeps the servers, or MLflow doesn't answer.
    """
    place = _place(plan, work)
    # Importing mlflow takes seconds, which pass while Triton starts. The place comes first: the cluster's client and mlflow import
    # the same packages, which two threads must not do at once.
    registry = ThreadPoolExecutor(1).submit(tracking.client, work.settings.mlflow)
    candidate = _candidate(plan, work)
    with place.locked():
        route = place.router.read(plan.recipe)
        if route.weights:
            # A release that was killed may have recorded a route that the router doesn't follow yet. Before anything is stopped,
            # what takes the requests must be what the record calls live.
            place.router.ensure(plan.recipe)
        live = _live(work, place, route, candidate)
        if live is None:
            route, live, worst = _deploy(work, place, route, candidate)
        else:
            worst = _through_router(work, candidate)
            work.say(f"version {live.version} ({live.variant}) is live already in {place.title(route.live)}")
        place.tidy(route)
        # Last, and after traffic moved: aliases only tell what the router does, and a model that mends something must
        # not wait for a registry. When MLflow is away this raises Unavailable, and the retry finds the release live.
        _aliases(work, registry.result(), live)
    return _outcome(work, place, route, live, worst, candidate)


def _place(plan: Plan[Parts], work: Work) -> Place:
    """Where the site serves its models: the slots of this machine, or Deployments behind its gateway."""
    site = load_site(work.settings.site)
    if site.gateway is None:
        from forja.serving.slots import Slots

        return Slots(work.settings, plan.recipe, work.say, work.check)
    from forja.serving.deployments import Deployments
    from forja.serving.triton_pod import Serving

    profile, settings = site.profile(plan.parts.profile), work.settings
    serving = Serving(
        model=plan.recipe, namespace=site.tenant(plan.team).namespace, gateway=site.gateway, lake=settings.lake, endpoint=settings.endpoint,
        secrets=profile.secrets, start_s=profile.queue_timeout_s,
    )  # fmt: skip
    return Deployments(kube.connect(), work.lake, serving, work.say, work.check)


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
    stored = {name: _stored(work, name, data, optimize.output("model.onnx")) for name, data in contents.items()}
    objects = {name: output.path for name, output in stored.items()}
    with numpy.load(io.BytesIO(work.load(optimize, "golden.npz")), allow_pickle=False) as arrays:
        golden = triton.Golden(inputs=arrays["inputs"], probabilities=arrays["probabilities"])
    return Candidate(
        release=dataclasses.replace(repository.sealed(release, contents), objects=objects), contents=contents, stored=stored,
        golden=golden, tolerance=plan.parts.tolerance, run_id=registered.facts.get("mlflow_run"),
    )  # fmt: skip


def _stored(work: Work, name: str, data: bytes, model: Output) -> Output:
    """A file of the release in the lake, where the model itself lies already."""
    return model if sha256(data) == model.sha256 else work.save(name.rpartition("/")[2], data)


def _same_model(registered: Receipt, judged: Receipt) -> None:
    given, wanted = registered.output("model.onnx").sha256, judged.output("model.onnx").sha256
    if given != wanted:
        raise BadInput(
            "input model of release: not the model that the gate judged", value=f"{registered.path} (ONNX {given[:12]})",
            allowed=f"a register receipt of ONNX {wanted[:12]}, as {judged.path}", do="pass gate and model of one run",
        )  # fmt: skip


def _live(work: Work, place: Place, route: Route, candidate: Candidate) -> Release | None:
    """The live release when it is the candidate, whole and answering as it should; its server is started if need be."""
    if not route.weights:
        return None
    found = place.held(route.live)
    if found is None or found.identity != candidate.release.identity or not place.intact(route.live, found):
        return None
    place.wake(route.live, found)
    try:
        candidate.smoke(place.address(route.live))
    except Refused as error:
        work.say(f"{place.title(route.live)} holds this release but answers wrongly ({error}): releasing it again")
        return None
    return found


def _deploy(work: Work, place: Place, route: Route, candidate: Candidate) -> tuple[Route, Release, float]:
    """Bring the candidate up beside what is live, prove it there, move traffic, prove it through the router."""
    old = place.held(route.live) if route.weights else None
    release = dataclasses.replace(candidate.release, replaces=_replaced(old, candidate.release))
    name = _load(work, place, route, release, candidate)
    work.check()
    before = route.before if name == route.live else route.live
    taken = place.router.swap(route.version, Route(model=release.model, weights={name: 100}, before=before))
    try:
        worst = _through_router(work, candidate)
    except ForjaError:
        place.tidy(place.router.swap(taken.version, route))
        raise
    work.say(f"all requests go to {place.title(name)}")
    return taken, release, worst


def _load(work: Work, place: Place, route: Route, release: Release, candidate: Candidate) -> str:
    """Bring the release up and prove it; the backend's name. On any error it is taken down."""
    stored, name = work.save("release.json", repository.to_json(release)), place.pick(release, route)
    work.say(f"version {release.version} ({release.variant}) into {place.title(name)}")
    try:
        place.put(name, Bundle(release=release, path=stored.path, sha256=stored.sha256, contents=candidate.contents), route)
        worst = candidate.smoke(place.address(name))
    except Conflict:
        raise  # another run took this work over, and what is there with it
    except ForjaError:
        place.remove(name, route)
        raise
    work.say(f"{place.title(name)} repeats {len(candidate.golden.inputs)} golden answers, differing by {worst:.1e} at most")
    return name


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


def _outcome(work: Work, place: Place, route: Route, live: Release, worst: float, candidate: Candidate) -> Outcome:
    facts: dict[str, Any] = {
        "model": live.model,
        "version": live.version,
        "variant": live.variant,
        "slot": route.live,
        "endpoint": f"{work.settings.endpoint}/v2/models/{live.model}",
        "route": {"version": route.version, "weights": dict(route.weights)},
        "previous": live.replaces or None,
        "mlflow_run": candidate.run_id,
    }
    report = [
        f"{live.model} version {live.version} ({live.variant}) is live in {place.title(route.live)}: {facts['endpoint']}",
        f"golden answers differ by {worst:.1e} at most",
    ]
    own = {name.rpartition("/")[2]: o for name, o in candidate.stored.items() if o.path.startswith(f"{work.folder}/")}
    versions = {name: installed_version(name) for name in ("tritonclient", "mlflow")}
    outputs = {**own, "release.json": work.save("release.json", repository.to_json(live))}
    return Outcome(outputs=outputs, metrics={"smoke_difference": worst}, facts=facts, report=report, versions=versions)
