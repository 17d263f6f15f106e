"""Triton's python backend: one model, answered by ONNX Runtime on the CPU. Runs in the serving environment, alone.

It lies beside its model.onnx in a release's version folder.
"""

import os
import pathlib
import signal

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]


class TritonPythonModel:
    """The interface that the backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load model.onnx; an error here leaves the version unavailable, with the reason in the repository index."""
        self.leave = _die_together()
        try:
            self.session = self._load(args)
        except BaseException:
            # No crash: the server stays and tells the reason. It would be killed and started again for ever otherwise.
            os.write(self.leave, b".")
            raise

    def _load(self, args: dict[str, str]) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        # Requests come in batches from many clients: one thread a slot, so that two slots and their clients share two cores.
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        # As in the evaluation that the gate judged: without VNNI the kernels for int8 saturate.
        options.add_session_config_entry("session.x64quantprecision", "1")
        path = pathlib.Path(args["model_repository"], args["model_version"], "model.onnx")
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def finalize(self) -> None:
        """An orderly end, of which the watcher must not make a kill."""
        os.write(self.leave, b".")

    def execute(self, requests: list) -> list:  # type: ignore[type-arg]
        """Answer a batch of requests, each float32 [n, *shape], by one run."""
        inputs = [pb_utils.get_input_tensor_by_name(request, "input").as_numpy() for request in requests]
        answers = self.session.run(["probabilities"], {"input": np.concatenate(inputs)})[0].astype(np.float32)
        responses, start = [], 0
        for batch in inputs:
            rows = np.ascontiguousarray(answers[start : start + len(batch)])
            start += len(batch)
            responses.append(pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("probabilities", rows)]))
        return responses


def _die_together() -> int:
    """Make the server die when this process does; writing to the returned descriptor calls that off.

    Triton doesn't start another python process when one was killed (out of memory, say): it answers 500 for good, and
    looks alive to its supervisor. A dead server is started again within seconds, and Envoy bridges them.
    """
    server = os.pidfd_open(os.getppid())  # not the number, which may be another process by then
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(write)
        if os.read(read, 1) == b"":
            signal.pidfd_send_signal(server, signal.SIGKILL)
        os._exit(0)
    os.close(read)
    os.close(server)
    return write
