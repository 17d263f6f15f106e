"""release: the variant that the gate chose goes live.

What it does: keeps the Triton repository in the lake, brings it up beside what is live (in the idle slot of one machine, or in
a Deployment of a cluster, as the site says), asks it for the golden samples, moves the router to it, asks again through the
router, and sets MLflow's aliases. When this very release is live already it changes nothing but what differs: a server that is
down, a route that was lost, an alias that is missing. The gate says which variant; the version is that of this run's register
receipt, since a gate that was adopted may know one that MLflow lost.

When it fails: before traffic moved, the live server and what the router does are as they were. When the proof through the
router fails, the requests go back; when the release is killed before that proof, the next try makes it up or goes back. A failed
smoke test names the difference; Unavailable names the service, and a retry goes on from what it finds.

Going back to an older version is a release like any other. Only a try that failed or was killed, and is repeated after a newer
version went live, is refused, once: it was meant for what was live then. Whoever still wants it runs it again.
"""

from __future__ import annotations

import dataclasses
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Any

from forja import kube, recipes, tracking
from forja.errors import BadInput, Conflict, Damaged, Refused
from forja.lake import sha256
from forja.receipts import Output, Receipt
from forja.recipes.base import Images, Recipe, Serving, Table
from forja.serving import repository, rollout, triton
from forja.serving.place import Place
from forja.serving.repository import Release
from forja.serving.rollout import Candidate
from forja.serving.router import Route
from forja.sites import load_site
from forja.stages.base import Inputs, Outcome, Plan, Stage, Work

if TYPE_CHECKING:
    from mlflow import MlflowClient

STAGE = Stage(environment="control", repeat="reconciled", inputs=("gate", "model"))


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What release reads of the recipe."""

    dataset: Images | Table
    max_batch: int
    serving: Serving
    tolerance: float
    profile: str


def plan(recipe: Recipe, inputs: Inputs, variant: str = "") -> Plan[Parts]:
    """See ``forja.stages.base``."""
    parts = Parts(
        dataset=recipe.dataset,
        max_batch=recipe.optimize.max_batch,
        serving=recipe.serving,
        tolerance=recipe.rollout.tolerance,
        profile=recipe.profiles.release,
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
    with place.locked(), rollout.begun(work):
        route, live, worst = rollout.go_live(work, place, candidate)
        place.tidy()
        # Last, and after traffic moved: aliases only tell what the router does, and a model that mends something must
        # not wait for a registry. When MLflow is away this raises Unavailable, and the retry finds the release live.
        client = registry.result()
        now = place.router.read(plan.recipe).version
        if now != route.version:
            what = f"route of {plan.recipe}: somebody else moved it after version {live.version} went live, version"
            raise Conflict(what, value=now, allowed=str(route.version), do="read the route and decide again")
        _aliases(work, client, live)
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
    site, recipe = load_site(work.settings.site), recipes.load(plan.recipe)  # what its site says of a recipe, which ``tune`` found there
    release = Release(
        model=plan.recipe,
        version=str(registered.facts["version"]),
        variant=chosen,
        classes=dataset.classes,
        shape=dataset.shape,
        max_batch=site.max_batch_of(recipe),
        serving=site.serving_of(recipe),
        preprocess=repository.preprocess(dataset),
        receipts={"gate": gate.path, "optimize": optimize.path, "register": registered.path},
    )
    with numpy.load(io.BytesIO(work.load(optimize, "golden.npz")), allow_pickle=False) as arrays:
        golden = triton.Golden(inputs=arrays["inputs"], probabilities=arrays["probabilities"])
    contents = repository.files(release, work.load(optimize, "model.onnx"), golden=golden.inputs)
    stored = {name: _stored(work, name, data, optimize.output("model.onnx")) for name, data in contents.items()}
    objects = {name: output.path for name, output in stored.items()}
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
    return Outcome(
        outputs=outputs, metrics={"smoke_difference": worst}, facts=facts, report=report, versions=versions,
        obsolete=[f"{work.folder}/{rollout.BEGUN}"],
    )  # fmt: skip
