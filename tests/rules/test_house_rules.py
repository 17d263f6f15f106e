"""The house rules: who may import whom, how long things get, what every recipe and DAG has."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from forja import recipes, stages
from forja.receipts import Input
from forja.recipes.base import STAGES
from forja.sites import load_site

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for folder in ("include", "plugins", "dags", "tests") for p in (ROOT / folder).rglob("*.py"))
LIBRARY = [p for p in SOURCES if p.is_relative_to(ROOT / "include")]
DAGS = sorted((ROOT / "dags").glob("*.py"))
RECIPES = recipes.names()

MODULE_LINES = 350
TEST_LINES = 400
DAG_LINES = 80
FUNCTION_LINES = 50


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules that a tree imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def at_import(tree: ast.Module) -> Iterator[str]:
    """Modules that a module imports when it is imported itself."""
    body = [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))]
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(ast.Module(body=[node], type_ignores=[]))


def forbidden_in_library(source: str) -> list[str]:
    """What include/ must never import."""
    return [m for m in imports(ast.parse(source)) if m.split(".")[0] in ("airflow", "forja_airflow")]


def forbidden_in_recipes(source: str) -> list[str]:
    """What a recipe or a profile must never import: anything but the standard library and these of Forja's."""
    mine = ("forja.errors", "forja.settings", "forja.recipes", "forja.profiles", "forja.checks", "forja.datasets", "forja.edge.targets")
    found = imports(ast.parse(source))
    return [m for m in found if m.split(".")[0] not in sys.stdlib_module_names and not any(m == x or m.startswith(f"{x}.") for x in mine)]


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_library_never_imports_airflow(path: Path) -> None:
    assert forbidden_in_library(path.read_text()) == []


@pytest.mark.parametrize(
    "path",
    [p for p in LIBRARY if p.parent.name == "recipes" or p.name in ("profiles.py", "sites.py", "checks.py", "datasets.py", "targets.py")],
    ids=name,
)
def test_recipes_and_profiles_need_the_standard_library_alone(path: Path) -> None:
    assert forbidden_in_recipes(path.read_text()) == []


@pytest.mark.parametrize("source", ["import airflow", "def f():\n    from airflow.sdk import DAG", "from forja_airflow import dag"])
def test_the_layering_rule_catches(source: str) -> None:
    assert forbidden_in_library(source)


@pytest.mark.parametrize("source", ["import numpy", "from forja.lake import Lake", "def f():\n    import torch"])
def test_the_recipe_rule_catches(source: str) -> None:
    assert forbidden_in_recipes(source)


HEAVY = {
    "torch", "torchvision", "polars", "pyarrow", "deltalake", "obstore", "mlflow", "kafka", "numpy", "onnx", "onnxruntime", "nvidia",
    "tritonclient", "tensorrt", "tensorrt_rtx", "sklearn", "kubernetes",
}  # fmt: skip


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.parent.name == "stages"], ids=name)
def test_stage_modules_import_nothing_heavy(path: Path) -> None:
    """Airflow's worker imports them for plan()."""
    assert {m.split(".")[0] for m in at_import(ast.parse(path.read_text()))} & HEAVY == set()


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_modules_stay_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    # The catalogue of recipe parts is one list of fields and their one-line meanings.
    longer = path.is_relative_to(ROOT / "tests") or (path.name == "base.py" and path.parent.name == "recipes")
    limit = TEST_LINES if longer else MODULE_LINES
    assert lines <= limit


@pytest.mark.parametrize("path", [p for p in SOURCES if not p.is_relative_to(ROOT / "tests")], ids=name)
def test_functions_stay_short(path: Path) -> None:
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {n.name: n.end_lineno - n.lineno + 1 for n in functions if n.end_lineno and n.end_lineno - n.lineno + 1 > FUNCTION_LINES}
    assert long == {}


