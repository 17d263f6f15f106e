"""What a recipe is made of: frozen, keyword-only dataclasses that refuse bad values.

Only the standard library may be imported here: DAG files read recipes while Airflow parses them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from forja.checks import Checked, check
from forja.datasets import Column as Column
from forja.datasets import Derived as Derived
from forja.datasets import Images as Images
from forja.datasets import Split as Split
from forja.datasets import Table as Table
from forja.edge.targets import TARGETS

STAGES = ("ingest", "transform", "train", "register", "optimize", "gate", "release", "export", "score")
CHAIN = STAGES[:7]
"""Those of a recipe's DAGs; a recipe whose users need no endpoint, or have devices, adds the others to its DAG file."""
VARIANTS = ("fp32", "fp16", "bf16", "int8", "mixed")
"""Precisions: of the whole model, or for ``mixed`` int8 with the layers that suffer from it in float16."""
NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


QUALITY = ("accuracy", "average_precision", "agreement", "class_recall", "calibration_error", "nonfinite")
"""Numbers measured on answers: ``agreement`` is the share that is fp32's too, ``class_recall`` that of the worst class,
``calibration_error`` the expected calibration error (15 bins), ``nonfinite`` how many probabilities are NaN or infinite."""
SPEED = ("p50_ms", "p99_ms", "throughput", "engine_mb", "memory_mb")
"""Numbers measured on the recipe's target: latency of one request, samples per second in full batches, size of the engine,
memory of two releases side by side."""
METRICS = QUALITY + SPEED
"""Numbers of a variant that a gate may judge."""
CAPABILITIES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
"""GPU generations that TensorRT-RTX builds for on a host without a GPU."""
CRON = re.compile(r"@(hourly|daily|weekly|monthly)|(\S+ ){4}\S+")


@dataclass(frozen=True, kw_only=True)
class SklearnDigits(Checked):
    """Samples: scikit-learn's 1,797 handwritten digits, 8x8 grey levels, as PNG images; needs no download."""


@dataclass(frozen=True, kw_only=True)
class CsvSamples(Checked):
    """Samples: the rows of a CSV file, as JSON objects."""

    key: str
    """Column that identifies a row."""
    label: str
    """Column that holds the label; it travels in the header, never in the payload."""


@dataclass(frozen=True, kw_only=True)
class ClassFolders(Checked):
    """Samples: images in folders named by their class, or a zip of them; a sample's key is its path."""


@dataclass(frozen=True, kw_only=True)
class Source(Checked):
    """Where the events of a recipe come from."""

    topic: str
    """Kafka topic, one record a sample: key = sample id, value = PNG or JPEG bytes, or a JSON object."""
    payload: Literal["image", "json"]
    """What a record's value holds."""
    samples: SklearnDigits | CsvSamples | ClassFolders
    """What ``forja produce`` sends."""
    partitions: int = 4
    """Partitions of the topic when Forja creates it."""
    label_header: str = "label"
    """Record header that holds the label as UTF-8 text."""
    max_records: int = 100_000
    """Records that one ingest reads at most."""
    lost_offsets: Literal["refuse", "accept"] = "refuse"
    """What ingest does when Kafka has already deleted records that it had not read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(re.fullmatch(r"(?!\.{1,2}$)[a-zA-Z0-9._-]{1,200}", self.topic)), self, "topic", self.topic, "letters, digits, . _ -")
        check(self.payload in ("image", "json"), self, "payload", self.payload, "image or json")
        check(1 <= self.partitions <= 1000, self, "partitions", self.partitions, "1 to 1000")
        check(self.max_records >= 1, self, "max_records", self.max_records, "1 or more")
        check(self.lost_offsets in ("refuse", "accept"), self, "lost_offsets", self.lost_offsets, "refuse or accept")


@dataclass(frozen=True, kw_only=True)
class Cnn(Checked):
    """A small residual convolutional network for images."""

    width: int = 32
    """Channels of the first block; each further block doubles them."""
    blocks: int = 2
    """Residual blocks; each but the first halves height and width."""
    dropout: float = 0.1
    """Share of features dropped before the last layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.width <= 2048, self, "width", self.width, "1 to 2048")
        check(1 <= self.blocks <= 8, self, "blocks", self.blocks, "1 to 8")
        check(0 <= self.dropout < 1, self, "dropout", self.dropout, "0 or more, below 1")


