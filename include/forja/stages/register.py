"""register: a trained network into a version of the registered model in MLflow.

What it does: exports ONNX (fp32), compares it with torch, evaluates it on the validation split and, once, on the test
split, sends the points of the training's history that MLflow doesn't have, and makes the model version with its
signature and the digests as tags, alias ``challenger``. A version of the very same ONNX file is adopted.

When it fails: MLflow not answering is the usual reason; the stage is retried and goes on. A parity error means that the
exporter changed the network: look at the operators that the message names.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from forja import evaluation, loading, tracking
from forja.errors import Refused
from forja.receipts import Output, Receipt
from forja.recipes.base import Cnn, Images, Mlp, Recipe, Table
from forja.stages.base import Inputs, Outcome, Plan, Stage, Work

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

STAGE = Stage(environment="ml", repeat="reconciled", inputs=("dataset", "training"))
OPSET = 17
"""What TensorRT 10 and 11, TensorRT-RTX and ONNX Runtime all read."""
IR_VERSION = 8
PARITY = 1e-4
"""Largest difference of a probability between torch and ONNX Runtime."""
ONNX_TAG = "forja.onnx"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What register reads of a recipe."""

    dataset: Images | Table
    model: Cnn | Mlp
    metric: str
    description: str


def plan(recipe: Recipe, inputs: Inputs, variant: str = "") -> Plan[Parts]:
    """See ``forja.stages.base``."""
    parts = Parts(dataset=recipe.dataset, model=recipe.model, metric=recipe.metric, description=recipe.description)
    return Plan(stage="register", recipe=recipe.name, team=recipe.team, parts=parts, inputs=inputs)


def run(plan: Plan[Parts], work: Work) -> Outcome:
    """Make the model version, or adopt it.

    Raises:
        Refused: ONNX Runtime and torch answer differently.
        Unavailable: MLflow doesn't answer.
    """
    dataset, training = work.receipt(plan.input("dataset")), work.receipt(plan.input("training"))
    outcome = _adopted(work.previous) if work.previous else _exported(plan, work, dataset, training)
    onnx = outcome.outputs["model.onnx"]
    with tracking.reachable(work.settings.mlflow):
        mlflow = tracking.client(work.settings.mlflow)
        run_id = _complete_run(mlflow, plan, work, dataset, training, outcome.metrics)
        tags = {ONNX_TAG: onnx.sha256, "forja.dataset": dataset.path, "forja.dataset_digest": dataset.digest, "forja.code": training.code}
        made = _version(mlflow, plan, work, onnx, run_id, tags)
    work.say(f"model {plan.recipe} version {made.version}")
    metric, numbers = plan.parts.metric, outcome.metrics
    outcome.facts = {"model": plan.recipe, "version": str(made.version), "mlflow_run": run_id}
    outcome.report = [
        f"MLflow model {plan.recipe} version {made.version}",
        f"test {metric} {numbers[f'test_{metric}']:.4f}, validation {metric} {numbers[f'validation_{metric}']:.4f}",
        f"ONNX opset {OPSET}, {onnx.bytes / 1e6:.2f} MB, differs from torch by {numbers['parity']:.1e} at most",
    ]
    return outcome


def _adopted(receipt: Receipt) -> Outcome:
    """The ONNX file and the numbers of the last time: only MLflow has to be looked at."""
    return Outcome(outputs=receipt.outputs, metrics=receipt.metrics, versions=receipt.versions)


def _exported(plan: Plan[Parts], work: Work, dataset: Receipt, training: Receipt) -> Outcome:
    """ONNX export, parity and evaluation."""
    module = network(plan.parts.dataset, plan.parts.model, work.load(training, "model.pt"))
    onnx_bytes = export(module, plan.parts.dataset.shape)
    work.say(f"exported ONNX, {len(onnx_bytes) / 1e6:.2f} MB")
    numbers: dict[str, float] = {}
    for split in ("validation", "test"):
        data = loading.arrays(work, dataset, plan.parts.dataset, split)
        answers = evaluation.answers(onnx_bytes, data.inputs)
        if split == "validation":
            numbers["parity"] = parity(module, data.inputs[:256], answers[:256])
        numbers |= {f"{split}_{k}": v for k, v in evaluation.measure(answers, data.labels, plan.parts.metric).items()}
        work.say(f"{split}: " + "  ".join(f"{k} {v:.4f}" for k, v in numbers.items() if k.startswith(split)))
    outputs = {
        "model.onnx": work.save("model.onnx", onnx_bytes),
        "evaluation.json": work.save("evaluation.json", json.dumps(numbers, sort_keys=True).encode()),
    }
    return Outcome(outputs=outputs, metrics=numbers, versions={n: version(n) for n in ("torch", "onnx", "onnxruntime", "mlflow-skinny")})


