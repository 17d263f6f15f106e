"""A client of the served models: ``python -m forja.client predict|evaluate ...`` in the ml environment.

It prepares inputs with the very code that prepares them for training, so answers differ from the evaluation's only where
the server does. ``./forja predict`` and ``./forja evaluate`` run it.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forja import evaluation, loading, recipes, samples, tables
from forja.errors import BadInput, ForjaError, Unavailable
from forja.recipes.base import CsvSamples, Images, Recipe, Table
from forja.settings import Settings
from forja.stages import transform

if TYPE_CHECKING:
    import numpy as np

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


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
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
            yield Item(name=str(file), payload=file.read_bytes(), label=file.parent.name)
    elif path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in sorted(n for n in archive.namelist() if Path(n).suffix.lower() in IMAGE_SUFFIXES):
                yield Item(name=name, payload=archive.read(name), label=Path(name).parent.name)
    else:
        yield Item(name=str(path), payload=path.read_bytes(), label=path.parent.name)


def _rows(recipe: Recipe, dataset: Table, path: Path) -> Iterator[Item]:
    if path.suffix.lower() == ".json":
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise BadInput(f"{path} is no JSON", value=str(error)) from error
        for number, row in enumerate(content if isinstance(content, list) else [content]):
            yield Item(name=f"{path}[{number}]", payload=json.dumps(row).encode())
        return
    kind = recipe.source.samples
    label = kind.label if isinstance(kind, CsvSamples) else ""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [c.name for c in dataset.columns if c.name not in (reader.fieldnames or [])]
        if missing:
            raise BadInput(f"columns of {path}", value=reader.fieldnames, do=f"add {missing}")
        for number, row in enumerate(reader, 2):
            payload = {k: samples.number(v) for k, v in row.items() if k != label}
            yield Item(name=f"{path}:{number}", payload=json.dumps(payload).encode(), label=row.get(label))


def held_out(recipe: Recipe) -> list[Item]:
    """The recipe's own samples on the test side of the split, for recipes that need no file."""
    return [
        Item(name=s.key, payload=s.payload, label=s.label)
        for s in samples.samples(recipe, None)
        if transform.side(transform.position(s.key), recipe.dataset.split) == "test"
    ]


class Endpoint:
    """The live model behind the router, over HTTP (KServe v2 protocol)."""

    def __init__(self, url: str, model: str, max_batch: int) -> None:
        from tritonclient import http

        self.url, self.model, self.max_batch, self._http = url, model, max_batch, http
        self._client = http.InferenceServerClient(url.removeprefix("http://"), connection_timeout=10, network_timeout=60)

    def ask(self, batch: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], str]:
        """Probabilities float32 [N, classes] for inputs float32 [N, *shape], and the version that answered last.

        Raises:
            Unavailable: nothing answers, or no release is live.
            BadInput: the server refuses the input.
        """
        import numpy as np

        answers = [self._ask(batch[i : i + self.max_batch]) for i in range(0, len(batch), self.max_batch)]
        return np.concatenate([probabilities for probabilities, _ in answers]), answers[-1][1]

    def _ask(self, batch: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], str]:
        from tritonclient.utils import InferenceServerException

        tensor = self._http.InferInput("input", list(batch.shape), "FP32")
        tensor.set_data_from_numpy(batch)
        try:
            answer = self._client.infer(self.model, [tensor])
        except InferenceServerException as error:
            if error.status() == "400":
                raise BadInput(
                    f"model {self.model} refuses the input", value=error.message(), allowed=f"float32 {list(batch.shape)}"
                ) from error
            raise self._away(error) from error
        except OSError as error:
            raise self._away(error) from error
        return answer.as_numpy("probabilities"), str(answer.get_response()["model_version"])

    def _away(self, error: Exception) -> Unavailable:
        do = f"./forja status; if there is no release yet, make run RECIPE={self.model}"
        return Unavailable(f"model {self.model} at {self.url} doesn't answer", value=str(error), do=do)


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
        endpoint = Endpoint(Settings.from_env().endpoint, recipe.name, recipe.optimize.max_batch)
        answer: object
        answer = predict(recipe, endpoint, items) if arguments.verb == "predict" else evaluate(recipe, endpoint, items)
    except ForjaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
