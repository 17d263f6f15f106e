"""train: a dataset into a trained network, by PyTorch DDP under torchrun.

What it does: copies the dataset's shards, starts one process for each rank (gloo on CPUs, NCCL on GPUs), sends metrics to
MLflow while they come, and keeps checkpoints in the lake. A second try goes on from the newest checkpoint. A profile with
several nodes makes it a gang of pods, each with its share of the recipe's ranks.

When it fails: read the last lines of its log; a rank that dies ends the others, and a gang begins again, all of it, from the
newest checkpoint. MLflow may be away: the history is in the lake and register sends what is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forja import loading
from forja.errors import BadInput, Refused
from forja.receipts import Receipt
from forja.recipes.base import Cnn, Images, Mlp, Recipe, Table, Training
from forja.stages.base import Inputs, Outcome, Plan, Stage, Work
from forja.tracking import RunLog
from forja.training import Config, Handout, checkpoint_path, epoch_of, launch, newest_checkpoint

if TYPE_CHECKING:
    # torchrun starts it: the key depends on its code, though this process never loads it.
    import forja.training.rank  # noqa: F401

STAGE = Stage(environment="ml", repeat="memoised", inputs=("dataset",))


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What train reads of a recipe."""

    dataset: Images | Table
    model: Cnn | Mlp
    training: Training
    metric: str


def plan(recipe: Recipe, inputs: Inputs, variant: str = "") -> Plan[Parts]:
    """See ``forja.stages.base``."""
    parts = Parts(dataset=recipe.dataset, model=recipe.model, training=recipe.training, metric=recipe.metric)
    return Plan(stage="train", recipe=recipe.name, team=recipe.team, parts=parts, inputs=inputs)


def run(plan: Plan[Parts], work: Work) -> Outcome:
    """Train, or go on with it.

    Raises:
        ForjaError: a rank failed; its own message is above this one.
    """
    me = launch.member()
    if me.index:
        raise BadInput("member of a gang that trains", value=me.index, allowed="0: the others lend it their processors")
    dataset_receipt = work.receipt(plan.input("dataset"))
    statistics = json.loads(work.load(dataset_receipt, "statistics.json"))
    history = work.scratch / "history.jsonl"
    resumed = _restore(work, history)
    log = _log(plan, work, dataset_receipt, _points(history))
    if me.nodes == 1:
        log()  # its libraries are read beside PyTorch's; where a whole gang waits for a member, PyTorch goes first
    handout = _handout(plan, work, dataset_receipt, statistics, me)
    ranks = launch.ranks(plan.parts.training, me)
    _torchrun(handout, plan, ranks, work, history, log, me)
    points = _points(history)
    model = work.save("model.pt", work.scratch / "model.pt")
    series = work.save("history.jsonl", history)
    run_id, unsent = log().close()
    last = _numbers(points, plan)
    report = [f"{plan.parts.training.epochs} epochs, validation {plan.parts.metric} {last[f'validation_{plan.parts.metric}']:.4f}"]
    if resumed:
        report.append(f"went on from a checkpoint after epoch {resumed}")
    if run_id is None or unsent:
        report.append(f"MLflow was away: {unsent} of {len(points)} points are still to be sent; register sends them")
    return Outcome(
        outputs={"model.pt": model, "history.jsonl": series},
        metrics={k: float(v) for k, v in last.items()},
        facts={"mlflow_run": run_id, "resumed_after_epoch": resumed, "ranks": ranks * me.nodes, "nodes": me.nodes},
        report=report,
        obsolete=_checkpoints(work),
        versions={"torch": version("torch"), "nvidia-dali-cuda120": version("nvidia-dali-cuda120")},
    )


def _log(plan: Plan[Parts], work: Work, dataset: Receipt, points: list[dict[str, Any]]) -> Callable[[], RunLog]:
    """The run in MLflow, opened by the first call, with the ``points`` of an earlier try."""

    @functools.cache
    def log() -> RunLog:
        made = RunLog(
            uri=work.settings.mlflow, experiment=f"{plan.team}/{plan.recipe}", key=work.key, name=f"{plan.recipe}-{work.key[:8]}",
            tags={"forja.recipe": plan.recipe, "forja.dataset": dataset.path, "forja.dataset_digest": dataset.digest},
            params={"dataset": dataset.path, "model": repr(plan.parts.model), **_params(plan.parts.training)},
        )  # fmt: skip
        for point in points:
            made.add(point)
        return made

    return log