@dataclass(frozen=True, kw_only=True)
class Mlp(Checked):
    """A multilayer perceptron for tables."""

    hidden: tuple[int, ...] = (64, 64)
    """Units of each hidden layer."""
    dropout: float = 0.0
    """Share of units dropped after each hidden layer."""
    bins: int = 0
    """Leaves of the decision tree that sets the bins of the piecewise linear encoding; 0 for no encoding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.hidden) and min(self.hidden) >= 1, self, "hidden", self.hidden, "one or more layers of 1 or more")
        check(0 <= self.dropout < 1, self, "dropout", self.dropout, "0 or more, below 1")
        check(0 <= self.bins <= 256, self, "bins", self.bins, "0 to 256")


@dataclass(frozen=True, kw_only=True)
class Training(Checked):
    """How a model is trained."""

    epochs: int
    batch_size: int
    """Samples in one optimiser step, over all ranks together."""
    learning_rate: float
    """Peak of the one-cycle schedule of AdamW."""
    weight_decay: float = 1e-4
    ranks: int = 2
    """Processes of torchrun on one machine; on GPUs, one for each GPU."""
    seed: int = 0
    shift: int = 0
    """Augmentation of images: random shift of up to this many pixels."""
    rotate: float = 0.0
    """Augmentation of images: random rotation of up to this many degrees."""
    flip: bool = False
    """Augmentation of images: every second one is mirrored left to right."""
    balance: float = 0.0
    """Weight of rare classes in the loss: 0 counts every sample once, 1 gives every class the same sum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.epochs <= 10_000, self, "epochs", self.epochs, "1 to 10000")
        check(1 <= self.ranks <= 64, self, "ranks", self.ranks, "1 to 64")
        check(
            self.batch_size >= self.ranks and self.batch_size % self.ranks == 0,
            self, "batch_size", self.batch_size, f"a multiple of ranks ({self.ranks})",
        )  # fmt: skip
        check(0 < self.learning_rate <= 10, self, "learning_rate", self.learning_rate, "above 0, up to 10")
        check(0 <= self.weight_decay < 1, self, "weight_decay", self.weight_decay, "0 or more, below 1")
        check(self.shift >= 0, self, "shift", self.shift, "0 or more pixels")
        check(0 <= self.rotate <= 180, self, "rotate", self.rotate, "0 to 180 degrees")
        check(0 <= self.balance <= 1, self, "balance", self.balance, "0 to 1")


