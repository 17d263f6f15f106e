"""How a recipe declares its dataset: images or a table, and how they are split.

Only the standard library may be imported here: DAG files read recipes while Airflow parses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from forja.checks import Checked, check


@dataclass(frozen=True, kw_only=True)
class Split(Checked):
    """A deterministic split by the hash of a sample's key: a sample never changes sides when data grows."""

    validation: float = 0.1
    """Share of keys that choose between variants."""
    test: float = 0.2
    """Share of keys that are reported once."""
    rotate: float = 0.0
    """Turns the circle of hashes by this share: k / 5 with test = 0.2 gives fold k of five."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.validation < 1, self, "validation", self.validation, "above 0, below 1")
        check(0 < self.test < 1, self, "test", self.test, "above 0, below 1")
        check(self.validation + self.test <= 0.9, self, "test", self.test, "validation + test 0.9 or less: training needs the rest")
        check(0 <= self.rotate < 1, self, "rotate", self.rotate, "0 or more, below 1")


@dataclass(frozen=True, kw_only=True)
class Images(Checked):
    """A dataset of labelled images."""

    height: int
    """Rows of the model's input, in pixels; images of another size are resized."""
    width: int
    """Columns of the model's input, in pixels."""
    channels: Literal[1, 3]
    """1 for grey, 3 for RGB."""
    classes: tuple[str, ...]
    """Labels in the order of the model's outputs."""
    split: Split = Split()
    shard_samples: int = 4096
    """Samples in one training shard."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.height <= 4096, self, "height", self.height, "1 to 4096 pixels")
        check(1 <= self.width <= 4096, self, "width", self.width, "1 to 4096 pixels")
        check(self.channels in (1, 3), self, "channels", self.channels, "1 or 3")
        _check_classes(self, self.classes)
        check(self.shard_samples >= 1, self, "shard_samples", self.shard_samples, "1 or more")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one model input: (channels, height, width), float32 grey levels 0 to 255."""
        return (self.channels, self.height, self.width)


@dataclass(frozen=True, kw_only=True)
class Column(Checked):
    """One declared column of a table, a number or a category."""

    name: str
    low: float | None = None
    """Smallest number allowed, in the column's own unit."""
    high: float | None = None
    """Largest number allowed."""
    values: tuple[str, ...] = ()
    """Allowed categories; empty for a number. A category becomes one 0/1 feature for each value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.name), self, "name", self.name, "a column name")
        number = self.low is not None and self.high is not None
        check(number != bool(self.values), self, "values", self.values, "either low and high, or values")
        if self.low is not None and self.high is not None:
            check(self.low < self.high, self, "low", self.low, f"below high ({self.high})")


@dataclass(frozen=True, kw_only=True)
class Derived(Checked):
    """One feature computed from the declared columns."""

    name: str
    sql: str
    """Expression in Polars SQL over the declared columns, for example ``"torque" * "speed"``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.name), self, "name", self.name, "a name")
        check(bool(self.sql), self, "sql", self.sql, "an expression")


@dataclass(frozen=True, kw_only=True)
class Table(Checked):
    """A dataset of labelled rows."""

    columns: tuple[Column, ...]
    classes: tuple[str, ...]
    """Labels in the order of the model's outputs; for two classes the second is the positive one."""
    derived: tuple[Derived, ...] = ()
    split: Split = Split()
    shard_samples: int = 16_384
    """Samples in one training shard."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [c.name for c in self.columns] + [d.name for d in self.derived]
        check(bool(self.columns), self, "columns", self.columns, "one or more")
        check(len(set(names)) == len(names), self, "columns", names, "each name once")
        _check_classes(self, self.classes)
        check(self.shard_samples >= 1, self, "shard_samples", self.shard_samples, "1 or more")

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the model's inputs, in order: columns (categories as ``name=value``), then derived ones."""
        names: list[str] = []
        for column in self.columns:
            names += [f"{column.name}={v}" for v in column.values] or [column.name]
        return (*names, *(d.name for d in self.derived))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one model input: (features,), float32 in the columns' own units."""
        return (len(self.features),)


def _check_classes(owner: object, classes: tuple[str, ...]) -> None:
    check(len(classes) >= 2 and len(set(classes)) == len(classes), owner, "classes", classes, "two or more, each once")
