"""Tables: JSON rows to checked features, in Polars. The same code serves training and the clients of served models."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from forja.recipes.base import Column, Table

if TYPE_CHECKING:
    import polars as pl


def engine() -> Literal["gpu", "streaming"]:
    """Polars' engine here: RAPIDS where a driver and cudf-polars are, else the CPU's."""
    gpu = Path("/proc/driver/nvidia/version").exists() and importlib.util.find_spec("cudf_polars") is not None
    return "gpu" if gpu else "streaming"


def parse(payloads: Sequence[bytes], table: Table) -> pl.DataFrame:
    """JSON objects to the declared columns; what is missing or of another type becomes null."""
    import polars as pl

    schema = {c.name: pl.String if c.values else pl.Float64 for c in table.columns}
    # A line break inside a JSON object is white space: one line for each row is what the reader wants.
    lines = b"\n".join(p.replace(b"\n", b" ").replace(b"\r", b" ") for p in payloads)
    return pl.read_ndjson(lines, schema=schema, ignore_errors=True)


def features(frame: pl.DataFrame, table: Table) -> pl.DataFrame:
    """Checked rows: one float32 column for each of ``table.features``, and ``problem``, null for a good row."""
    import polars as pl

    exprs = []
    for column in table.columns:
        if column.values:
            exprs += [(pl.col(column.name) == value).cast(pl.Float32).alias(f"{column.name}={value}") for value in column.values]
        else:
            exprs.append(pl.col(column.name).cast(pl.Float32))
    exprs += [pl.sql_expr(d.sql).cast(pl.Float32).alias(d.name) for d in table.derived]
    problem = pl.coalesce([_problem(c) for c in table.columns] + [_infinite(d.name, d.sql) for d in table.derived])
    return frame.lazy().select(*exprs, problem=problem).collect(engine=engine())


def _problem(column: Column) -> pl.Expr:
    import polars as pl

    value = pl.col(column.name)
    if column.values:
        wrong, why = ~value.is_in(list(column.values)), f"{column.name}: not one of {', '.join(column.values)}"
    else:
        wrong, why = ~value.is_between(column.low, column.high), f"{column.name}: not from {column.low} to {column.high}"
    missing = f"{column.name}: missing or of another type"
    return pl.when(value.is_null()).then(pl.lit(missing)).when(wrong).then(pl.lit(why))


def _infinite(name: str, sql: str) -> pl.Expr:
    import polars as pl

    return pl.when(~pl.sql_expr(sql).cast(pl.Float32).is_finite().fill_null(False)).then(pl.lit(f"{name}: no finite number"))