def network(dataset: Images | Table, model: Cnn | Mlp, data: bytes) -> Any:
    """The served network around the weights in a model.pt, ready to answer."""
    import torch

    from forja import models

    saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    module = models.build(model, dataset.shape, len(dataset.classes), saved["mean"], saved["std"], saved["edges"])
    module.load_state_dict(saved["weights"])
    return models.Served(module).eval()


def export(module: Any, shape: tuple[int, ...], opset: int = OPSET, ir: int = IR_VERSION) -> bytes:
    """ONNX of a served network: ``input`` float32 [N, *shape] to ``probabilities`` float32 [N, classes], batch norm folded."""
    import onnx
    import torch

    buffer = io.BytesIO()
    torch.onnx.export(
        module, (torch.zeros(2, *shape),), buffer, input_names=["input"], output_names=["probabilities"], opset_version=opset,
        dynamic_axes={"input": {0: "batch"}, "probabilities": {0: "batch"}}, dynamo=False,
    )  # fmt: skip
    model = onnx.load_from_string(buffer.getvalue())
    model.ir_version = ir
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def parity(module: Any, inputs: np.ndarray[Any, Any], answers: np.ndarray[Any, Any]) -> float:
    """Largest difference of a probability between torch and ONNX Runtime; Refused above PARITY."""
    import torch

    with torch.no_grad():
        difference = float((module(torch.from_numpy(inputs)) - torch.from_numpy(answers)).abs().max())
    if not difference <= PARITY:
        raise Refused("ONNX Runtime and torch answer differently", value=difference, allowed=f"{PARITY} at most")
    return difference


def _complete_run(
    mlflow: MlflowClient, plan: Plan[Parts], work: Work, dataset: Receipt, training: Receipt, numbers: dict[str, float]
) -> str:
    """The training's run, made if MLflow was away all the time, with the whole series and the evaluation."""
    tags = {"forja.recipe": plan.recipe, "forja.dataset": dataset.path, "forja.dataset_digest": dataset.digest}
    run_id = tracking.run_for(mlflow, f"{plan.team}/{plan.recipe}", training.key, f"{plan.recipe}-{training.key[:8]}", tags)
    points = [json.loads(line) for line in work.load(training, "history.jsonl").splitlines()]
    last = points[-1]
    points.append({"step": last["step"], "time": last["time"], "metrics": numbers})
    tracking.send(mlflow, run_id, points, tracking.taken(mlflow, run_id))
    mlflow.set_terminated(run_id, "FINISHED", end_time=int(last["time"] * 1000))
    return run_id


def _version(mlflow: MlflowClient, plan: Plan[Parts], work: Work, onnx: Output, run_id: str, tags: dict[str, str]) -> ModelVersion:
    """The version of this very ONNX file; ``challenger`` unless it is live already."""
    from mlflow.exceptions import MlflowException

    try:
        mlflow.create_registered_model(plan.recipe, tags={"forja.team": plan.team}, description=plan.parts.description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    found = mlflow.search_model_versions(f"name = '{plan.recipe}' and tags.`{ONNX_TAG}` = '{tags[ONNX_TAG]}'", max_results=1)
    made = found[0] if found else _log_model(plan, work, onnx, run_id, tags)
    aliases = dict(mlflow.get_registered_model(plan.recipe).aliases)
    if aliases.get("champion") != made.version and aliases.get("challenger") != made.version:
        mlflow.set_registered_model_alias(plan.recipe, "challenger", made.version)
    return made


def _log_model(plan: Plan[Parts], work: Work, onnx: Output, run_id: str, tags: dict[str, str]) -> ModelVersion:
    import mlflow
    import numpy as np
    import onnx as onnx_library
    from mlflow.models.signature import ModelSignature
    from mlflow.types import Schema, TensorSpec

    classes = len(plan.parts.dataset.classes)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("float32"), (-1, *plan.parts.dataset.shape), "input")]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, classes), "probabilities")]),
    )
    mlflow.set_tracking_uri(work.settings.mlflow)
    with mlflow.start_run(run_id=run_id):
        model = onnx_library.load_from_string(work.lake.read(onnx.path, onnx.sha256))
        info = mlflow.onnx.log_model(
            model, name="model", signature=signature, save_as_external_data=False,
            pip_requirements=[f"onnxruntime=={version('onnxruntime')}"], metadata={"classes": list(plan.parts.dataset.classes)},
        )  # fmt: skip
    return mlflow.MlflowClient().create_model_version(plan.recipe, info.model_uri, run_id=run_id, tags=tags, model_id=info.model_id)
