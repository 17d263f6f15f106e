"""The environments: made from the lock by ``uv``, one folder for each lock, shared by all checkouts.

    settings.cache/env/<name>-py<version>-<first 12 digits of the lock's sha256>/

A folder counts once its marker, written last, is there; a folder without one is thrown away and made again.
``python3 -m forja.envs`` makes those of NAMES and Kafka's jars; more names may be given. Only the standard library
is imported: this runs on the system's Python before any environment exists.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from forja.errors import BadInput, ForjaError, Unavailable
from forja.prerequisites import check_prerequisites
from forja.settings import ROOT, Settings

GROUPS = {
    "control": ("control",),
    "ml": ("ml",),
    "serving": ("serving",),
    "control-dev": ("control", "dev"),
    "ml-dev": ("ml", "dev"),
}
"""Dependency groups of pyproject.toml that each environment holds."""

NAMES = ("control", "ml", "serving")
"""What a run needs; the others are for tests."""

SIZE_GIB = {"control": 1.3, "ml": 9.0, "serving": 0.5, "control-dev": 1.5, "ml-dev": 9.2}
"""Disk that each takes when it is the first; uv links files that two environments share."""

UV = "0.13.9"
"""Version of uv that is installed where there is none. An older one on the PATH must read this lock's format."""

LOCK = ROOT / "uv.lock"
MARKER = "forja-complete.json"
FILES = ROOT / "include" / "forja" / "services" / "files"
KAFKA = "4.2.0"
KAFKA_DIGESTS = FILES / "kafka.sha256"


def folder(name: str, settings: Settings) -> Path:
    """Folder of environment ``name`` for this lock and this Python, whether or not it exists."""
    if name not in GROUPS:
        raise BadInput("environment", value=name, allowed=", ".join(GROUPS))
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]
    return settings.cache / "env" / f"{name}-py{sys.version_info.major}.{sys.version_info.minor}-{digest}"


def python(name: str, settings: Settings) -> Path:
    """Interpreter of environment ``name``.

    Raises:
        BadInput: the environment hasn't been made from the present lock.
    """
    place = folder(name, settings)
    if not (place / MARKER).is_file():
        command = "make setup" if name in NAMES else f"./forja setup {name}"
        raise BadInput(f"environment {name}", value=str(place), allowed="one made from this uv.lock", do=f"run {command}")
    return place / "bin" / "python"


def kafka_jars(settings: Settings) -> Path:
    """Folder of Kafka's jars; BadInput when ``make setup`` hasn't fetched them."""
    place = _kafka_folder(settings)
    if not (place / MARKER).is_file():
        raise BadInput("Kafka's jars", value=str(place), allowed="those of files/kafka.sha256", do="run make setup")
    return place / "libs"


def setup(settings: Settings, names: tuple[str, ...] = NAMES) -> list[str]:
    """Make what is missing and return what was made; does nothing, fast, when all is there.

    Raises:
        BadInput: a prerequisite is missing, or a jar isn't the one whose digest is committed.
        Unavailable: a package or a jar couldn't be fetched; the message ends with the tool's own words.
    """
    environments, jars = _missing(settings, names)
    if not environments and not jars:
        return []
    check_prerequisites(settings.cache, maven=jars, gib=sum(SIZE_GIB[n] for n in environments))
    with _lock(settings.cache):
        environments, jars = _missing(settings, names)  # another setup may have made them while this one waited
        if jars:
            _fetch_kafka(settings)
        for name in environments:
            _make(name, settings)
    return [*(["kafka"] if jars else []), *environments]


def _missing(settings: Settings, names: tuple[str, ...]) -> tuple[list[str], bool]:
    environments = [n for n in dict.fromkeys(names) if not (folder(n, settings) / MARKER).is_file()]
    return environments, not (_kafka_folder(settings) / MARKER).is_file()


def _make(name: str, settings: Settings) -> None:
    place = folder(name, settings)
    started = time.monotonic()
    if place.exists():
        _say(name, 0, "was left unfinished; made again")
        shutil.rmtree(place)
    groups = [word for group in GROUPS[name] for word in ("--group", group)]
    command = [uv(settings), "sync", "--project", str(ROOT), "--frozen", "--no-default-groups", *groups, "--python", _system_python()]
    _run(name, command, settings, {"UV_PROJECT_ENVIRONMENT": str(place)})
    _mark(place, {"lock": place.name, "groups": GROUPS[name], "seconds": round(time.monotonic() - started, 1)})
    _say(name, time.monotonic() - started, "ready")


