"""A receipt as an HTML page. All that comes from the receipt is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from urllib.parse import quote

from forja.receipts import Receipt

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f1d; --soft: #66706b; --line: #dfe5e1; --ground: #fbfcfb; --card: #fff; --accent: #1d6b4f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebe8; --soft: #93a09a; --line: #2c3531; --ground: #121614; --card: #191f1c; --accent: #6fc7a2; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 15px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h1 small { color: var(--soft); font-weight: 400; }
h2 { font-size: .8rem; letter-spacing: .06em; text-transform: uppercase; color: var(--soft); margin: 2rem 0 .5rem; }
p.when { color: var(--soft); margin: .25rem 0 0; }
p.no { border-left: 4px solid #c0392b; padding: .5rem .75rem; background: var(--card); }
section, pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .5rem 1rem; overflow-x: auto; }
pre, code, td.n { font: 13px/1.5 ui-monospace, monospace; } pre { margin: 0; padding: .75rem 1rem; }
table { border-collapse: collapse; width: 100%; }
td { padding: .3rem .75rem .3rem 0; vertical-align: top; border-top: 1px solid var(--line); }
tr:first-child td { border-top: 0; } td:first-child { color: var(--soft); white-space: nowrap; width: 14rem; }
td.n { font-variant-numeric: tabular-nums; }
a { color: var(--accent); } li { margin: .15rem 0; } ul { margin: .25rem 0; padding-left: 1.1rem; } code { overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); margin: 2rem 0 .5rem; }
"""


def page(receipt: Receipt) -> str:
    """The whole page; its links stay within /forja and are relative, so any prefix of Airflow's address works."""
    up = "../" * receipt.path.count("/")
    title = f"{receipt.stage} {receipt.variant}".strip()
    refused = receipt.facts.get("refused")
    inputs = [(name, _ref(item.ref, up)) for name, items in receipt.inputs.items() for item in items]
    outputs = [
        (name, f"<code>{escape(o.path)}</code><br>{o.bytes:,} bytes, sha256 {escape(o.sha256[:16])}…")
        for name, o in receipt.outputs.items()
    ]
    lines = "".join(f"<li>{escape(line)}</li>" for line in receipt.report)
    facts = [(name, f"<code>{escape(_plain(value))}</code>") for name, value in sorted(receipt.facts.items())]
    parts = [
        f"<h1>{escape(title)} <small>of {escape(receipt.recipe)}</small></h1>",
        f"<p class=when>{escape(receipt.finished)}, {receipt.seconds:.1f} s, key <code>{escape(receipt.key)}</code></p>",
        f"<p class=no><strong>Refused.</strong> {escape(str(refused))}</p>" if refused else "",
        _section("report", "Report", f"<ul>{lines}</ul>" if lines else ""),
        _section("metrics", "Metrics", _table((name, f"{value:.6g}") for name, value in sorted(receipt.metrics.items()))),
        _section("facts", "Facts", _table(facts)),
        _section("inputs", "Inputs", _table(inputs)),
        _section("outputs", "Outputs", _table(outputs)),
        _section("versions", "Versions", _table((name, escape(value)) for name, value in sorted(receipt.versions.items()))),
        f"<h2>Do it again</h2><pre>{escape(receipt.command)}</pre>",
        f"<details><summary>JSON</summary><p><a href='{up}../json/{quote(receipt.path)}'>the file</a></p>"
        f"<pre>{escape(receipt.to_json().decode())}</pre></details>",
    ]
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{escape(title)} of {escape(receipt.recipe)}"
    return f"<!doctype html><html lang=en><head>{head}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"


def _section(anchor: str, title: str, body: str) -> str:
    return f"<h2 id={anchor}>{title}</h2><section>{body}</section>" if body else ""


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """Rows of a name, escaped here, and a cell that is HTML already."""
    lines = [f"<tr><td>{escape(name)}</td><td class=n>{cell}</td></tr>" for name, cell in rows]
    return f"<table>{''.join(lines)}</table>" if lines else ""


def _ref(ref: str, up: str) -> str:
    """A receipt becomes a link to its own page; a table version has none."""
    return f"<a href='{up}{quote(ref)}'>{escape(ref)}</a>" if ref.endswith(".json") else f"<code>{escape(ref)}</code>"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
