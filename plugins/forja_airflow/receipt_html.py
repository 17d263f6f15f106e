"""A receipt as an HTML page. All that comes from the receipt is escaped."""

from __future__ import annotations

import datetime
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
nav { margin-bottom: .75rem; }
h2 { font-size: .8rem; letter-spacing: .06em; text-transform: uppercase; color: var(--soft); margin: 2rem 0 .5rem; }
p.when { color: var(--soft); margin: .25rem 0 0; }
p.no { border-left: 4px solid #c0392b; padding: .5rem .75rem; background: var(--card); }
section, pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .5rem 1rem; overflow-x: auto; }
pre, code, td, th { font: 13px/1.6 ui-monospace, monospace; } pre { margin: 0; padding: .75rem 1rem; white-space: pre-wrap; }
table { border-collapse: collapse; } section > table { width: 100%; }
td, th { padding: .3rem 1.25rem .3rem 0; vertical-align: baseline; text-align: left; border-top: 1px solid var(--line); }
tr:first-child > * { border-top: 0; } th { color: var(--soft); font-weight: 400; }
section > table > * > tr > td:first-child { font: inherit; color: var(--soft); width: 14rem; }
td { font-variant-numeric: tabular-nums; } td table td, td table th { padding: 0 1.25rem 0 0; border: 0; }
a { color: var(--accent); } a, code, pre.wrap { overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); margin: 2rem 0 .5rem; }
@media (max-width: 40rem) {
  pre.lines { white-space: pre; }
  section > table > * > tr > td { display: block; width: auto; border: 0; padding: 0; }
  section > table > * > tr > td:first-child { padding-top: .5rem; }
}
"""


def page(receipt: Receipt, mlflow: str) -> str:
    """The whole page. Its links are relative, so any prefix of Airflow's address works; one leads to MLflow.

    Args:
        mlflow: address of MLflow's pages.
    """
    up = "../" * receipt.path.count("/")
    title = f"{receipt.stage} {receipt.variant}".strip()
    refused = receipt.facts.get("refused")
    inputs = [(name, _ref(item.ref, up)) for name, items in receipt.inputs.items() for item in items]
    outputs = [
        (name, f"{_shown(name, receipt, up)}<br>{o.bytes:,} bytes, sha256 {escape(o.sha256[:16])}…") for name, o in receipt.outputs.items()
    ]
    lines = escape("\n".join(receipt.report))
    facts = {name: _cell(value) for name, value in sorted(receipt.facts.items())}
    if run := receipt.facts.get("mlflow_run"):
        facts["mlflow_run"] = f"<a href='{escape(mlflow)}/#/runs/{quote(str(run))}'>{escape(str(run))}</a>"
    when = f"finished {_moment(receipt.finished)}, took {receipt.seconds:.1f} s"
    parts = [
        f"<nav><a href='{up}../../dags/{quote(receipt.recipe)}'>DAG {escape(receipt.recipe)}</a></nav>",
        f"<h1>{escape(title)} <small>of {escape(receipt.recipe)}</small></h1>",
        f"<p class=when>{escape(when)}, key <code>{escape(receipt.key)}</code></p>",
        f"<p class=no><strong>Refused.</strong> {escape(str(refused))}</p>" if refused else "",
        _section("report", "Report", f"<pre class=lines>{lines}</pre>" if lines else "", tag="div"),
        _section("metrics", "Metrics", _table((name, _cell(value)) for name, value in sorted(receipt.metrics.items()))),
        _section("facts", "Facts", _table(facts.items())),
        _section("inputs", "Inputs", _table(inputs)),
        _section("outputs", "Outputs", _table(outputs)),
        _section("versions", "Versions", _table((name, escape(value)) for name, value in sorted(receipt.versions.items()))),
        f"<h2>Do it again</h2><pre class=wrap>{escape(receipt.command)}</pre>",
        f"<details><summary>JSON</summary><p><a href='{up}../json/{quote(receipt.path)}'>the file</a></p>"
        f"<pre class=wrap>{escape(receipt.to_json().decode())}</pre></details>",
    ]
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{escape(title)} of {escape(receipt.recipe)}"
    return f"<!doctype html><html lang=en><head>{head}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"


def _shown(name: str, receipt: Receipt, up: str) -> str:
    """An output's path; that of a report is a link to it."""
    path = f"<code>{escape(receipt.outputs[name].path)}</code>"
    return f"<a href='{up}../report/{quote(receipt.path)}'>{path}</a>" if name == "report.html" else path


def _section(anchor: str, title: str, body: str, tag: str = "section") -> str:
    return f"<h2 id={anchor}>{title}</h2><{tag}>{body}</{tag}>" if body else ""


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """Rows of a name, escaped here, and a cell that is HTML already."""
    lines = [f"<tr><td>{escape(name)}</td><td>{cell}</td></tr>" for name, cell in rows]
    return f"<table>{''.join(lines)}</table>" if lines else ""


def _ref(ref: str, up: str) -> str:
    """A receipt becomes a link to its own page; a table version has none."""
    return f"<a href='{up}{quote(ref)}'>{escape(ref)}</a>" if ref.endswith(".json") else f"<code>{escape(ref)}</code>"


def _cell(value: object) -> str:
    """Any JSON value as HTML: a list of objects and an object as small tables."""
    if isinstance(value, dict) and value:
        return _table((str(name), _cell(item)) for name, item in value.items())
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        # Words first: they say what the numbers are of.
        names = sorted({str(name) for item in value for name in item}, key=lambda name: (not isinstance(value[0].get(name), str), name))
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        rows = ("".join(f"<td>{_cell(item.get(name))}</td>" for name in names) for item in value)
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
    return f"<code>{escape(_plain(value))}</code>"


def _plain(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "none" if value is None else json.dumps(value, ensure_ascii=False)
    return f"{value:,.0f}" if abs(value) < 1e15 and value == int(value) else f"{value:.6g}"


def _moment(text: str) -> str:
    """An ISO time with its zone, for people."""
    moment = datetime.datetime.fromisoformat(text).astimezone(datetime.UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
