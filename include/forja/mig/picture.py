"""A layout to look at: an SVG for documents and pages, lines for a terminal. Both show the memory slices from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from forja.mig.planner import Layout

UNIT, HEIGHT, MARGIN, TOP = 84, 54, 16, 44
"""Pixels: width of the eighth of a GPU, height of a bar, space around it, space above the first bar."""

CELL = 9
"""Characters of one memory slice in a terminal, for up to eight slices."""

STYLE = """
  .ground { fill: #ffffff } .text { fill: #1b1f24 } .dim { fill: #59636e } .free { fill: none; stroke: #8c959f; stroke-dasharray: 4 4 }
  .s1 { fill: #d6e8d9; stroke: #3f7a4b } .s2 { fill: #d7e5f5; stroke: #3a6ea5 } .s4 { fill: #f6e3c5; stroke: #9a6a1b }
  .s8 { fill: #ead9f0; stroke: #7b4a8e }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #14181d } .text { fill: #e6edf3 } .dim { fill: #9aa4af } .free { stroke: #6e7781 }
    .s1 { fill: #1f3d27; stroke: #7cc08a } .s2 { fill: #1c3350; stroke: #7fb2e5 } .s4 { fill: #46351a; stroke: #e0b263 }
    .s8 { fill: #3a2545; stroke: #c79ad8 }
  }
  text { font: 14px system-ui, sans-serif } .small { font-size: 12px }
"""


WHOLE = ", whole"
"""End of the name of a GPU on which MIG is off."""

Bar = tuple[str, Layout]
"""A GPU's name and its layout."""


def grouped(layouts: Sequence[tuple[Layout, str]]) -> list[Bar]:
    """Bars of a node's GPUs, neighbours that are alike as one; each layout comes with a word about it, which may be empty."""
    bars, at = [], 0
    while at < len(layouts):
        last = at
        while last + 1 < len(layouts) and layouts[last + 1] == layouts[at]:
            last += 1
        layout, word = layouts[at]
        bars.append((f"GPU {at}{f' to {last}' if last > at else ''}{f', {word}' if word else ''}", layout))
        at = last + 1
    return bars


def svg(title: str, bars: Sequence[Bar]) -> str:
    """A picture of one GPU or of several: each bar has a name and a layout."""
    width = 2 * MARGIN + 8 * UNIT
    step = HEIGHT + 52
    height = TOP + step * len(bars)
    said = "; ".join(f"{name}: {', '.join(layout.pairs) or 'empty'}" for name, layout in bars)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        f"<title>{escape(title)}</title><desc>{escape(said)}</desc><style>{STYLE}</style>",
        f'<rect class="ground" width="{width}" height="{height}" rx="8"/>',
        f'<text class="text" x="{MARGIN}" y="26" font-weight="600">{escape(title)}</text>',
    ]
    for row, (name, layout) in enumerate(bars):
        parts += _bar(name, layout, TOP + row * step)
    return "\n".join([*parts, "</svg>", ""])


def _room(name: str, layout: Layout) -> str:
    if name.endswith(WHOLE):
        return "not cut"
    return f"{layout.free} of {layout.gpu.units} memory slices free" if layout.free else "all memory slices taken"


def _bar(name: str, layout: Layout, top: int) -> list[str]:
    gpu = layout.gpu
    unit = 8 * UNIT / gpu.units
    parts = [f'<text class="dim small" x="{MARGIN}" y="{top + 10}">{escape(f"{name}: {_room(name, layout)}")}</text>']
    for at in range(gpu.units):
        x = MARGIN + at * unit
        parts.append(f'<rect class="free" x="{x + 2:g}" y="{top + 18}" width="{unit - 4:g}" height="{HEIGHT}" rx="5"/>')
        parts.append(f'<text class="dim small" x="{x + unit / 2:g}" y="{top + HEIGHT + 34}" text-anchor="middle">{at}</text>')
    for instance in layout.instances:
        size = gpu.profiles[instance.profile].size
        x, wide = MARGIN + instance.start * unit, size * unit
        share = size * 8 // gpu.units
        colour = next(c for c in (8, 4, 2, 1) if share >= c)
        parts.append(f'<rect class="ground" x="{x + 1:g}" y="{top + 17}" width="{wide - 2:g}" height="{HEIGHT + 2}"/>')
        parts.append(
            f'<rect class="s{colour}" x="{x + 2:g}" y="{top + 18}" width="{wide - 4:g}" height="{HEIGHT}" rx="5" stroke-width="1.5"/>'
        )
        small = ' class="text small"' if len(instance.profile) * 9 > wide else ' class="text"'
        middle = top + 18 + HEIGHT / 2 + 5
        parts.append(f'<text{small} x="{x + wide / 2:g}" y="{middle:g}" text-anchor="middle">{escape(instance.profile)}</text>')
    return parts


def lines(layout: Layout) -> list[str]:
    """Three lines: the numbers of the slices, the instances over them, their profiles."""
    gpu = layout.gpu
    cell = max(CELL, *(len(i.profile) // gpu.profiles[i.profile].size + 2 for i in layout.instances)) if layout.instances else CELL
    cell = cell if gpu.units <= 8 else max(6, cell * 8 // gpu.units)
    numbers = "".join(str(at).center(cell) for at in range(gpu.units)).rstrip()
    bar, names, at = "", "", 0
    for instance in layout.instances:
        size = gpu.profiles[instance.profile].size
        bar += "·".center(cell) * (instance.start - at) + "├" + "─" * (size * cell - 2) + "┤"
        names += " " * cell * (instance.start - at) + instance.profile.center(size * cell)
        at = instance.start + size
    bar += "·".center(cell) * (gpu.units - at)
    return [numbers, bar.rstrip(), names.rstrip()]


def text(title: str, bars: Sequence[Bar]) -> list[str]:
    """Lines for a terminal or a log: each GPU, and what makes it so by hand."""
    told = [title]
    for name, layout in bars:
        told += ["", f"{name}: {_room(name, layout)}", *(f"  {line}" for line in lines(layout))]
        if layout.instances:
            told.append(f"  {layout.command}")
        if layout.gpu.inferred:
            told.append(f"  inferred for {layout.gpu.name}: {layout.gpu.inferred}")
    return told
