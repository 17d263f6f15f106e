"""The networks that recipes name: a small residual CNN for images and a multilayer perceptron for tables.

Both hold their own normalisation, so that clients of the served model send raw values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from forja.recipes.base import Cnn, Mlp, Training


def build(
    model: Cnn | Mlp,
    shape: tuple[int, ...],
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    edges: Sequence[Sequence[float]] = (),
) -> nn.Module:
    """The untrained network of a recipe: float32 [N, *shape] of raw inputs to float32 [N, classes] of logits.

    Args:
        model: what to build.
        shape: shape of one input: (channels, height, width) of grey levels 0 to 255, or (features,) in their own units.
        classes: number of logits.
        mean: mean of the training split, for each channel or each feature.
        std: standard deviation of the training split, for each channel or each feature; zeros count as 1.
        edges: what ``bin_edges`` returned; needed when ``model.bins`` is above 0.
    """
    if isinstance(model, Cnn):
        return _Resnet(model, shape[0], classes, mean, std)
    if model.bins and len(edges) != shape[0]:
        raise ValueError(f"edges has {len(edges)} rows, must have one for each of {shape[0]} features")
    return _Perceptron(model, classes, mean, std, edges if model.bins else ())


def bin_edges(features: Any, labels: Any, bins: int) -> list[list[float]]:
    """Edges of bins for a table's piecewise linear encoding, chosen by decision trees on the training split.

    Gorishniy et al. 2022, section 3.2.2, plus one tree on all features for thresholds that matter only together.

    Args:
        features: float array [N, F] in the features' own units.
        labels: int array [N].
        bins: leaves of the tree on all features, and twice the leaves of each tree on one feature.

    Returns:
        One ascending list for each feature: its smallest value, thresholds, its largest value; empty if it is constant.
    """
    from sklearn.tree import DecisionTreeClassifier  # half of a rank's imports, for those that don't call this

    together = DecisionTreeClassifier(max_leaf_nodes=max(bins, 2), min_samples_leaf=4, random_state=0)
    joint = together.fit(features, labels).tree_
    rows = []
    for index in range(features.shape[1]):
        column = features[:, index]
        low, high = float(column.min()), float(column.max())
        alone = DecisionTreeClassifier(max_leaf_nodes=max(bins // 2, 2), min_samples_leaf=16, random_state=0)
        single = alone.fit(column.reshape(-1, 1), labels).tree_
        thresholds = {*joint.threshold[joint.feature == index], *single.threshold[single.feature == 0]}
        row = [low]
        for threshold in sorted(thresholds):
            # Narrower bins would be jumps, which rounding of inputs or weights could throw to the other side.
            if threshold - row[-1] > 1e-3 * (high - low):
                row.append(float(threshold))
        rows.append([*row, high] if high > row[-1] else [])
    return rows


def augment(batch: Tensor, training: Training, generator: torch.Generator | None = None) -> Tensor:
    """Random mirroring, shift and rotation of each image, filled with 0: float32 [N, C, H, W] to the same shape, unit and device.

    ``training.flip`` mirrors every second image; ``training.shift`` is the largest shift in pixels, ``training.rotate`` the largest
    rotation in degrees, both drawn uniformly; bilinear sampling. ``generator`` must live on the batch's device.
    """
    if training.flip:
        mirrored = torch.rand(len(batch), generator=generator, device=batch.device) < 0.5
        batch = torch.where(mirrored[:, None, None, None], batch.flip(3), batch)
    if not training.shift and not training.rotate:
        return batch
    count, _, height, width = batch.shape
    draw = 2 * torch.rand(count, 3, generator=generator, device=batch.device) - 1
    angle = draw[:, 0] * math.radians(training.rotate)
    cos, sin = angle.cos(), angle.sin()
    # affine_grid counts in half image sizes, so x and y need the aspect ratio, and a pixel is 2 / size.
    x = torch.stack([cos, -sin * height / width, draw[:, 1] * training.shift * 2 / width], dim=1)
    y = torch.stack([sin * width / height, cos, draw[:, 2] * training.shift * 2 / height], dim=1)
    grid = functional.affine_grid(torch.stack([x, y], dim=1), list(batch.shape), align_corners=False)
    return functional.grid_sample(batch, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class Served(nn.Module):
    """What is exported: raw inputs float32 [N, *shape] to probabilities float32 [N, classes]."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.softmax(self.module(inputs), dim=1)


class Normalize(nn.Module):
    """(x - mean) / std along dimension 1 of an input with ``dims`` dimensions."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], dims: int) -> None:
        super().__init__()
        form = (1, len(mean), *(1,) * (dims - 2))
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(form))
        scale = [1 / s if s > 0 else 1.0 for s in std]
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32).view(form))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs - self.mean) * self.scale


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, "Deep residual learning", figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(self.conv1(inputs)))
        return torch.relu(self.bn2(self.conv2(hidden)) + self.shortcut(inputs))


class _Resnet(nn.Module):
    """Stem, residual blocks, average over the image, linear classifier."""

    def __init__(self, model: Cnn, channels: int, classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std, dims=4)
        widths = [model.width * 2**i for i in range(model.blocks)]
        self.stem = nn.Sequential(nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.blocks = nn.Sequential(*(_Block(a, b, stride=2 if i else 1) for i, (a, b) in enumerate(pairs)))
        self.dropout = nn.Dropout(model.dropout)
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.blocks(self.stem(self.normalize(inputs)))
        return self.classifier(self.dropout(features.mean(dim=(2, 3))))


class _PiecewiseLinear(nn.Module):
    """Piecewise linear encoding of features (Gorishniy et al. 2022, arXiv:2203.05556, section 3.2).

    Bin t of a feature is clip((x - low_t) / (high_t - low_t), 0, 1): float32 [N, F] to [N, bins of all features].
    """

    feature: Tensor
    low: Tensor
    scale: Tensor

    def __init__(self, edges: Sequence[Sequence[float]]) -> None:
        super().__init__()
        bins = [(index, a, b) for index, row in enumerate(edges) for a, b in pairwise(row)]
        self.width = len(bins)
        self.register_buffer("feature", torch.tensor([index for index, _, _ in bins], dtype=torch.int64))
        self.register_buffer("low", torch.tensor([a for _, a, _ in bins], dtype=torch.float32))
        self.register_buffer("scale", torch.tensor([1 / (b - a) for _, a, b in bins], dtype=torch.float32))

    def forward(self, inputs: Tensor) -> Tensor:
        return ((inputs.index_select(1, self.feature) - self.low) * self.scale).clamp(0.0, 1.0)


class _Perceptron(nn.Module):
    """Standardised features beside their piecewise linear encoding, hidden layers, linear classifier."""

    def __init__(self, model: Mlp, classes: int, mean: Sequence[float], std: Sequence[float], edges: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std, dims=2)
        self.encode = _PiecewiseLinear(edges) if edges else None
        layers: list[nn.Module] = []
        width = len(mean) + (self.encode.width if self.encode else 0)
        for units in model.hidden:
            layers += [nn.Linear(width, units), nn.ReLU(), nn.Dropout(model.dropout)]
            width = units
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.normalize(inputs)
        if self.encode is not None:
            hidden = torch.cat([hidden, self.encode(inputs)], dim=1)
        return self.classifier(self.layers(hidden))
