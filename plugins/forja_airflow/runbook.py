"""The runbook of each task, shown beside it in Airflow: what it does, and what to do when it fails."""

from __future__ import annotations

import ast
import inspect
import re

from forja.settings import ROOT

ADMIT = """### admit: decides whether this run goes on.

**What it does:** decides, and pins the version of the raw table that the run uses; the reason is in the log, in the XCom
`facts` and in the lake under `admissions/`.

**Skipped** is no failure: the rows were admitted before, or too few are new. **Deferred**: the recipe's cool-down isn't over.
To run anyway, trigger the DAG by hand: that always passes.

**When it fails:** no raw table means that nothing was ingested yet (`./forja produce`); a wrong `raw` was typed in the form.
"""

AFTER = """**Exit status of the stage:** 2 bad input, 3 refused by a gate, 6 damaged data: not tried again, read the last line
of the log. 4 conflict, 5 a service is down, 1 a bug, above 128 killed: tried again. Clearing the task is always safe:
work that is done is adopted, and two runs of the same work wait for each other. The first line of the log is the command
that does the same without Airflow.

**Links** to its receipt, report and MLflow run: on the tab *Details* of the task in a run.
"""


def of(verb: str) -> str:
    """Markdown for the task of a stage: its module's docstring, read without importing it."""
    path = ROOT / "include" / "forja" / "stages" / f"{verb}.py"
    text = ast.get_docstring(ast.parse(path.read_text())) or verb if path.is_file() else verb
    title, _, rest = inspect.cleandoc(text).partition("\n")
    rest = re.sub(r"^(What it does|When it fails):", r"**\1:**", rest, flags=re.MULTILINE)
    return f"### {title}\n{rest}\n\n{AFTER}"
