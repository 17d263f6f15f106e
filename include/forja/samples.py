"""What ``forja produce`` sends: the samples of a recipe, as a producer in a plant would have them."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from forja.errors import BadInput
from forja.events import Sample
from forja.recipes.base import ClassFolders, CsvSamples, Recipe, SklearnDigits, Table

if TYPE_CHECKING:
    from _csv import Reader

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def samples(recipe: Recipe, data: Path | None) -> Iterator[Sample]:
    """Labelled samples of a recipe, in a fixed order.

    Args:
        data: file with the samples, for recipes that need one.

    Raises:
        BadInput: a file is needed and none is given, it doesn't exist, or it lacks a column; later, with file and
            line number, a row that can't be read.
    """
    kind = recipe.source.samples
    if isinstance(kind, SklearnDigits):
        if data is not None:
            raise BadInput(f"data of recipe {recipe.name}", value=str(data), allowed="none: scikit-learn brings them")
        return _digits()
    what = "a folder or zip of class folders of images" if isinstance(kind, ClassFolders) else "a CSV file"
    if data is None:
        raise BadInput(f"data of recipe {recipe.name}", allowed=f"the path of {what}", do="pass --data PATH (make run: DATA=PATH)")
    if not data.exists() or (data.is_dir() and isinstance(kind, CsvSamples)):
        raise BadInput(f"data of recipe {recipe.name}", value=str(data), allowed=f"{what} that exists")
    return _class_folders(recipe, data) if isinstance(kind, ClassFolders) else _csv(recipe, kind, data)


def _digits() -> Iterator[Sample]:
    """scikit-learn's digits: 1,797 images of 8x8 grey levels 0 to 16, here 0 to 240, as PNG."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray((image * 15).astype("uint8"), mode="L").save(buffer, format="PNG")
        yield Sample(key=f"digit-{number:04d}", label=str(label), payload=buffer.getvalue())


def _class_folders(recipe: Recipe, path: Path) -> Iterator[Sample]:
    classes = recipe.dataset.classes

    def found() -> Iterator[Sample]:
        for name, payload in images(path):
            yield Sample(key=name, label=Path(name).parent.name, payload=payload)

    # Before anything is created for it: a zip of something else, or one folder too high or too low.
    folders = {Path(name).parent.name for name in image_names(path)}
    if not folders & set(classes):
        raise BadInput(f"folders of {path}", value=sorted(folders)[:10], allowed=f"images in folders named {', '.join(classes)}")
    return found()


def image_names(path: Path) -> list[str]:
    """Names of the images in a folder or a zip, relative to it, sorted; BadInput when it can't be read."""
    try:
        if path.is_dir():
            names = [str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()]
        else:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise unreadable(path, error) from error
    return sorted(n for n in names if Path(n).suffix.lower() in IMAGE_SUFFIXES)


def images(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each image of a folder or a zip, by its name relative to it, in the order of the names; BadInput for one that can't be read."""
    names = image_names(path)
    try:
        if path.is_dir():
            for name in names:
                yield name, (path / name).read_bytes()
        else:
            with zipfile.ZipFile(path) as archive:
                for name in names:
                    yield name, archive.read(name)
    except Exception as error:  # a broken or encrypted archive raises errors of six kinds
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> BadInput:
    """The error for a file that is there and can't be read."""
    return BadInput(f"file {path} can't be read", value=f"{type(error).__name__}: {error}", allowed="a whole file that may be read")


def _csv(recipe: Recipe, kind: CsvSamples, path: Path) -> Iterator[Sample]:
    categories = [c.name for c in recipe.dataset.columns if c.values] if isinstance(recipe.dataset, Table) else []
    columns = [c.name for c in recipe.dataset.columns] if isinstance(recipe.dataset, Table) else []

    def found() -> Iterator[Sample]:
        for line, row in rows(path, [kind.key, kind.label, *columns]):
            if not row[kind.key].strip():
                raise BadInput(f"{path}, line {line}: column {kind.key}", value=row[kind.key], allowed="a key")
            payload = cells({k: v for k, v in row.items() if k not in (kind.key, kind.label)}, categories)
            yield Sample(key=row[kind.key], label=row[kind.label], payload=json.dumps(payload, ensure_ascii=False).encode())

    header(path, [kind.key, kind.label, *columns])  # before anything is created for it
    return found()


def header(path: Path, wanted: Sequence[str]) -> list[str]:
    """Columns of a CSV file; BadInput unless it has each of ``wanted`` once."""
    with _open(path) as file:
        return _header(path, csv.reader(_lines(path, file), strict=True), wanted)


def rows(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV file in UTF-8 with commas, each with the number of its last line.

    Raises:
        BadInput: the file can't be opened, lacks a column of ``wanted`` or has it twice; or, with the line number, bytes
            that are no UTF-8, broken quotes, a field over 128 KiB, or a row that is longer or shorter than the header.
    """
    with _open(path) as file:
        reader = csv.reader(_lines(path, file), strict=True)
        names = _header(path, reader, wanted)
        while (row := _next(path, reader)) is not None:
            if row and len(row) != len(names):
                raise BadInput(f"{path}, line {reader.line_num}", value=f"{len(row)} fields", allowed=f"{len(names)}, as in the header")
            if row:
                yield reader.line_num, dict(zip(names, row, strict=True))


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise BadInput(f"file {path}", value=str(error), allowed="a CSV file that can be read") from error


def _lines(path: Path, file: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}, line {number}", value=line[error.start : error.end], allowed="UTF-8", do="save it as UTF-8") from error


def _header(path: Path, reader: Reader, wanted: Sequence[str]) -> list[str]:
    names = _next(path, reader) or []
    wrong = [name for name in dict.fromkeys(wanted) if names.count(name) != 1]
    if wrong:
        raise BadInput(f"columns of {path}", value=names, allowed=f"all of {list(wanted)}, each once", do=f"correct {wrong}")
    return names


def _next(path: Path, reader: Reader) -> list[str] | None:
    try:
        return next(reader, None)
    except (csv.Error, OSError) as error:
        raise BadInput(f"{path}, line {reader.line_num}", value=str(error), allowed="CSV with commas, fields of 128 KiB at most") from error


def cells(row: dict[str, str], categories: Sequence[str]) -> dict[str, float | int | str]:
    """Cells as JSON values: numbers where they are numbers, but always text in ``categories``."""
    return {name: text if name in categories else number(text) for name, text in row.items()}


def number(text: str) -> float | int | str:
    """A CSV cell as the finite number that it is, else as text."""
    if not re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", text, re.ASCII) or not math.isfinite(float(text)):
        return text
    return int(text) if re.fullmatch(r"\s*[+-]?\d+\s*", text, re.ASCII) else float(text)
