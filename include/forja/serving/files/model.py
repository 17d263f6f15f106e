"""Triton's python backend: one model, answered by ONNX Runtime on the CPU. Runs in the serving environment, alone.

It lies beside its model.onnx, labels.txt and preprocess.json in a release's version folder. Triton itself refuses an input of
another shape or type; what is in it is checked here, so that one bad request fails alone and not with those it shares a batch with.
"""

import json
import os
import pathlib

import lifeline  # type: ignore[import-not-found]
import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]


class TritonPythonModel:
    """The interface that the backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load model.onnx; an error here leaves the version unavailable, with the reason in the repository index."""
        self.leave = lifeline.die_together()
        try:
            folder = pathlib.Path(args["model_repository"], args["model_version"])
            _check_labels(folder, json.loads(args["model_config"]))
            self.low, self.high = _limits(folder)
            self.session = _session(folder)
        except BaseException:
            # No crash: the server stays and tells the reason. It would be killed and started again for ever otherwise.
            os.write(self.leave, b".")
            raise

    def finalize(self) -> None:
        """An orderly end, of which the watcher must not make a kill."""
        os.write(self.leave, b".")

    def execute(self, requests: list) -> list:  # type: ignore[type-arg]
        """Answer a batch of requests, each float32 [n, *shape], by one run."""
        inputs = [pb_utils.get_input_tensor_by_name(request, "input").as_numpy() for request in requests]
        refused = {i: why for i, batch in enumerate(inputs) if (why := self._wrong(batch))}
        good = [batch for i, batch in enumerate(inputs) if i not in refused]
        answers = self.session.run(["probabilities"], {"input": np.concatenate(good)})[0].astype(np.float32) if good else None
        responses, start = [], 0
        for i, batch in enumerate(inputs):
            if i in refused:
                error = pb_utils.TritonError(refused[i], pb_utils.TritonError.INVALID_ARG)
                responses.append(pb_utils.InferenceResponse(error=error))
                continue
            rows = np.ascontiguousarray(answers[start : start + len(batch)])  # type: ignore[index]
            start += len(batch)
            responses.append(pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("probabilities", rows)]))
        return responses

    def _wrong(self, batch: np.ndarray) -> str:
        """What is wrong with a request's input; empty when nothing is."""
        if not len(batch):
            return "input: got an empty batch; allowed: one sample or more"
        # Written so that NaN is wrong; infinity is outside every limit.
        fine = (batch >= self.low) & (batch <= self.high)
        if fine.all():
            return ""
        where = tuple(int(i) for i in np.argwhere(~fine)[0])
        low, high = (float(np.broadcast_to(limit, batch.shape[1:])[where[1:]]) for limit in (self.low, self.high))
        free = high >= np.finfo(np.float32).max
        allowed = "a finite number" if free else f"{low:g} to {high:g}"
        return f"input: got {float(batch[where]):g} at {list(where[1:])} of sample {where[0]}; allowed: {allowed}"


def _session(folder: pathlib.Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # Requests come in batches from many clients: one thread an instance, so that instances, slots and their clients share the cores.
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # As in the evaluation that the gate judged: without VNNI the kernels for int8 saturate.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def _limits(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value allowed, float32: one for all, or one for each feature; null is any finite number."""
    described = json.loads((folder / "preprocess.json").read_text())
    widest = float(np.finfo(np.float32).max)
    found = []
    for name, free in (("low", -widest), ("high", widest)):
        limit = described[name]
        values = [free if v is None else v for v in limit] if isinstance(limit, list) else free if limit is None else limit
        found.append(np.asarray(values, dtype=np.float32))
    return found[0], found[1]


def _check_labels(folder: pathlib.Path, config: dict) -> None:  # type: ignore[type-arg]
    """Triton names answers by the file that lies beside the versions, and asks nobody whether it is this version's."""
    mine = (folder / "labels.txt").read_text().splitlines()
    served = (folder.parent / "labels.txt").read_text().splitlines()
    outputs = int(config["output"][0]["dims"][0])
    if served != mine or len(mine) != outputs:
        raise ValueError(f"labels.txt: got {len(served)} labels {served[:3]}; allowed: the {outputs} of the version, {mine[:3]} and so on")