@dataclass(frozen=True, kw_only=True)
class Optimize(Checked):
    """Which variants of the model are made, and how."""

    variants: tuple[str, ...] = ("fp32", "fp16", "int8")
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax"
    """What sets the range of an activation in int8: all values, the range that loses least information, or a percentile."""
    percentile: float = 99.99
    """Percentage of an activation's values that ``percentile`` keeps in its range."""
    calibration_samples: int = 512
    """Training samples that calibrate int8, balanced over classes as far as the data allow."""
    search_tries: int = 4
    """Graphs that ``mixed`` tries at most, each with twice as many layers in float16 as the one before."""
    target: Literal["gpu", "cpu"] = "gpu"
    """Hardware whose latency counts: a GPU, or ONNX Runtime on the CPU."""
    compute_capability: str = "SM86"
    """GPU generation that TensorRT-RTX builds for ahead of time."""
    max_batch: int = 32
    """Largest batch of the engine's optimisation profile and of Triton's dynamic batcher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(set(self.variants)) == len(self.variants), self, "variants", self.variants, "each variant once")
        check(self.compute_capability in CAPABILITIES, self, "compute_capability", self.compute_capability, ", ".join(CAPABILITIES))
        check(
            bool(self.variants) and set(self.variants) <= set(VARIANTS) and self.variants[0] == "fp32",
            self, "variants", self.variants, f"fp32 first, then any of {', '.join(VARIANTS[1:])}",
        )  # fmt: skip
        methods = ("minmax", "entropy", "percentile")
        check(self.calibration in methods, self, "calibration", self.calibration, ", ".join(methods))
        check(50 < self.percentile <= 100, self, "percentile", self.percentile, "above 50, up to 100")
        check(self.calibration_samples >= 1, self, "calibration_samples", self.calibration_samples, "1 or more")
        check(1 <= self.search_tries <= 16, self, "search_tries", self.search_tries, "1 to 16")
        check(self.target in ("gpu", "cpu"), self, "target", self.target, "gpu or cpu")
        check(1 <= self.max_batch <= 1024, self, "max_batch", self.max_batch, "1 to 1024")


@dataclass(frozen=True, kw_only=True)
class Gate(Checked):
    """One rule over measured numbers of a variant; a missing number fails it."""

    metric: str
    """Name of the number: one of METRICS."""
    least: float | None = None
    """Smallest value that passes."""
    most: float | None = None
    """Largest value that passes."""
    max_drop: float | None = None
    """Largest loss against the fp32 variant that passes; for ``class_recall`` the loss of the class that loses most."""
    confident: bool = False
    """With ``max_drop``: the upper end of the loss's 95 % interval counts instead of the loss itself."""
    unmeasured: Literal["fail", "pass"] = "fail"
    """What a speed does that no hardware of the target has measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.metric in METRICS, self, "metric", self.metric, ", ".join(METRICS))
        check(self.max_drop is None or self.max_drop >= 0, self, "max_drop", self.max_drop, "0 or more")
        limits = [self.least, self.most, self.max_drop]
        check(sum(x is not None for x in limits) == 1, self, "least", limits, "exactly one of least, most and max_drop")
        paired = ("accuracy", "average_precision", "class_recall")
        check(self.max_drop is None or self.metric in paired, self, "max_drop", self.metric, f"for {', '.join(paired)}")
        check(not self.confident or self.max_drop is not None, self, "confident", self.confident, "with max_drop alone")
        check(self.unmeasured in ("fail", "pass"), self, "unmeasured", self.unmeasured, "fail or pass")
        check(self.unmeasured == "fail" or self.metric in SPEED, self, "unmeasured", self.metric, f"pass only for {', '.join(SPEED)}")


@dataclass(frozen=True, kw_only=True)
class Serving(Checked):
    """How Triton queues and batches requests; ``./forja tune`` finds these numbers for a machine, a site file may set others."""

    instances: int = 2
    """Copies of the model that answer at the same time. With one, Triton's dynamic batcher sometimes sleeps for 500 ms: a request that
    comes right after the answer to the last one finds the only copy still busy, and nothing wakes the batcher then (seen in 2.51)."""
    delay_us: int = 0
    """Microseconds that a request may wait for others to fill a batch."""
    queue: int = 256
    """Requests that may wait; one more is refused with 503, since a queue without end is latency without end."""
    timeout_ms: int = 10_000
    """Milliseconds that a request may wait; then it is refused."""
    p99_ms: float = 100.0
    """Largest 99th percentile of a request's latency that tune accepts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.instances <= 64, self, "instances", self.instances, "1 to 64")
        check(0 <= self.delay_us <= 1_000_000, self, "delay_us", self.delay_us, "0 to 1000000 microseconds")
        check(1 <= self.queue <= 100_000, self, "queue", self.queue, "1 to 100000 requests")
        check(1 <= self.timeout_ms <= 600_000, self, "timeout_ms", self.timeout_ms, "1 to 600000 milliseconds")
        check(0 < self.p99_ms <= 60_000, self, "p99_ms", self.p99_ms, "above 0, up to 60000 milliseconds")


