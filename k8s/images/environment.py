"""Makes an environment inside an image: ``environment.py NAME LOCK``. Without arguments it names those that are there.

The lock is the export with hashes, so uv installs the very packages that ``make setup`` does. The first call needs nothing of
Forja: an environment is made again when its lock changes, not when the code does. The second one, with the code in place, makes
the links by which ``forja.envs`` finds it: that folder's name holds the digest of uv.lock.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(os.environ["FORJA_CACHE"])
MARKER = "forja-complete.json"
"""That of ``forja.envs``."""
SECRETS = {"ca.pem": ("PIP_CERT", "SSL_CERT_FILE"), "pip.conf": ("PIP_CONFIG_FILE",), "uv.toml": ("UV_CONFIG_FILE",)}
"""Secrets of a build, each optional, and the variables that lead pip and uv to them: a private index, its certificate. Nothing of
them stays in the image."""


def make(name: str, lock: str) -> None:
    """Make it; an error of uv's ends the build."""
    place = CACHE / name
    secrets = {variable: f"/run/secrets/{file}" for file, names in SECRETS.items() for variable in names}
    env = {**os.environ, **{k: v for k, v in secrets.items() if Path(v).is_file()}}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    # uv itself and what it downloads don't stay. It unpacks on the same disk and links: one copy is all that is ever there.
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "venv", scratch], check=True)
        pip = [f"{scratch}/bin/pip", "install", "--no-cache-dir", "--disable-pip-version-check", "--require-hashes"]
        subprocess.run([*pip, "-r", str(Path(__file__).with_name("uv.txt"))], check=True, env=env)
        uv = [f"{scratch}/bin/uv", "pip", "install", "--python", f"{place}/bin/python", "--system-certs", "--link-mode", "hardlink"]
        # The lock names every package: nothing is left to resolve.
        options = ["--no-cache", "--no-deps", "--compile-bytecode", "--require-hashes"]
        subprocess.run([*uv, *options, "-r", lock], check=True, env=env)
    (place / MARKER).write_text(json.dumps({"from": lock}) + "\n")


def link() -> None:
    """Link the names that ``forja.envs`` looks for; a link to an environment that the image lacks leads nowhere, as it should."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "include"))
    from forja import envs
    from forja.settings import Settings

    for name in envs.NAMES:
        path = envs.folder(name, Settings.from_env())
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(CACHE / name)


if __name__ == "__main__":
    make(*sys.argv[1:]) if sys.argv[1:] else link()
