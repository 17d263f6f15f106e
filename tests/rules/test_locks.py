"""The exported locks are those of uv.lock, name every ordered package, and hold a hash for each line."""

from __future__ import annotations

import re

import pytest

from forja import envs, locks
from forja.settings import ROOT, Settings


@pytest.fixture(scope="module")
def wanted() -> dict[str, str]:
    return locks.exports(Settings.from_env())


@pytest.mark.parametrize("path", locks.EXPORTS)
def test_exports_match_the_lock(path: str, wanted: dict[str, str]) -> None:
    assert (ROOT / path).read_text() == wanted[path], f"{path} is not what uv.lock says; run make lock"


@pytest.mark.parametrize("path", locks.EXPORTS)
def test_each_package_is_pinned_with_hashes_and_no_index_is_named(path: str) -> None:
    text = (ROOT / path).read_text()
    for requirement in re.findall(r"^[a-z0-9].*(?:\n    .*)*", text, re.MULTILINE):
        assert re.match(r"[a-z0-9._-]+(\[[a-z0-9,_-]+\])?==", requirement), requirement
        assert "--hash=sha256:" in requirement, requirement
    assert "://" not in text
    assert "index" not in "\n".join(line for line in text.splitlines() if line.startswith("-"))


def test_each_ordered_package_has_a_place(wanted: dict[str, str]) -> None:
    for name in locks.ORDERED:
        assert re.search(rf"^#   {name} +[\w-]+ \d.*: (this file|k8s/images/)", wanted["requirements.txt"], re.MULTILINE), name


def test_a_package_that_no_lock_holds_has_no_place(wanted: dict[str, str]) -> None:
    assert locks._places("left-pad", wanted) == ""


def test_numpy_2_everywhere_but_in_serving(wanted: dict[str, str]) -> None:
    """Triton's bundled stub returns empty outputs with NumPy 2, and nothing else may be dragged down by that."""
    for path, text in wanted.items():
        versions = re.findall(r"^numpy==(\d+)", text, re.MULTILINE)
        assert versions, path
        assert {v == "1" for v in versions} == {path == "k8s/images/serving.txt"}, (path, versions)


def test_the_images_install_the_locks_with_the_same_uv() -> None:
    script, uv = ((ROOT / "k8s" / "images" / name).read_text() for name in ("environment.py", "uv.txt"))
    assert re.search(rf"^uv=={re.escape(envs.UV)} \\\n    --hash=sha256:[0-9a-f]{{64}}$", uv, re.MULTILINE)
    assert script.count('"--require-hashes"') == 2, "for uv itself and for what it installs"
    assert f'MARKER = "{envs.MARKER}"' in script, "by which forja.envs knows an environment that is whole"
