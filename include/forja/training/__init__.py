"""Distributed training: what the stage ``train`` and the ranks that it starts share. Torch is imported by the ranks alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forja.loading import Shards
from forja.recipes.base import Cnn, Images, Mlp, Table, Training

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all ranks train, and how."""

    dataset: Images | Table
    model: Cnn | Mlp
    training: Training
    metric: str
    mean: list[float]
    std: list[float]
    edges: list[list[float]]
    class_counts: list[int]


@dataclass(frozen=True, kw_only=True)
class Handout:
    """What the ranks of one machine get from their stage, as a pickle in its scratch folder."""

    folder: Path
    """Where the rank that writes leaves history.jsonl, checkpoint-<epoch>.pt and model.pt."""
    train: Shards
    validation: Shards
    config: Config | None
    """None on the members of a gang that get it from member 0's rank."""
    timeout_s: int | None = None
    """Seconds that a rank waits for another in a step; None for PyTorch's default, half an hour with gloo."""


def build(config: Config) -> torch.nn.Module:
    """The untrained network."""
    from forja import models

    return models.build(config.model, config.dataset.shape, len(config.dataset.classes), config.mean, config.std, config.edges)


def saved(config: Config, module: torch.nn.Module) -> dict[str, Any]:
    """Content of model.pt: weights, and what rebuilds the network around them."""
    return {"weights": module.state_dict(), "mean": config.mean, "std": config.std, "edges": config.edges}


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """Where the checkpoint after ``epoch`` lies."""
    return folder / f"checkpoint-{epoch:06d}.pt"


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the latest epoch."""
    return max(folder.glob("checkpoint-*.pt"), default=None)


def epoch_of(name: str) -> int:
    """Epoch that a checkpoint's name tells."""
    return int(name.rpartition("-")[2].removesuffix(".pt"))