def uv(settings: Settings) -> str:
    """Path of ``uv``: the one on the PATH if it runs, else one in the cache, installed with pip on first use."""
    found = shutil.which("uv")
    # A version manager's shim can be on the PATH and still refuse to run.
    if found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
        return found
    place = settings.cache / f"uv-{UV}"
    if not (place / MARKER).is_file():
        shutil.rmtree(place, ignore_errors=True)
        _run("uv", [_system_python(), "-m", "venv", str(place)], settings, {})
        _run("uv", [str(place / "bin" / "pip"), "install", "--disable-pip-version-check", f"uv=={UV}"], settings, {})
        _mark(place, {"version": UV})
    return str(place / "bin" / "uv")


def _kafka_folder(settings: Settings) -> Path:
    digest = hashlib.sha256(KAFKA_DIGESTS.read_bytes()).hexdigest()[:12]
    return settings.cache / f"kafka-{KAFKA}-{digest}"


def _fetch_kafka(settings: Settings) -> None:
    place = _kafka_folder(settings)
    started = time.monotonic()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    # Maven writes beside the pom it is given, so it gets a copy.
    shutil.copy(FILES / "pom.xml", place / "pom.xml")
    goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={place / 'libs'}"]
    _run("kafka", ["mvn", "-B", "-ntp", "-f", str(place / "pom.xml"), *goal], settings, {})
    verify_jars(place / "libs")
    _mark(place, {"version": KAFKA})
    _say("kafka", time.monotonic() - started, "ready, digests verified")


def verify_jars(libs: Path, digests: Path = KAFKA_DIGESTS) -> None:
    """Compare all jars in ``libs`` with the committed digests; BadInput names the first that differs, lacks or is extra."""
    wanted = {name: digest for digest, name in (line.split() for line in digests.read_text().splitlines())}
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in libs.glob("*.jar")}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise BadInput(
                f"Kafka's jar {name}", value=found.get(name), allowed=f"sha256 {wanted.get(name)}",
                do="empty Maven's local repository and run make setup; if it stays, whoever serves the jars changed them",
            )  # fmt: skip


def _run(name: str, command: list[str], settings: Settings, extra: dict[str, str]) -> None:
    """Run ``command`` with its output in a log, and show the log's last line every few seconds."""
    log = settings.cache / "log" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")}
    done = threading.Event()
    with log.open("wb") as out:
        # The child inherits the setup's lock: when this process is killed, the next setup waits for the child's end.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**clean, **extra}, close_fds=False)
        watcher = threading.Thread(target=_watch, args=(name, log, started, done), daemon=True)
        watcher.start()
        try:
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            done.set()
            watcher.join()
    if code:
        tail = "\n  ".join(log.read_text(errors="replace").strip().splitlines()[-15:])
        thing = f"{name}: {Path(command[0]).name} ended with status {code}"
        raise Unavailable(thing, do=f"see {log}; then run make setup again. Its last words:\n  {tail}")


def _watch(name: str, log: Path, started: float, done: threading.Event) -> None:
    period = 1.0 if sys.stderr.isatty() else 10.0
    while not done.wait(period):
        lines = log.read_text(errors="replace").split("\n")
        _say(name, time.monotonic() - started, next((x.strip() for x in reversed(lines) if x.strip()), "..."), passing=True)


def _say(name: str, seconds: float, text: str, *, passing: bool = False) -> None:
    """One line of progress on stderr; on a terminal a passing one is overwritten by the next."""
    line = f"{name:<12} {seconds:6.1f} s  {text[:90]}"
    if sys.stderr.isatty():
        line = f"\r\x1b[K{line}" + ("" if passing else "\n")
    else:
        line += "\n"
    sys.stderr.write(line)
    sys.stderr.flush()


def _system_python() -> str:
    """The interpreter under a virtual environment, if this is one: a copy of a copy breaks when the first is deleted."""
    return getattr(sys, "_base_executable", None) or sys.executable


def _mark(place: Path, facts: dict[str, object]) -> None:
    (place / (MARKER + ".part")).write_text(json.dumps({**facts, "python": sys.version.split()[0]}) + "\n")
    (place / (MARKER + ".part")).replace(place / MARKER)


@contextlib.contextmanager
def _lock(cache: Path) -> Iterator[None]:
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "setup.lock").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("setup", 0, "waits for another setup on this machine")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: list[str] | None = None) -> int:
    """Command line: ``python3 -m forja.envs [NAME ...]``; prints to stderr, returns the exit status."""
    parser = argparse.ArgumentParser(prog="./forja setup", description="Makes the environments and fetches Kafka's jars.")
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=f"any of {', '.join(GROUPS)}")
    parser.add_argument("--path", metavar="NAME", help="only print where an environment's Python is")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        settings = Settings.from_env()
        if options.path:
            print(python(options.path, settings))
            return 0
        made = setup(settings, tuple(options.names))
    except ForjaError as error:
        sys.stderr.write(f"\n{error}\n")
        return error.exit_code
    _say("setup", time.monotonic() - started, f"made {', '.join(made)}" if made else "nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
