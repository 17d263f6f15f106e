"""Makes a small model of cifar10's signature, images, and what the client-side path answers: ``python ensemble_models.py FOLDER``, in ml.

Images are decoded as ``./forja predict`` decodes them, and the model is asked as the evaluation asks it.
"""

import io
import pathlib
import sys

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from forja import evaluation, loading, recipes


def encoded(height: int, width: int, kind: str, seed: int) -> bytes:
    """An image of waves and noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([127 + 90 * np.sin(x / (5 + seed + i) + i) * np.cos(y / (4 + i)) for i in range(3)], axis=-1)
    pixels = np.clip(waves + np.random.default_rng(seed).normal(0, 10, waves.shape), 0, 255).astype("uint8")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def main(folder: pathlib.Path) -> None:
    """Write model.onnx, answers.npz and one file for each image: even numbers of the model's own size, odd ones larger."""
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(3072, 10)).astype("float32") / 4096
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["input"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "linear",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    sizes = [(32, 32) if i % 2 == 0 else (90 + 10 * i, 120) for i in range(8)]
    images = [encoded(*size, "JPEG" if i < 4 else "PNG", i) for i, size in enumerate(sizes)]
    decoded = [image for image in loading.decode(images, recipes.load("cifar10").dataset) if image is not None]  # type: ignore[arg-type]
    inputs = np.stack(decoded)
    (folder / "model.onnx").write_bytes(model)
    for i, image in enumerate(images):
        (folder / f"{i}.image").write_bytes(image)
    np.savez(folder / "answers.npz", inputs=inputs, probabilities=evaluation.answers(model, inputs))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