KNOWN = {
    ".py", ".toml", ".json", ".yaml", ".yml", ".md", ".txt", ".xml", ".properties", ".sha256", ".lock", ".csv", ".png", ".svg", ".sh",
    ".dockerignore", ".go", ".mod", ".sum", ".html",
}  # fmt: skip
"""Endings of files."""

NAMES = {"Dockerfile", "LICENSE", "Makefile", "forja", "run", ".airflowignore", ".gitignore"}
"""Files without an ending."""


def unknown_files(folder: Path) -> list[str]:
    """Files that no tool of ours writes or reads: what editors and patch leave behind (.orig, .rej, .bak, name~)."""
    ours = [p for part in ("include", "plugins", "dags", "tests", "k8s", "docs", ".ci") for p in (folder / part).rglob("*")]
    files = [p for p in (*ours, *folder.glob("[!.]*")) if p.is_file() and "__pycache__" not in p.parts]
    return sorted(str(p.relative_to(folder)) for p in files if p.suffix not in KNOWN and p.name not in NAMES)


def test_every_file_is_of_a_known_kind() -> None:
    assert unknown_files(ROOT) == []


@pytest.mark.parametrize("left", ["include/forja/a.py.orig", "plugins/b.py.rej", "dags/c.bak", "docs/d.md~", "e.py.orig", "tests/unit/f"])
def test_the_rule_of_known_files_catches(left: str, tmp_path: Path) -> None:
    path = tmp_path / left
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    path.with_name("good.py").touch()
    assert unknown_files(tmp_path) == [left]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_open_ends(path: Path) -> None:
    assert path.name != "utils.py"
    assert not re.search(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b", path.read_text())


def wrong_in_dag_file(source: str) -> list[str]:
    """What a DAG file must not have, or lacks."""
    tree = ast.parse(source)
    wrong = [
        type(n).__name__
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda | ast.For)
    ]
    if len(source.splitlines()) > DAG_LINES:
        wrong.append(f"more than {DAG_LINES} lines")
    if not (ast.get_docstring(tree) or "").startswith("### ") or "doc_md=__doc__" not in source:
        wrong.append("no runbook as doc_md")
    allowed = ("airflow.sdk", "forja.recipes", "forja_airflow.dag", "forja_airflow.baseline", "forja_airflow.mig")
    return wrong + [m for m in imports(tree) if not m.startswith(allowed)]


