"""Environments: found by their lock, made once, made again when broken; prerequisites named all at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from forja import envs, prerequisites
from forja.errors import BadInput
from forja.settings import ROOT, Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return replace(Settings.from_env(), cache=tmp_path / "cache", state=tmp_path / "state")


def start_setup(settings: Settings, *names: str) -> subprocess.Popen[str]:
    env = {**os.environ, "FORJA_CACHE": str(settings.cache), "PYTHONPATH": str(ROOT / "include")}
    return subprocess.Popen([sys.executable, "-m", "forja.envs", *names], env=env, stderr=subprocess.PIPE, text=True)


def test_an_absent_environment_says_what_to_run(settings: Settings) -> None:
    with pytest.raises(BadInput, match="run make setup"):
        envs.python("ml", settings)
    with pytest.raises(BadInput, match=r"run \./forja setup ml-dev"):
        envs.python("ml-dev", settings)
    with pytest.raises(BadInput, match="control-dev"):
        envs.python("gpu", settings)


def test_a_folder_without_its_marker_does_not_count(settings: Settings) -> None:
    place = envs.folder("control", settings)
    (place / "bin").mkdir(parents=True)
    (place / "bin" / "python").touch()
    with pytest.raises(BadInput, match="run make setup"):
        envs.python("control", settings)
    (place / envs.MARKER).write_text("{}")
    assert envs.python("control", settings) == place / "bin" / "python"


def test_another_lock_is_another_folder(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = envs.folder("ml", settings)
    (tmp_path / "uv.lock").write_text(envs.LOCK.read_text() + "\n")
    monkeypatch.setattr(envs, "LOCK", tmp_path / "uv.lock")
    assert envs.folder("ml", settings) != before


@pytest.mark.parametrize(
    ("there", "chosen", "runs"),
    [
        pytest.param(("3.11", "3.12", "3.13"), "3.12", "3.12", id="that of the Python which setup takes"),
        pytest.param(("3.11", "3.13"), "3.13", "3.13", id="the first of the names is another"),
        pytest.param(("3.13",), "3.11", "3.13", id="another one where that is not there"),
        pytest.param((), "3.11", "", id="none"),
    ],
)
def test_the_launcher_takes_the_environment_that_setup_made(
    settings: Settings, tmp_path: Path, there: tuple[str, ...], chosen: str, runs: str
) -> None:
    """Its folder is what envs.folder() gives to the Python that the launcher finds for setup."""

    def script(path: Path, line: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    own = envs.folder("control", settings)
    here = f"py{sys.version_info.major}.{sys.version_info.minor}"
    for version in there:
        place = own.with_name(own.name.replace(here, f"py{version}"))
        script(place / "bin" / "python", f"echo environment {version} $@")
        (place / envs.MARKER).touch()
    script(tmp_path / "python", f"echo {chosen}")
    env = {**os.environ, "FORJA_CACHE": str(settings.cache), "FORJA_PYTHON": str(tmp_path / "python")}
    done = subprocess.run([ROOT / "forja", "status"], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == (f"environment {runs} -m forja.cli status\n" if runs else "")
    assert (done.returncode, "make setup" in done.stderr) == ((0, False) if runs else (2, True))


def test_a_python_that_does_not_fit_is_passed_over(settings: Settings, tmp_path: Path) -> None:
    bad = tmp_path / "old"
    bad.write_text("#!/bin/sh\necho 3.9\nexit 1\n")
    bad.chmod(0o755)
    env = {**os.environ, "FORJA_PYTHON": f"{bad} {sys.executable}"}
    done = subprocess.run([ROOT / "forja", "setup", "--path", "control-dev"], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(envs.python("control-dev", Settings.from_env()))
    only = subprocess.run([ROOT / "forja", "setup"], env={**env, "FORJA_PYTHON": str(tmp_path / "none")}, capture_output=True, text=True)
    assert (only.returncode, "Python 3.11 to 3.13 is missing" in only.stderr) == (2, True)


@pytest.mark.parametrize("case", ["changed", "missing", "extra"])
def test_a_jar_that_is_not_the_committed_one_is_refused(tmp_path: Path, case: str) -> None:
    libs = shutil.copytree(envs.kafka_jars(Settings.from_env()), tmp_path / "libs")
    envs.verify_jars(libs)
    jar = sorted(libs.glob("*.jar"))[3]
    if case == "changed":
        jar.write_bytes(b"\0" + jar.read_bytes()[1:])
    elif case == "missing":
        jar.unlink()
    else:
        jar = libs / "extra.jar"
        jar.write_bytes(b"PK")
    with pytest.raises(BadInput, match=jar.name):
        envs.verify_jars(libs)


def test_all_missing_prerequisites_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    monkeypatch.setattr(prerequisites, "libpython", lambda: None)
    with pytest.raises(BadInput) as caught:
        prerequisites.check_prerequisites(tmp_path, maven=True, gib=1e6)
    text = str(caught.value)
    for advice in ("Python 3.11 to 3.13", "install libpython3.10", "openjdk-17", "install maven", "FORJA_CACHE"):
        assert advice in text


def test_an_old_java_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "java").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for release, refused in (('JAVA_VERSION="11.0.2"', True), ('JAVA_VERSION="1.8.0_292"', True), ('JAVA_VERSION="21"', False)):
        (tmp_path / "release").write_text(release)
        assert bool(prerequisites._java()) is refused, release


def test_this_machine_has_what_it_takes(tmp_path: Path) -> None:
    prerequisites.check_prerequisites(tmp_path, maven=True, gib=0.1)
    assert prerequisites.libpython() is not None


@pytest.mark.timeout(180)
def test_two_setups_at_once_make_one_environment_and_a_broken_one_is_made_again(settings: Settings) -> None:
    both = [start_setup(settings, "serving") for _ in range(2)]
    words = [p.communicate()[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], words
    assert sorted("made" in w for w in words) == [False, True], words
    python = envs.python("serving", settings)
    subprocess.run([python, "-c", "import numpy; assert numpy.__version__ < '2'"], check=True)

    started = time.monotonic()
    assert "nothing to do" in start_setup(settings, "serving").communicate()[1]
    assert time.monotonic() - started < 3

    (python.parents[1] / envs.MARKER).unlink()
    assert "made again" in start_setup(settings, "serving").communicate()[1]
    assert envs.python("serving", settings).exists()
