"""Makes an environment inside an image, where ``forja.envs`` looks for it: ``environment.py NAME LOCK``.

The lock is the export with hashes, so pip installs the very packages that ``make setup`` does. A link $FORJA_CACHE/NAME leads
to it, since the folder's own name holds the lock's digest.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "include"))

from forja import envs
from forja.settings import Settings


def main(name: str, lock: str) -> None:
    """Make it; an error of pip's ends the build."""
    settings = Settings.from_env()
    place = envs.folder(name, settings)
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    # The lock names every package: nothing is left to resolve.
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--no-cache-dir", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--require-hashes", "-r", lock], check=True)
    (place / envs.MARKER).write_text(json.dumps({"lock": place.name, "from": lock}) + "\n")
    (settings.cache / name).symlink_to(place)


if __name__ == "__main__":
    main(*sys.argv[1:])
