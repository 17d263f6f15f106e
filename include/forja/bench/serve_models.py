"""A model to measure serving with: ``python -m forja.bench.serve_models RECIPE FOLDER`` in the ml environment.

The network of the recipe with the weights that it starts from: how long it takes doesn't depend on them.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    """Write model.onnx and inputs.npz, float32 [16, *shape] of grey levels."""
    import numpy as np
    import torch

    from forja import models, recipes
    from forja.recipes.base import Images
    from forja.stages import register

    recipe, folder = recipes.load(arguments[0]), Path(arguments[1])
    dataset = recipe.dataset
    assert isinstance(dataset, Images)  # noqa: S101 - a recipe of ours
    torch.manual_seed(0)
    channels = dataset.channels
    network = models.build(recipe.model, dataset.shape, len(dataset.classes), [128.0] * channels, [64.0] * channels).eval()
    (folder / "model.onnx").write_bytes(register.export(network, dataset.shape))
    inputs = np.random.default_rng(0).uniform(0, 255, (16, *dataset.shape)).astype("float32")
    np.savez(folder / "inputs.npz", inputs=inputs)


if __name__ == "__main__":
    main(sys.argv[1:])
