"""Models to release where there are a router, Triton and MLflow, with the receipts that lead to each."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from forja import receipts, recipes, tracking
from forja.lake import Lake, sha256
from forja.receipts import Input, Output, Receipt
from forja.services import supervisor
from forja.services.triton import slot
from forja.serving import triton
from forja.stages import harness

MODEL = "digits"


@dataclass(kw_only=True)
class Serving:
    """A router, Triton and MLflow, and models to release."""

    stack: Any
    """What runs, by its ``settings`` and ``env``: a stack of this machine, or the platform of a cluster."""
    models: Path
    lake: Lake
    router: Any
    inputs: dict[tuple[int, bool], dict[str, str]] = field(default_factory=dict)

    @property
    def settings(self) -> Any:
        return self.stack.settings

    @property
    def endpoint(self) -> str:
        return self.settings.endpoint.removeprefix("http://")

    def golden(self, seed: int) -> triton.Golden:
        with np.load(self.models / f"{seed}.npz") as arrays:
            return triton.Golden(inputs=arrays["inputs"], probabilities=arrays["probabilities"])

    def mlflow(self) -> Any:
        return tracking.client(self.settings.mlflow)

    def aliases(self) -> dict[str, str]:
        return {name: str(v) for name, v in self.mlflow().get_registered_model(MODEL).aliases.items()}

    def gate(self, seed: int, *, damaged: bool = False) -> dict[str, str]:
        """Receipts of a gate that chose the model of this seed, and of that model; ``damaged`` has golden answers that it never gave."""
        if (seed, damaged) not in self.inputs:
            self.inputs[seed, damaged] = self._gate(seed, damaged)
        return self.inputs[seed, damaged]

    def version(self) -> dict[str, str]:
        """Facts of a new model version."""
        client = self.mlflow()
        with contextlib.suppress(Exception):
            client.create_registered_model(MODEL)
        run = client.create_run("0").info
        version = str(client.create_model_version(MODEL, source=f"{run.artifact_uri}/model", run_id=run.run_id).version)
        client.set_registered_model_alias(MODEL, "challenger", version)
        return {"model": MODEL, "version": version, "mlflow_run": run.run_id}

    def registered_again(self, seed: int) -> str:
        """Another register receipt of the same ONNX file: MLflow lost its version, so register made a new one."""
        facts = self.version()
        return self._receipt("register", f"{seed}-again-{facts['version']}", self.onnx(seed), {}, facts)

    def onnx(self, seed: int) -> dict[str, bytes]:
        return {"model.onnx": (self.models / f"{seed}.onnx").read_bytes()}

    def _gate(self, seed: int, damaged: bool) -> dict[str, str]:
        facts = self.version()
        golden = (self.models / f"{seed}.npz").read_bytes()
        if damaged:
            arrays = dict(np.load(io.BytesIO(golden)))
            buffer = io.BytesIO()
            np.savez(buffer, **{**arrays, "probabilities": arrays["probabilities"] + np.float32(0.01)})
            golden = buffer.getvalue()
        model = self.onnx(seed)
        name = f"{seed}{'-damaged' if damaged else ''}"
        register = self._receipt("register", name, model, {}, facts)
        optimize = self._receipt("optimize", name, {**model, "golden.npz": golden}, {"model": register}, {}, "fp32")
        verdict = {"verdict.json": f"{name} {facts['version']}".encode()}
        return {"gate": self._receipt("gate", name, verdict, {"optimize": optimize}, {"chosen": "fp32"}), "model": register}

    def _receipt(
        self, stage: str, key: str, outputs: dict[str, bytes], inputs: dict[str, str], facts: dict[str, Any], variant: str = ""
    ) -> str:
        folder = receipts.place("vision", MODEL, stage, key)
        written = {}
        for name, data in outputs.items():
            self.lake.create(f"{folder}/{name}", data)
            written[name] = Output(path=f"{folder}/{name}", sha256=sha256(data), bytes=len(data))
        receipt = Receipt(
            stage=stage, recipe=MODEL, team="vision", key=key, code="", command="", outputs=written, metrics={}, facts=facts, report=[],
            inputs={n: [Input(ref=ref, digest=receipts.load(self.lake, ref).digest)] for n, ref in inputs.items()}, versions={},
            started="", finished="", seconds=0.0, variant=variant,
        )  # fmt: skip
        self.lake.create(f"{folder}/receipt.json", receipt.to_json())
        return f"{folder}/receipt.json"

    def release(self, seed: int, *, damaged: bool = False, **other: str) -> Receipt:
        refs = {name: [path] for name, path in {**self.gate(seed, damaged=damaged), **other}.items()}
        return harness.execute(self.settings, "release", recipes.load(MODEL), refs)[0]

    def spawn(self, seed: int) -> subprocess.Popen[str]:
        inputs = [word for name, path in self.gate(seed).items() for word in ("--in", f"{name}={path}")]
        command = [sys.executable, "-m", "forja.stages", "release", "--recipe", MODEL, *inputs]
        env = {**self.stack.env, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def answers(self, seed: int) -> bool:
        """Whether the endpoint answers as the model of this seed does."""
        golden = self.golden(seed)
        return bool(np.abs(triton.infer(self.endpoint, MODEL, golden.inputs) - golden.probabilities).max() < 1e-3)

    def pid(self, name: str) -> int:
        return supervisor.processes(self.settings)[slot(self.settings, MODEL, name).program].pid
