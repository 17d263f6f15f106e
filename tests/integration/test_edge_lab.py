"""docs/labs/jetson.md is done, not read: every command of it that doesn't need a Jetson runs here, and says what the page says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from unit.edge_chain import Chain

from forja import recipes
from forja.lake import Lake
from forja.settings import ROOT, Settings
from forja.stages import harness, ingest

pytestmark = pytest.mark.ml

PAGE = (ROOT / "docs" / "labs" / "jetson.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Digits(Chain):
    """The real recipe's chain, each receipt where the stages of this code would put it: commands find it as the newest."""

    recipe = recipes.load("digits")

    def place(self, stage: str, variant: str, inputs: dict[str, list[str]]) -> str:
        if stage == "transform":
            table = ingest.open_table(self.lake, "vision/digits/raw")
            ingest.commit(table, pa.Table.from_pylist([], schema=pa.schema(ingest.schema())), {"t-0": 1}, {"t-0": None})
            inputs = {"raw": [f"vision/digits/raw@{self.lake.table('vision/digits/raw').version()}"]}
        folder = harness.prepare(self.lake, stage, self.recipe, inputs, variant).folder
        return f"{folder}/receipt{'-000001' if stage == 'register' else ''}.json"


def blocks() -> list[tuple[str, str]]:
    """Kind and content of every block of the page."""
    return [(kind, content) for kind, content in BLOCK.findall(PAGE)]


def matches(wanted: str, said: str) -> bool:
    """Whether output is what the page shows; ``...`` stands for any text, on a line of its own for any lines."""
    pattern = re.escape(wanted.strip()).replace(r"\.\.\.", ".*")
    return re.fullmatch(pattern, said.strip(), re.DOTALL) is not None


@pytest.mark.parametrize(
    ("wanted", "said", "good"),
    [("a ... c", "a b c", True), ("a\n...\nd", "a\nb\nc\nd", True), ("a ... c", "a b d", False), ("a", "a\nb", False)],
)
def test_the_comparison_compares(wanted: str, said: str, good: bool) -> None:
    assert matches(wanted, said) == good


def test_the_page_runs(tmp_path: Path) -> None:
    Digits(tmp_path)
    assert Lake(str(tmp_path / "lake")).size("vision/digits/raw/_delta_log/00000000000000000000.json")
    env: dict[str, str] = {k: v for k, v in os.environ.items() if not k.startswith("FORJA_EDGE")}
    env |= {"HOME": str(tmp_path), "FORJA_LAKE": str(tmp_path / "lake"), "FORJA_STATE": str(tmp_path / "state")}
    env["FORJA_CACHE"] = str(Settings.from_env().cache)
    # One shell for the whole page: variables and functions of a block are there in the next.
    found, script = blocks(), "set -euo pipefail\n"
    for number, (kind, content) in enumerate(found):
        if kind == "bash":
            script += f"{{ {content}\n}} >{tmp_path}/out-{number} 2>{tmp_path}/err-{number}\n"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    errors = {p.name: p.read_text()[-600:] for p in sorted(tmp_path.glob("err-*"))}
    assert done.returncode == 0, (done.stderr, errors)
    ran = 0
    for number, (kind, content) in enumerate(found):
        if kind == "text":
            said = (tmp_path / f"out-{number - 1}").read_text()
            assert matches(content, said), f"the page shows\n{content}\nand this came\n{said}"
            ran += 1
    assert ran >= 5
    assert sum(kind == "bash" for kind, _ in found) >= 7


def test_blocks_for_the_device_are_marked_and_name_what_a_bundle_has() -> None:
    from forja.edge.bundle import FILES, SCRIPTS

    device: list[Any] = [content for kind, content in blocks() if kind == "sh"]
    assert device
    for content in device:
        assert content.startswith("# on the Jetson\n")
        for script, options in re.findall(r"(?:\./|python3 )(\w+\.(?:sh|py))((?: --[\w-]+)*)", content):
            assert script in SCRIPTS
            assert all(option in (FILES / script).read_text() for option in options.split())
    assert {kind for kind, _ in blocks()} == {"bash", "sh", "text"}