def _numbers(points: list[dict[str, Any]], plan: Plan[Parts]) -> dict[str, float]:
    """Metrics of the last epoch; Refused when the recipe's own is missing, which no retry would mend."""
    last: dict[str, float] = points[-1]["metrics"]
    if f"validation_{plan.parts.metric}" in last:
        return last
    if "validation_accuracy" in last:
        raise Refused(
            f"validation split of {plan.recipe} has no positive sample", do="ingest more data, or enlarge split.validation in the recipe"
        )
    raise Refused(f"training of {plan.recipe} diverged: the network answers NaN", do="lower training.learning_rate in the recipe")


def _params(training: Training) -> dict[str, str]:
    return {name: str(value) for name, value in dataclasses.asdict(training).items()}


def _handout(plan: Plan[Parts], work: Work, receipt: Receipt, statistics: dict[str, Any], me: launch.Member) -> Path:
    dataset, model = plan.parts.dataset, plan.parts.model
    edges: list[list[float]] = []
    if isinstance(model, Mlp) and model.bins:
        from forja import models

        data = loading.arrays(work, receipt, dataset, "train")
        edges = models.bin_edges(data.inputs, data.labels, model.bins)
    config = Config(
        dataset=dataset, model=model, training=plan.parts.training, metric=plan.parts.metric,
        mean=statistics["mean"], std=statistics["std"], edges=edges,
        class_counts=class_counts(statistics, dataset.classes),
    )  # fmt: skip
    return hand_out(work, receipt, me, config)


def class_counts(statistics: dict[str, Any], classes: tuple[str, ...]) -> list[int]:
    """Training samples of each class in the order of the model's outputs; statistics.json has the classes in the order of their names."""
    found = statistics["splits"]["train"]["classes"]
    return [int(found[name]) for name in classes]


def hand_out(work: Work, receipt: Receipt, me: launch.Member, config: Config | None) -> Path:
    """Copy the dataset's shards and write what this machine's ranks read first; ``config`` is None for all members but 0."""
    handout = Handout(
        folder=work.scratch, train=loading.fetch(work, receipt, "train"), validation=loading.fetch(work, receipt, "validation"),
        config=config, timeout_s=me.timeout_s if me.nodes > 1 else None,
    )  # fmt: skip
    path = work.scratch / "handout.pickle"
    path.write_bytes(pickle.dumps(handout))
    return path


def _torchrun(
    handout: Path, plan: Plan[Parts], ranks: int, work: Work, history: Path, log: Callable[[], RunLog], me: launch.Member
) -> None:
    """Run the ranks; each epoch goes to the log and to MLflow, each checkpoint to the lake, as they come."""
    epochs = plan.parts.training.epochs
    of = f" on each of {me.nodes} nodes" if me.nodes > 1 else ""
    work.say(f"torchrun with {ranks} ranks of {launch.threads(ranks)} threads{of}")
    seen, checkpoint = len(_points(history)), newest_checkpoint(work.scratch)

    def look() -> bool:
        nonlocal seen, checkpoint
        for point in _points(history)[seen:]:
            seen += 1
            log().add(point)
            work.say(f"epoch {point['step']}/{epochs}  " + "  ".join(f"{k} {v:.4g}" for k, v in sorted(point["metrics"].items())))
        work.check()  # before anything is written: who lost the claim must not remove the other's checkpoint
        checkpoint = _keep(work, history, checkpoint)
        return False

    launch.run(handout, me, ranks, work.key, look)


def _points(history: Path) -> list[dict[str, Any]]:
    """Whole lines of the history so far."""
    if not history.exists():
        return []
    return [json.loads(line) for line in history.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _checkpoints(work: Work) -> list[str]:
    return [path for path in work.lake.list(work.folder) if path.rpartition("/")[2].startswith("checkpoint-")]


def _keep(work: Work, history: Path, seen: Path | None) -> Path | None:
    """Copy a new checkpoint to the lake together with the history; the one that was copied last."""
    local = newest_checkpoint(work.scratch)
    if local is None or local == seen:
        return seen
    path = f"{work.folder}/{local.name}"
    # One of this very name may be there already: a try that died between keeping it and here.
    older = [name for name in _checkpoints(work) if name != path]
    points = history.read_bytes()
    work.lake.create(path, len(points).to_bytes(8) + points + local.read_bytes())
    for name in older:
        work.lake.delete(name)
    if seen is not None:
        seen.unlink()
    return local


def _restore(work: Work, history: Path) -> int:
    """Bring back the newest checkpoint and its history; number of epochs that are done."""
    found = _checkpoints(work)
    if not found:
        return 0
    data, done = work.lake.get(found[-1]), epoch_of(found[-1])
    size = int.from_bytes(data[:8])
    checkpoint_path(work.scratch, done).write_bytes(data[8 + size :])
    # The history may be ahead of the checkpoint: those epochs are done again.
    lines = data[8 : 8 + size].splitlines(keepends=True)
    history.write_bytes(b"".join(lines[:done]))
    work.say(f"going on after epoch {done}")
    return done
