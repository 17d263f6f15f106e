"""One rank of distributed training: ``torchrun ... -m forja.training.rank CONFIG``.

The stage ``train`` starts it, reads the history that rank 0 writes, and keeps its checkpoints in the lake.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from forja import evaluation, loading, models
from forja.recipes.base import Images
from forja.training import Config, build, checkpoint_path, newest_checkpoint, saved

CHECKPOINT_S = 5.0
"""Seconds between two checkpoints at least: an epoch of a small model takes less than writing it."""


def main(path: str) -> None:
    """Train one rank to the end, from the newest checkpoint when there is one."""
    config: Config = pickle.loads(Path(path).read_bytes())  # noqa: S301 - the stage wrote it a moment ago
    device = _device()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        _train(config, device)
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _train(config: Config, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    training = config.training
    torch.manual_seed(training.seed)
    # NHWC is what tensor cores want: https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html
    gpu_images = device.type == "cuda" and isinstance(config.dataset, Images)
    layout = torch.channels_last if gpu_images else torch.contiguous_format
    module = build(config).to(device=device, memory_format=layout)
    batch = training.batch_size // world
    batches = _batches(config, config.train, batch, device, shuffle=True)
    steps = len(batches)
    optimizer = torch.optim.AdamW(module.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, total_steps=training.epochs * steps)
    done = _resume(config, module, optimizer, schedule, device)
    ddp = DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    weights = class_weights(config.class_counts, training.balance).to(device)
    generator = torch.Generator(device=device).manual_seed(training.seed * 1000 + rank + done * world)
    kept = time.monotonic()
    for epoch in range(done, training.epochs):
        began = time.monotonic()
        loss = _epoch(ddp, batches, optimizer, schedule, weights, config, device, layout, generator)
        numbers = _validate(module, config, device, layout)
        if rank == 0:
            numbers |= {"train_loss": loss, "learning_rate": schedule.get_last_lr()[0], "epoch_s": time.monotonic() - began}
            _append(config.folder / "history.jsonl", {"step": epoch + 1, "time": time.time(), "metrics": numbers})
            if time.monotonic() - kept > CHECKPOINT_S:
                kept = time.monotonic()
                _checkpoint(config, module, optimizer, schedule, epoch + 1)
    if rank == 0:
        _write(config.folder / "model.pt", saved(config, module))


def _batches(config: Config, shards: loading.Shards, batch: int, device: torch.device, *, shuffle: bool) -> Any:
    return loading.training_batches(
        config.dataset, shards, batch_size=batch, rank=dist.get_rank(), world=dist.get_world_size(), shuffle=shuffle,
        seed=config.training.seed, device_id=device.index if device.type == "cuda" else None,
    )  # fmt: skip


def _epoch(
    ddp: torch.nn.Module, batches: Any, optimizer: Any, schedule: Any, weights: torch.Tensor, config: Config,
    device: torch.device, layout: torch.memory_format, generator: torch.Generator,
) -> float:  # fmt: skip
    """One pass over this rank's share; mean loss of all ranks."""
    ddp.train()
    total = torch.zeros(2, device=device)
    for (part,) in batches:
        inputs = part["inputs"].to(device=device, memory_format=layout, non_blocking=True)
        labels = part["labels"][:, 0].to(device=device, dtype=torch.int64, non_blocking=True)
        if isinstance(config.dataset, Images):
            inputs = models.augment(inputs, config.training, generator)
        # bfloat16 needs no loss scaling: https://docs.pytorch.org/docs/stable/amp.html
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = functional.cross_entropy(ddp(inputs), labels, weight=weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        total += torch.stack([loss.detach().float() * len(labels), torch.tensor(float(len(labels)), device=device)])
    dist.all_reduce(total)
    return float(total[0] / total[1])


@torch.no_grad()
def _validate(module: torch.nn.Module, config: Config, device: torch.device, layout: torch.memory_format) -> dict[str, float]:
    """Metrics of the whole validation split on rank 0; an empty dictionary on the others."""
    module.eval()
    mine = []
    for (part,) in _batches(config, config.validation, 256, device, shuffle=False):
        logits = module(part["inputs"].to(device=device, memory_format=layout)).float()
        mine.append((torch.softmax(logits, 1).cpu().numpy(), part["labels"][:, 0].cpu().numpy()))
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, gathered)
    if gathered is None:
        return {}
    pairs = [pair for share in gathered for pair in share]
    probabilities, labels = (np.concatenate(column) for column in zip(*pairs, strict=True))
    numbers = evaluation.measure(probabilities, labels, config.metric)
    return {f"validation_{name}": value for name, value in numbers.items()}


def class_weights(counts: list[int], balance: float) -> torch.Tensor:
    """Weights of the classes in the loss, float32 [classes], mean 1 over samples: count ** -balance."""
    raw = torch.tensor([max(c, 1) for c in counts], dtype=torch.float64) ** -balance
    share = torch.tensor(counts, dtype=torch.float64) / max(sum(counts), 1)
    return (raw / (raw * share).sum()).float()


def _checkpoint(config: Config, module: torch.nn.Module, optimizer: Any, schedule: Any, epoch: int) -> None:
    state = {"epoch": epoch, "module": module.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    _write(checkpoint_path(config.folder, epoch), state)


def _resume(config: Config, module: torch.nn.Module, optimizer: Any, schedule: Any, device: torch.device) -> int:
    """Load the checkpoint when there is one; number of epochs that are done."""
    path = newest_checkpoint(config.folder)
    if path is None:
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return int(state["epoch"])


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write aside and rename: whoever reads sees the old file or the new one."""
    aside = path.with_suffix(".part")
    torch.save(content, aside)
    aside.replace(path)


def _append(path: Path, point: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(point, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
