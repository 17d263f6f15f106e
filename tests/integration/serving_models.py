"""Makes small ONNX models with their golden answers, in the ml environment: ``python serving_models.py FOLDER SEED...``.

Digits' signature: float32 [N, 1, 8, 8] to float32 [N, 10]. Different seeds answer differently.
"""

import pathlib
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def main(folder: pathlib.Path, seed: int) -> None:
    """Write <seed>.onnx and <seed>.npz."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(64, 10)).astype("float32") / 256
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["input"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "linear",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    inputs = np.random.default_rng(0).uniform(0, 255, size=(16, 1, 8, 8)).astype("float32")
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    answers = session.run(None, {"input": inputs})[0]
    (folder / f"{seed}.onnx").write_bytes(model)
    np.savez(folder / f"{seed}.npz", inputs=inputs, probabilities=answers, labels=answers.argmax(axis=1))


if __name__ == "__main__":
    for number in sys.argv[2:]:
        main(pathlib.Path(sys.argv[1]), int(number))
