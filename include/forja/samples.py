"""What ``forja produce`` sends: the samples of a recipe, as a producer in a plant would have them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from forja.errors import BadInput
from forja.events import Sample
from forja.recipes.base import CsvSamples, Recipe, SklearnDigits, Table


def samples(recipe: Recipe, data: Path | None) -> Iterator[Sample]:
    """Labelled samples of a recipe, in a fixed order.

    Args:
        data: file with the samples, for recipes that need one.

    Raises:
        BadInput: a file is needed and none is given, it doesn't exist, or it lacks a column.
    """
    kind = recipe.source.samples
    if isinstance(kind, SklearnDigits):
        if data is not None:
            raise BadInput(f"data of recipe {recipe.name}", value=str(data), allowed="none: scikit-learn brings them")
        return _digits()
    if data is None:
        raise BadInput(f"data of recipe {recipe.name}", allowed="the path of a CSV file", do="pass --data PATH (make run: DATA=PATH)")
    if not data.is_file():
        raise BadInput(f"data of recipe {recipe.name}", value=str(data), allowed="a CSV file that exists")
    return _csv(recipe, kind, data)


def _digits() -> Iterator[Sample]:
    """scikit-learn's digits: 1,797 images of 8x8 grey levels 0 to 16, here 0 to 240, as PNG."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray((image * 15).astype("uint8"), mode="L").save(buffer, format="PNG")
        yield Sample(key=f"digit-{number:04d}", label=str(label), payload=buffer.getvalue())


def _csv(recipe: Recipe, kind: CsvSamples, path: Path) -> Iterator[Sample]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        wanted = [kind.key, kind.label]
        if isinstance(recipe.dataset, Table):
            wanted += [c.name for c in recipe.dataset.columns]
        missing = [name for name in wanted if name not in (reader.fieldnames or [])]
        if missing:
            raise BadInput(f"columns of {path}", value=reader.fieldnames, allowed=f"all of {wanted}", do=f"add {missing}")
        for row in reader:
            payload = {k: number(v) for k, v in row.items() if k not in (kind.key, kind.label)}
            yield Sample(key=row[kind.key], label=row[kind.label], payload=json.dumps(payload, ensure_ascii=False).encode())


def number(text: str) -> float | int | str:
    """A CSV cell as the number that it is, else as text."""
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            continue
    return text
