"""The page: HTML with its style and drawings inside, no script, nothing to load. All text is escaped by Jinja."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forja.report.facts import Curve, Facts

TEMPLATE = Path(__file__).parent / "files" / "report.html"
WIDTH, HEIGHT = 320.0, 120.0
"""Size of a curve's drawing area, in CSS pixels."""


def html(facts: Facts) -> bytes:
    """The page, UTF-8."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "share": share, "words": words}
    lines = [{"name": words(c.name), "path": path(c), "low": low(c), "high": high(c), "last": c.points[-1][1]} for c in facts.curves]
    longest = max((seconds for _, seconds in facts.stages), default=1.0) or 1.0
    most = [max(row, default=0) or 1 for row in facts.confusion]
    text = environment.from_string(TEMPLATE.read_text()).render(facts=facts, curves=lines, longest=longest, most=most)
    return text.encode()


def path(curve: Curve) -> str:
    """The curve as an SVG path in an area of WIDTH by HEIGHT."""
    bottom, top = low(curve), high(curve)
    steps = [step for step, _ in curve.points]
    wide = (max(steps) - min(steps)) or 1.0
    tall = (top - bottom) or 1.0
    places = [((step - min(steps)) / wide * WIDTH, HEIGHT - (value - bottom) / tall * HEIGHT) for step, value in curve.points]
    return "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def low(curve: Curve) -> float:
    """Its smallest value."""
    return min(value for _, value in curve.points)


def high(curve: Curve) -> float:
    """Its largest value."""
    return max(value for _, value in curve.points)


def words(name: str) -> str:
    """A name of code for people."""
    return name.replace("_", " ")


def share(part: float, whole: float) -> str:
    """A percentage for CSS."""
    return f"{100 * part / whole:.1f}%" if whole else "0%"


def number(value: Any) -> str:
    """A number as short as it can be told, ``not measured`` for None."""
    if value is None:
        return "not measured"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
