"""Tables: JSON rows to checked features, in Polars. The same code serves training and the clients of served models.

``json_value`` is the one reader of JSON from outside, for ingest, transform and the clients: what one of them accepts,
the others can use. Polars' own reader refuses a whole file for one bad line, and a deeply nested one has crashed it.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from forja.recipes.base import Column, Table

if TYPE_CHECKING:
    import polars as pl


def engine() -> Literal["gpu", "streaming"]:
    """Polars' engine here: RAPIDS where a driver and cudf-polars are, else the CPU's."""
    gpu = Path("/proc/driver/nvidia/version").exists() and importlib.util.find_spec("cudf_polars") is not None
    return "gpu" if gpu else "streaming"


def json_value(payload: bytes) -> tuple[Any, str | None]:
    """JSON (RFC 8259: UTF-8, finite numbers, no byte order mark) and None, or None and the problem; never raises.

    All numbers are floats.
    """
    try:
        return json.loads(payload.decode(), parse_float=_finite, parse_int=_finite, parse_constant=_finite), None
    except OverflowError:
        return None, "JSON, but a number is not finite"
    except RecursionError:
        return None, "JSON, but nested too deeply"
    except Exception:  # json names one reason, ValueError, and what a stranger sends may find others
        return None, "no JSON"


def json_object(payload: bytes) -> tuple[dict[str, Any], str | None]:
    """As ``json_value``, for an object; empty when there is a problem."""
    value, problem = json_value(payload)
    if isinstance(value, dict):
        return value, None
    return {}, problem or "JSON, but no object"


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise OverflowError(text[:20])
    return number


def parse(payloads: Sequence[bytes], table: Table) -> pl.DataFrame:
    """JSON objects to the declared columns, one row each; what is missing or of another type becomes null.

    Types are strict: a category is a string, a number is a number. Bytes that hold no JSON object give a row of nulls.
    """
    import polars as pl

    rows = [json_object(p)[0] for p in payloads]
    return pl.DataFrame({
        c.name: pl.Series([_cell(row.get(c.name), str if c.values else float) for row in rows], dtype=pl.String if c.values else pl.Float64)
        for c in table.columns
    })  # fmt: skip


def _cell(value: object, kind: type) -> object:
    if not isinstance(value, kind):
        return None
    # JSON can escape half a surrogate pair, which is no text for Polars.
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


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
