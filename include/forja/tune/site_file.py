"""The table of a site file that tune finds, and putting it there: only its own keys change, every other character stays."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from forja.errors import BadInput
from forja.services.folders import write
from forja.tune.choose import Candidate

HEADER = re.compile(r"\s*\[")
Fields = Mapping[str, int | float]


def fields(candidate: Candidate, most: int) -> dict[str, int | float]:
    """Fields of ``[serving.<recipe>]`` for a candidate.

    Args:
        most: largest batch that the recipe has anyway; another one is named.
    """
    serving = candidate.serving
    found: dict[str, int | float] = {"instances": serving.instances, "delay_us": serving.delay_us, "queue": serving.queue}
    return {**found, **({"max_batch": candidate.max_batch} if candidate.max_batch != most else {})}


def table(recipe: str, values: Fields) -> str:
    """The table as TOML."""
    return f"[serving.{recipe}]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())


def changed(text: str, recipe: str, values: Fields, optional: tuple[str, ...] = ("max_batch",)) -> str:
    """A site file's text with these values in ``[serving.<recipe>]``; comments and everything else stay.

    Args:
        optional: keys that are taken out where ``values`` doesn't have them.

    Raises:
        BadInput: the file says it in another form (an inline table, say), so that a person must change it.
    """
    lines = text.splitlines(keepends=True)
    start = next(
        (i for i, line in enumerate(lines) if re.match(rf"\s*\[\s*serving\s*\.\s*[\"']?{re.escape(recipe)}[\"']?\s*\]", line)), None
    )
    if start is None:
        gap = "" if not text or text.endswith("\n\n") else "\n" if text.endswith("\n") else "\n\n"
        new = f"{text}{gap}{table(recipe, values)}"
    else:
        end = next((i for i in range(start + 1, len(lines)) if HEADER.match(lines[i])), len(lines))
        new = "".join([*lines[:start], *_section(lines[start:end], values, optional), *lines[end:]])
    _verify(text, new, recipe, values, optional)
    return new


def _section(lines: list[str], values: Fields, optional: tuple[str, ...]) -> list[str]:
    """The lines of one table, its header first: values replaced where their keys stand, others behind the last key."""
    left, found, last = dict(values), [], 0
    for line in lines:
        match = re.match(r"(\s*)([A-Za-z_]\w*)(\s*=\s*)([^#\n]*?)(\s*(#[^\n]*)?)(\r?\n?)$", line)
        key = match[2] if match else ""
        if match and key in left:
            line = f"{match[1]}{key}{match[3]}{left.pop(key)}{match[5]}{match[7]}"
        elif key in optional and key not in values:
            continue
        found.append(line)
        if match or HEADER.match(line):
            last = len(found)
    if left and not found[last - 1].endswith("\n"):
        found[last - 1] += "\n"
    return [*found[:last], *(f"{key} = {value}\n" for key, value in left.items()), *found[last:]]


def _verify(old: str, new: str, recipe: str, values: Fields, optional: tuple[str, ...]) -> None:
    try:
        before, after = tomllib.loads(old), tomllib.loads(new)
    except tomllib.TOMLDecodeError:
        before, after = {}, {"": None}
    mine = dict(before.get("serving", {}).get(recipe, {}))
    wanted = {**{k: v for k, v in mine.items() if k not in optional}, **values}
    before.setdefault("serving", {})[recipe] = wanted
    if after != before:
        do = f"put it there by hand:\n{table(recipe, values)}"
        raise BadInput(
            f"site file: [serving.{recipe}]", value="in a form that can't be changed safely", allowed="a table of its own", do=do
        )


def put(path: Path, recipe: str, values: Fields) -> bool:
    """Change the site file; whether it was another one before. Its permissions stay."""
    old = path.read_text()
    new = changed(old, recipe, values)
    if new == old:
        return False
    mode = path.stat().st_mode
    write(path, new)
    path.chmod(mode)
    return True