@pytest.mark.parametrize("path", DAGS, ids=name)
def test_dag_files_are_tables_of_contents(path: Path) -> None:
    assert wrong_in_dag_file(path.read_text()) == []


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda s: s + "\ndef f(): ...\n", id="a function"),
        pytest.param(lambda s: s + "\n" * 80, id="too long"),
        pytest.param(lambda s: s.replace("### ", ""), id="no runbook"),
        pytest.param(lambda s: s + "\nimport torch\n", id="something heavy"),
    ],
)
def test_the_dag_rule_catches(change: object) -> None:
    assert callable(change)
    assert wrong_in_dag_file(change(DAGS[0].read_text()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_dag_file_and_an_owner(recipe: str) -> None:
    assert (ROOT / "dags" / f"{recipe}.py").is_file()
    assert recipes.load(recipe).owner


@pytest.mark.parametrize("verb", STAGES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_plans(recipe: str, verb: str) -> None:
    module = stages.load(verb)
    variant = {"optimize": "fp32", "export": "cpu"}.get(verb, "")
    inputs = {
        n: [Input(ref=f"t/r/raw@{i}", digest="0" * 64) for i in range(2 if n in module.STAGE.many else 1)] for n in module.STAGE.inputs
    }
    plan = module.plan(recipes.load(recipe), inputs, variant)
    assert (plan.stage, plan.recipe, plan.team, plan.variant) == (verb, recipe, recipes.load(recipe).team, variant)


@pytest.mark.parametrize("site", sorted(p.stem for p in (ROOT / "include" / "sites").glob("*.toml")))
@pytest.mark.parametrize("verb", STAGES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_site_runs_every_stage_in_its_environment(recipe: str, verb: str, site: str) -> None:
    profile = load_site(site).profile(getattr(recipes.load(recipe).profiles, verb))
    assert profile.environment == stages.load(verb).STAGE.environment
    assert profile.slots <= load_site(site).pools[profile.pool]


def manifests() -> list[Path]:
    found = [*(ROOT / "k8s").rglob("*"), *ROOT.glob("docker-compose.yaml")]
    return sorted(p for p in found if p.suffix in (".yaml", ".yml") or p.name == "Dockerfile")


def unpinned(text: str) -> list[str]:
    """Images without a version tag or digest."""
    images = re.findall(r"^\s*(?:-\s*)?image:\s*[\"']?([^\s\"'#]+)|^FROM\s+(?:--\S+\s+)?(\S+)", text, re.MULTILINE)
    found = [a or b for a, b in images]
    stages_of_build = set(re.findall(r"^FROM\s+.*\sAS\s+(\S+)", text, re.MULTILINE | re.IGNORECASE))
    pinned = re.compile(r"(@sha256:[0-9a-f]{64}|:(?!latest$)[\w.${}:-]*\d[\w.${}-]*)$")
    return [i for i in found if i not in stages_of_build and not i.startswith("$") and not pinned.search(i)]


def secrets(text: str) -> list[str]:
    """Lines that hold a secret itself instead of a reference to one."""
    keys = r"(?:password|passwd|secret_key|secret_access_key|token|jwt_secret|fernet_key|api_key|private_key)"
    lines = re.findall(rf"^\s*-?\s*[\w.]*{keys}\s*[:=]\s*[\"']?(?!true$|false$)[^\s$\"'{{<].*$", text, re.MULTILINE | re.IGNORECASE)
    return [*lines, *re.findall(r"-----BEGIN [A-Z ]*PRIVATE KEY-----", text), *re.findall(r"^kind:\s*Secret\s*$", text, re.MULTILINE)]


def test_images_are_pinned_and_manifests_hold_no_secrets() -> None:
    assert {name(p): found for p in manifests() if (found := unpinned(p.read_text()) + secrets(p.read_text()))} == {}


@pytest.mark.parametrize(
    "text", ["image: redis", "image: redis:latest", "  - image: a/b:stable", "FROM debian", "FROM --platform=x debian:latest"]
)
def test_the_pin_rule_catches(text: str) -> None:
    assert unpinned(text)


@pytest.mark.parametrize(
    "text", ["image: redis:7.2", "image: localhost:5000/a/b:1.0", "FROM debian:12-slim AS base\nFROM base", "FROM x@sha256:" + "0" * 64]
)
def test_the_pin_rule_passes(text: str) -> None:
    assert unpinned(text) == []


@pytest.mark.parametrize("text", ["POSTGRES_PASSWORD: hunter2", "kind: Secret", "- AWS_SECRET_ACCESS_KEY=abc", "  api_key: 'x'"])
def test_the_secret_rule_catches(text: str) -> None:
    assert secrets(text)


@pytest.mark.parametrize(
    "text",
    [
        "POSTGRES_PASSWORD: ${FORJA_PASSWORD}",
        "POSTGRES_PASSWORD_FILE: /run/secrets/x",
        "kind: SecretStore",
        "automountServiceAccountToken: false",
    ],
)
def test_the_secret_rule_passes(text: str) -> None:
    assert secrets(text) == []


def test_lines_of_each_package_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    lines: Counter[str] = Counter()
    for path in SOURCES:
        package = path.relative_to(ROOT).parent
        lines[str(package)] += len(path.read_text().splitlines())
    with capsys.disabled():
        print()
        for package, count in sorted(lines.items()):
            print(f"  {count:6} {package}")
        print(f"  {sum(lines.values()):6} in all")