@dataclass(frozen=True, kw_only=True)
class Rollout(Checked):
    """How a release goes live."""

    golden_samples: int = 16
    """Validation samples whose answers the new release must repeat before traffic moves."""
    tolerance: float = 1e-3
    """Largest difference of a probability from its golden answer."""
    untimed: Literal["fp32", "fp16", "int8", "mixed"] = "fp32"
    """Variant that goes live when no hardware has measured the variants' speed; bf16 can't, since no CPU serves it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.golden_samples >= 1, self, "golden_samples", self.golden_samples, "1 or more")
        check(0 < self.tolerance < 1, self, "tolerance", self.tolerance, "above 0, below 1")
        known = tuple(v for v in VARIANTS if v != "bf16")
        check(self.untimed in known, self, "untimed", self.untimed, ", ".join(known))


@dataclass(frozen=True, kw_only=True)
class Triggers(Checked):
    """When the pipeline runs by itself."""

    schedule: str | None = None
    """Cron expression in UTC, beside new data; None for new data only."""
    min_new_rows: int = 1
    """New rows since the last admitted run below which new data start nothing."""
    cooldown_s: int = 300
    """Seconds since the last admitted run before which new data start nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cron = self.schedule is None or bool(CRON.fullmatch(self.schedule))
        check(cron, self, "schedule", self.schedule, "five fields of cron, or @hourly, @daily, @weekly, @monthly")
        check(self.min_new_rows >= 1, self, "min_new_rows", self.min_new_rows, "1 or more")
        check(self.cooldown_s >= 0, self, "cooldown_s", self.cooldown_s, "0 or more seconds")


@dataclass(frozen=True, kw_only=True)
class Profiles(Checked):
    """Name of the profile that each stage runs in; a site file says what the name means there."""

    ingest: str = "light"
    transform: str = "etl"
    train: str = "training"
    register: str = "model"
    optimize: str = "model"
    gate: str = "light"
    release: str = "release"
    export: str = "model"
    score: str = "model"


@dataclass(frozen=True, kw_only=True)
class Recipe(Checked):
    """Everything about one model's path, from events to a served release."""

    name: str
    team: str
    """First part of every path in the lake."""
    owner: str
    """Who is asked when a run fails."""
    description: str
    """One sentence for people."""
    source: Source
    dataset: Images | Table
    model: Cnn | Mlp
    training: Training
    metric: Literal["accuracy", "average_precision"] = "accuracy"
    """The number that people quote for this model."""
    optimize: Optimize = Optimize()
    gates: tuple[Gate, ...]
    serving: Serving = Serving()
    rollout: Rollout = Rollout()
    edge: tuple[str, ...] = ()
    """Names of the devices in forja.edge.targets that get a bundle."""
    triggers: Triggers = Triggers()
    profiles: Profiles = field(default_factory=Profiles)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(NAME.fullmatch(self.name)), self, "name", self.name, "a-z, then a-z, 0-9, _; 32 characters at most")
        check(bool(NAME.fullmatch(self.team)), self, "team", self.team, "a-z, then a-z, 0-9, _; 32 characters at most")
        check(bool(self.owner), self, "owner", self.owner, "a person or a group")
        check(bool(self.gates), self, "gates", self.gates, "one rule or more")
        check(self.metric in ("accuracy", "average_precision"), self, "metric", self.metric, "accuracy or average_precision")
        check(set(self.edge) <= set(TARGETS), self, "edge", self.edge, f"any of {', '.join(TARGETS)}")
        images = isinstance(self.dataset, Images)
        check(
            images == (self.source.payload == "image"),
            self,
            "dataset",
            type(self.dataset).__name__,
            "Images for image payloads, Table for json",
        )
        check(images == isinstance(self.model, Cnn), self, "model", type(self.model).__name__, "Cnn for Images, Mlp for Table")
        if self.metric == "average_precision":
            check(len(self.dataset.classes) == 2, self, "metric", self.metric, "average_precision needs two classes")
        check(
            self.rollout.untimed in self.optimize.variants,
            self, "rollout.untimed", self.rollout.untimed, f"one of optimize.variants {self.optimize.variants}",
        )  # fmt: skip
