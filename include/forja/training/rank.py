"""One rank of distributed training: ``torchrun ... -m forja.training.rank HANDOUT``.

The stage ``train`` starts it, reads the history that one rank writes, and keeps its checkpoints in the lake. That rank is the first
of those whose stage gave them the configuration: torchrun numbers the members of a gang as it likes.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import os
import pickle
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from forja import evaluation, loading, models
from forja.recipes.base import Images
from forja.training import Config, Handout, build, checkpoint_path, newest_checkpoint, saved

CHECKPOINT_S = 5.0
"""Seconds between two checkpoints at least: an epoch of a small model takes less than writing it."""

MEET_S = 300.0
"""Seconds that a rank waits for the others to appear: PyTorch's files may lie cold on one node and warm on another."""


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What a rank trains with."""

    config: Config
    checkpoint: bytes
    """Content of the checkpoint to go on from; empty to begin."""
    writer: int
    """Rank that writes."""
    handout: Handout
    """This machine's own."""


def main(path: str) -> None:
    """Train one rank to the end, from the newest checkpoint when there is one."""
    handout: Handout = pickle.loads(Path(path).read_bytes())  # noqa: S301 - the stage wrote it a moment ago
    device = _device()
    meet = None if handout.timeout_s is None else datetime.timedelta(seconds=MEET_S)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=meet)
    try:
        agreed = _agree(handout)
        if handout.timeout_s is not None and dist.group.WORLD is not None:
            dist.group.WORLD.set_timeout(datetime.timedelta(seconds=handout.timeout_s))
        _train(agreed, device)
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _agree(handout: Handout) -> Agreed:
    """Get the configuration and the checkpoint from the one rank that writes: no two ranks can begin from different ones."""
    has: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(has, handout.config is not None)
    writer = has.index(True)
    told: list[Any] = [None]
    if dist.get_rank() == writer:
        found = newest_checkpoint(handout.folder)
        told = [(handout.config, found.read_bytes() if found else b"")]
    dist.broadcast_object_list(told, src=writer)
    config, checkpoint = told[0]
    return Agreed(config=config, checkpoint=checkpoint, writer=writer, handout=handout)


def _train(agreed: Agreed, device: torch.device) -> None:
    rank, world, config, folder = dist.get_rank(), dist.get_world_size(), agreed.config, agreed.handout.folder
    training = config.training
    torch.manual_seed(training.seed)
    # NHWC is what tensor cores want (https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html), and a CPU trains
    # a residual network a fifth faster with it.
    layout = torch.channels_last if isinstance(config.dataset, Images) else torch.contiguous_format
    module = build(config).to(device=device, memory_format=layout)
    batches = _batches(config, agreed.handout.train, training.batch_size // world, device, shuffle=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, total_steps=training.epochs * len(batches))
    done = _resume(agreed.checkpoint, module, optimizer, schedule, device)
    ddp = DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    weights = class_weights(config.class_counts, training.balance).to(device)
    generator = torch.Generator(device=device).manual_seed(training.seed * 1000 + rank + done * world)
    kept = time.monotonic()
    for epoch in range(done, training.epochs):
        began = time.monotonic()
        loss = _epoch(ddp, batches, optimizer, schedule, weights, config, device, layout, generator, first=epoch == done)
        numbers = _validate(module, agreed, device, layout)
        if rank == agreed.writer:
            numbers |= {"train_loss": loss, "learning_rate": schedule.get_last_lr()[0], "epoch_s": time.monotonic() - began}
            _append(folder / "history.jsonl", {"step": epoch + 1, "time": time.time(), "metrics": numbers})
            if time.monotonic() - kept > CHECKPOINT_S:
                kept = time.monotonic()
                _checkpoint(folder, module, optimizer, schedule, epoch + 1)
    _same(module)
    if rank == agreed.writer:
        _write(folder / "model.pt", saved(config, module))


def _batches(config: Config, shards: loading.Shards, batch: int, device: torch.device, *, shuffle: bool) -> Any:
    return loading.training_batches(
        config.dataset, shards, batch_size=batch, rank=dist.get_rank(), world=dist.get_world_size(), shuffle=shuffle,
        seed=config.training.seed, device_id=device.index if device.type == "cuda" else None,
    )  # fmt: skip


def _epoch(
    ddp: torch.nn.Module, batches: Any, optimizer: Any, schedule: Any, weights: torch.Tensor, config: Config,
    device: torch.device, layout: torch.memory_format, generator: torch.Generator, *, first: bool,
) -> float:  # fmt: skip
    """One pass over this rank's share; mean loss of all ranks. The ``first`` pass says when its first step was done."""
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
        if first:
            first = False
            _say(f"first step at {time.time():.3f}, epoch {schedule.last_epoch // len(batches) + 1}")
        total += torch.stack([loss.detach().float() * len(labels), torch.tensor(float(len(labels)), device=device)])
    dist.all_reduce(total)
    return float(total[0] / total[1])


@torch.no_grad()
def _validate(module: torch.nn.Module, agreed: Agreed, device: torch.device, layout: torch.memory_format) -> dict[str, float]:
    """Metrics of the whole validation split on the rank that writes; an empty dictionary on the others."""
    module.eval()
    mine = []
    for (part,) in _batches(agreed.config, agreed.handout.validation, 256, device, shuffle=False):
        logits = module(part["inputs"].to(device=device, memory_format=layout)).float()
        mine.append((torch.softmax(logits, 1).cpu().numpy(), part["labels"][:, 0].cpu().numpy()))
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == agreed.writer else None
    dist.gather_object(mine, gathered, dst=agreed.writer)
    if gathered is None:
        return {}
    pairs = [pair for share in gathered for pair in share]
    probabilities, labels = (np.concatenate(column) for column in zip(*pairs, strict=True))
    numbers = evaluation.measure(probabilities, labels, agreed.config.metric)
    return {f"validation_{name}": value for name, value in numbers.items()}


def class_weights(counts: list[int], balance: float) -> torch.Tensor:
    """Weights of the classes in the loss, float32 [classes], mean 1 over samples: count ** -balance."""
    raw = torch.tensor([max(c, 1) for c in counts], dtype=torch.float64) ** -balance
    share = torch.tensor(counts, dtype=torch.float64) / max(sum(counts), 1)
    return (raw / (raw * share).sum()).float()


def _same(module: torch.nn.Module) -> None:
    """Say the digest of the parameters, which must be every rank's: a rank that lost step with the others made no model."""
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    _say(f"parameters {digest.hexdigest()[:16]}")
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest.hexdigest())
    if len(set(digests)) > 1:
        raise RuntimeError(f"ranks ended with different parameters: {[d[:16] for d in digests]}")


def _say(text: str) -> None:
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {text}", file=sys.stderr, flush=True)


def _checkpoint(folder: Path, module: torch.nn.Module, optimizer: Any, schedule: Any, epoch: int) -> None:
    state = {"epoch": epoch, "module": module.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    _write(checkpoint_path(folder, epoch), state)


def _resume(checkpoint: bytes, module: torch.nn.Module, optimizer: Any, schedule: Any, device: torch.device) -> int:
    """Load the checkpoint when there is one; number of epochs that are done."""
    if not checkpoint:
        return 0
    state = torch.load(io.BytesIO(checkpoint), map_location=device, weights_only=True)
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
    record(main)(sys.argv[1])  # an error goes into a file that torchrun names, too
