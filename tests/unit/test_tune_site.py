"""A site's own settings of Triton: read strictly, used over the recipe's, and put into the file with everything else as it is."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from forja import recipes
from forja.errors import BadInput
from forja.recipes.base import Serving
from forja.sites import SITES, Site, load_site
from forja.tune import site_file
from forja.tune.choose import Candidate

GOOD = '[pools]\ncpu = 1\n[profiles.p]\nrunner = "local"\nenvironment = "ml"\n'
DIGITS = recipes.load("digits")


def site(folder: Path, text: str) -> Site:
    (folder / "x.toml").write_text(GOOD + text)
    return load_site("x", folder)


def test_the_recipe_but_for_what_the_site_says(tmp_path: Path) -> None:
    found = site(tmp_path, "[serving.digits]\ninstances = 3\np99_ms = 20\nmax_batch = 8\n")
    assert found.serving_of(DIGITS) == dataclasses.replace(DIGITS.serving, instances=3, p99_ms=20)
    assert found.max_batch_of(DIGITS) == 8
    cifar = recipes.load("cifar10")
    assert found.serving_of(cifar) == cifar.serving
    assert found.max_batch_of(cifar) == cifar.optimize.max_batch


def test_nothing_said(tmp_path: Path) -> None:
    found = site(tmp_path, "")
    assert (found.serving_of(DIGITS), found.max_batch_of(DIGITS)) == (DIGITS.serving, DIGITS.optimize.max_batch)


BAD = {
    "unknown key": ("[serving.digits]\ninstance = 2\n", r"serving\.digits\.instance"),
    "unknown recipe": ("[serving.digit]\ninstances = 2\n", r"unknown key: got 'serving\.digit'"),
    "a value in words": ('[serving.digits]\ninstances = "2"\n', r"serving\.digits\.instances: got '2'; allowed: a whole number"),
    "half an instance": ("[serving.digits]\ninstances = 1.5\n", r"serving\.digits\.instances"),
    "a batch in words": ('[serving.digits]\nmax_batch = "8"\n', r"serving\.digits\.max_batch"),
    "a value that no recipe may have": ("[serving.digits]\nqueue = 0\n", r"Serving\.queue"),
    "no table": ("[serving]\ndigits = 1\n", r"serving\.digits: got 1; allowed: a table"),
    "a list": ("serving = []\n", "allowed: a table"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_tables_are_refused(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    (tmp_path / "x.toml").write_text(text + GOOD)
    with pytest.raises(BadInput, match=message):
        load_site("x", tmp_path)


@pytest.mark.parametrize("size", [0, 33])
def test_a_batch_that_the_engines_do_not_take(size: int, tmp_path: Path) -> None:
    found = site(tmp_path, f"[serving.digits]\nmax_batch = {size}\n")
    with pytest.raises(BadInput, match=r"serving\.digits\.max_batch: got \d+; allowed: 1 to optimize\.max_batch \(32\)"):
        found.max_batch_of(DIGITS)


VALUES = {"instances": 2, "delay_us": 500, "queue": 140}
NEW = "[serving.digits]\ninstances = 2\ndelay_us = 500\nqueue = 140\n"
CHANGES: dict[str, tuple[str, str]] = {
    "an empty file": ("", NEW),
    "a table at the end": (GOOD, f"{GOOD}\n{NEW}"),
    "after a line without its end": ("[pools]\ncpu = 1", f"[pools]\ncpu = 1\n\n{NEW}"),
    "values where they stand": (
        "# why\n[serving.digits] # measured\nqueue = 9   # few\n\n# of one core\ninstances = 1\np99_ms = 50\n\n# x\n[pools]\ncpu = 1\n",
        "# why\n[serving.digits] # measured\nqueue = 140   # few\n\n# of one core\ninstances = 2\np99_ms = 50\ndelay_us = 500\n\n"
        "# x\n[pools]\ncpu = 1\n",
    ),
    "another recipe's table": ("[serving.ai4i]\nqueue = 9\n", f"[serving.ai4i]\nqueue = 9\n\n{NEW}"),
    "a table without a line end": ("[serving.digits]\nqueue = 9", "[serving.digits]\nqueue = 140\ninstances = 2\ndelay_us = 500\n"),
    "a batch that is the recipe's again": (
        "[serving.digits]\nmax_batch = 4\nqueue = 9\n",
        "[serving.digits]\nqueue = 140\ninstances = 2\ndelay_us = 500\n",
    ),
    "a header in quotes": ('[serving."digits"]\n', '[serving."digits"]\ninstances = 2\ndelay_us = 500\nqueue = 140\n'),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES, ids=str)
def test_only_its_own_keys_change(case: str) -> None:
    old, wanted = CHANGES[case]
    found = site_file.changed(old, "digits", VALUES)
    assert found == wanted
    assert site_file.changed(found, "digits", VALUES) == found


@pytest.mark.parametrize("name", sorted(p.stem for p in SITES.glob("*.toml")))
def test_real_site_files_stay_what_they_are(name: str, tmp_path: Path) -> None:
    old = (SITES / f"{name}.toml").read_text()
    path = tmp_path / f"{name}.toml"
    path.write_text(old)
    path.chmod(0o644)
    assert site_file.put(path, "digits", VALUES)
    assert not site_file.put(path, "digits", VALUES)
    assert path.stat().st_mode & 0o777 == 0o644
    before, after = load_site(name), load_site(name, tmp_path)
    assert after.serving_of(DIGITS) == dataclasses.replace(before.serving_of(DIGITS), **VALUES)
    rest = tomllib.loads(path.read_text())
    del rest["serving"]["digits"]
    assert {k: v for k, v in rest.items() if v} == {k: v for k, v in tomllib.loads(old).items() if k != "serving" or v.keys() - {"digits"}}


@pytest.mark.parametrize(
    "old", ["serving = { digits = { queue = 9 } }\n", "serving.digits.queue = 9\n", "[serving]\ndigits.queue = 9\n", "[pools\n"]
)
def test_other_forms_are_left_to_a_person(old: str) -> None:
    """Must fail rather than change a file into something else."""
    with pytest.raises(BadInput, match="by hand"):
        site_file.changed(old, "digits", VALUES)


def test_the_fields_of_a_candidate() -> None:
    chosen = Candidate(max_batch=16, serving=Serving(instances=2, delay_us=500, queue=140, timeout_ms=99, p99_ms=5))
    assert site_file.fields(chosen, 32) == {**VALUES, "max_batch": 16}
    assert site_file.fields(chosen, 16) == VALUES
    assert site_file.table("digits", VALUES) == NEW
