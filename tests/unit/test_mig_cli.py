"""What a person sees of ``./forja mig`` without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from forja.cli import app
from forja.errors import BadInput


def mig(*words: str) -> Result:
    return CliRunner().invoke(app, ["mig", *words])


def test_the_command_of_a_difference_makes_only_what_is_missing() -> None:
    done = mig("diff", "--gpu", "h100-80", "--from", "3g.40gb:0,2g.20gb:4", "3g.40gb=1", "1g.10gb=2")
    assert done.exit_code == 0
    assert "keep     3g.40gb:0" in done.stdout
    assert "nvidia-smi mig -i 0 -cgi 1g.10gb:5,1g.10gb:6 -C" in done.stdout


def test_a_gpu_that_is_not_cut_is_called_whole() -> None:
    assert "h100-80, whole: not cut" in mig("plan", "--gpu", "h100-80", "all-disabled").stdout
    assert "h100-80: 8 of 8 memory slices free" in mig("plan", "--gpu", "h100-80", "all-enabled").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plan",), "either --gpu or --node"),
        (("plan", "--gpu", "h100-80", "1g.10gb=²"), "PROFILE=COUNT"),
        (("plan", "--gpu", "h100-80", "1g.10gb=1", "1g.10gb=1"), "each profile once"),
        (("plan", "--gpu", "h100-80", "1g.10gb=1", "--svg", "/none/x.svg"), "can be written"),
        (("plan", "--gpu", "h100-80", "--svg", "x.svg"), "--svg with PROFILE=COUNT"),
        (("diff", "balanced"), "either --gpu or --node"),
        (("diff", "--gpu", "h100-80", "--from", "3g.40gb:²", "1g.10gb=1"), "0, 4"),
    ],
)
def test_bad_words(words: tuple[str, ...], said: str) -> None:
    error = mig(*words).exception
    assert isinstance(error, BadInput)
    assert said in str(error)


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    assert f"drawn: {path}" in mig("plan", "--gpu", "a30", "1g.6gb=2", "2g.12gb=1", "--svg", str(path)).stdout
    assert path.read_text().startswith("<svg")
