"""A client of the served models: ``python -m forja.client predict|evaluate ...`` in the ml environment.

It prepares inputs with the very code that prepares them for training, so answers differ from the evaluation's only where
the server does. ``./forja predict`` and ``./forja evaluate`` run it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from forja import evaluation, loading, recipes, samples, tables
from forja.errors import BadInput, ForjaError
from forja.recipes.base import CsvSamples, Images, Recipe, Table
from forja.serving.triton import Endpoint
from forja.settings import Settings
from forja.stages import transform

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Item:
    """One sample: where it comes from, its bytes, its label when it has one."""

    name: str
    payload: bytes
    label: str | None = None


def inputs(recipe: Recipe, items: Sequence[Item]) -> np.ndarray[Any, Any]:
    """What the model takes: float32 [N, *shape].

    Raises:
        BadInput: an image that doesn't decode, or a row out of schema or range; the message names it.
    """
    import numpy as np

    dataset, payloads = recipe.dataset, [i.payload for i in items]
    if isinstance(dataset, Images):
        images = list(loading.decode(payloads, dataset))
        for item, image in zip(items, images, strict=True):
            if image is None:
                raise BadInput(f"image {item.name} doesn't decode", allowed="a whole PNG or JPEG file")
        return np.stack([i for i in images if i is not None])
    frame = tables.features(tables.parse(payloads, dataset), dataset)
    for item, problem in zip(items, frame["problem"], strict=True):
        if problem is not None:
            raise BadInput(f"row {item.name}", value=problem, allowed="the columns of the recipe, in their ranges")
    return np.asarray(frame.select(dataset.features).to_numpy(), dtype="float32")


def read(recipe: Recipe, path: Path) -> list[Item]:
    """Samples of a file or folder: an image; a JSON object or a list of them; a CSV; a folder or zip of class folders of images.

    Raises:
        BadInput: no such path, or nothing in it that the recipe can use.
    """
    if not path.exists():
        raise BadInput(f"data for {recipe.name}", value=str(path), allowed="a path that exists")
    items = list(_images(path) if isinstance(recipe.dataset, Images) else _rows(recipe, recipe.dataset, path))
    if not items:
        raise BadInput(f"data for {recipe.name}", value=str(path), allowed="one sample or more")
    return items


def _images(path: Path) -> Iterator[Item]:
    if path.is_dir() or path.suffix.lower() == ".zip":
        for name, payload in samples.images(path):
            yield Item(name=f"{path}/{name}", payload=payload, label=Path(path.name, name).parent.name)
        return
    try:
        yield Item(name=str(path), payload=path.read_bytes(), label=path.parent.name)
    except OSError as error:
        raise samples.unreadable(path, error) from error


def _rows(recipe: Recipe, dataset: Table, path: Path) -> Iterator[Item]:
    if path.suffix.lower() == ".json":
        yield from _objects(path)
        return
    kind = recipe.source.samples
    label = kind.label if isinstance(kind, CsvSamples) else ""
    categories = [c.name for c in dataset.columns if c.values]
    for line, row in samples.rows(path, [c.name for c in dataset.columns]):
        payload = samples.cells({k: v for k, v in row.items() if k != label}, categories)
        yield Item(name=f"{path}:{line}", payload=json.dumps(payload).encode(), label=row.get(label))


def _objects(path: Path) -> Iterator[Item]:
    try:
        content, problem = tables.json_value(path.read_bytes())
    except OSError as error:
        raise samples.unreadable(path, error) from error
    if problem is not None:
        raise BadInput(f"file {path}", value=problem, allowed="a JSON object or a list of them")
    for number, row in enumerate(content if isinstance(content, list) else [content]):
        yield Item(name=f"{path}[{number}]", payload=json.dumps(row).encode())


def held_out(recipe: Recipe) -> list[Item]:
    """The recipe's own samples on the test side of the split, for recipes that need no file."""
    return [
        Item(name=s.key, payload=s.payload, label=s.label)
        for s in samples.samples(recipe, None)
        if transform.side(transform.position(s.key), recipe.dataset.split) == "test"
    ]


def predict(recipe: Recipe, endpoint: Endpoint, items: list[Item]) -> list[dict[str, Any]]:
    """Answers for some samples."""
    probabilities, version = endpoint.ask(inputs(recipe, items))
    classes = recipe.dataset.classes
    return [
        {"sample": item.name, "answer": classes[int(p.argmax())], "probability": round(float(p.max()), 4), "version": version}
        for item, p in zip(items, probabilities, strict=True)
    ]


def evaluate(recipe: Recipe, endpoint: Endpoint, items: list[Item]) -> dict[str, Any]:
    """Labelled samples, one request each, one after the other: metrics, and latency as the client sees it."""
    import numpy as np

    known = {label: i for i, label in enumerate(recipe.dataset.classes)}
    for item in items:
        if item.label not in known:
            raise BadInput(f"label of {item.name}", value=item.label, allowed=", ".join(known))
    batch = inputs(recipe, items)
    endpoint.ask(batch[:1])  # opens the connection
    answers, milliseconds, version = [], [], ""
    for i in range(len(items)):
        began = time.perf_counter()
        probabilities, version = endpoint.ask(batch[i : i + 1])
        milliseconds.append((time.perf_counter() - began) * 1e3)
        answers.append(probabilities)
    labels = np.array([known[str(i.label)] for i in items])
    numbers = evaluation.measure(np.concatenate(answers), labels, recipe.metric)
    p50, p99 = np.percentile(milliseconds, [50, 99])
    return {"n": len(items), **numbers, "p50_ms": round(float(p50), 3), "p99_ms": round(float(p99), 3), "version": version}


def main(argv: list[str] | None = None) -> int:
    """Print one JSON value; the exit status."""
    parser = argparse.ArgumentParser(prog="forja.client")
    parser.add_argument("verb", choices=["predict", "evaluate"])
    parser.add_argument("recipe")
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--limit", type=int, default=None, help="samples at most")
    arguments = parser.parse_args(argv)
    try:
        recipe = recipes.load(arguments.recipe)
        items = [item for path in arguments.paths for item in read(recipe, path)] or held_out(recipe)
        items = items[: arguments.limit]
        endpoint = Endpoint(urlsplit(Settings.from_env().endpoint).netloc, recipe.name, recipe.optimize.max_batch)
        answer: object
        answer = predict(recipe, endpoint, items) if arguments.verb == "predict" else evaluate(recipe, endpoint, items)
    except ForjaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
