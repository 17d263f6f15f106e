"""What an image is like from the inside, as one line of JSON: ``python -c "$(cat image_probe.py)" MODULE...`` in a pod of it.

It also looks into a folder that it has filled with what must not be in an image, so that an empty answer says something.
"""

import importlib
import json
import os
import re
import stat
import sys
import time
from pathlib import Path

TOOLS = ("pip.conf", "uv.toml", ".netrc", ".pypirc", "ca.pem")
"""Files by which pip and uv are told of indexes, passwords and certificates."""
BUNDLE, AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt"), Path("/usr/share/ca-certificates")
PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


def found(folder: str) -> dict[str, list[str]]:
    """Files under a folder, on its own file system, that give rights away or tell of the build."""
    device, setuid, tools = os.lstat(folder).st_dev, [], []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if os.lstat(f"{place}/{name}").st_dev == device]
        for path in (f"{place}/{name}" for name in files):
            mode = os.lstat(path).st_mode
            if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
                setuid.append(path)
            if path.endswith(TOOLS):
                tools.append(path)
    return {"setuid": setuid, "tools": tools}


def strangers(bundle: bytes, known: bytes) -> int:
    """Certificates of a bundle that the distribution doesn't ship."""
    return len(set(PEM.findall(bundle)) - set(PEM.findall(known)))


def writable() -> list[str]:
    """Folders of the root file system in which a file can be made."""
    able = []
    for folder in ("/", "/opt/forja", "/opt/forja-cache", "/var/lib/forja", "/home/forja", "/etc", "/tmp"):  # noqa: S108
        try:
            path = Path(folder, f"probe-{os.getpid()}")
            path.touch()
            path.unlink()
            able.append(folder)
        except OSError:
            pass
    return able


def named() -> dict[str, bool]:
    """Files and folders of the project that its code names, and whether they are there. The state's folder never is."""
    from forja.settings import ROOT

    sources = [p.read_text() for part in ("include", "plugins") for p in (ROOT / part).rglob("*.py")]
    paths = {"/".join(re.findall(r'"([^"]+)"', words)) for text in sources for words in re.findall(r'ROOT((?: / "[^"]+")+)', text)}
    return {path: (ROOT / path).exists() for path in sorted(paths - {".forja"})}


def planted() -> dict[str, list[str]]:
    """What ``found`` says of a folder that has one of each."""
    folder = Path("/tmp/planted")  # noqa: S108
    folder.mkdir()
    (folder / "pip.conf").touch()
    (folder / "tool").touch()
    (folder / "tool").chmod(0o4755)
    return found(str(folder))


def main(modules: list[str]) -> None:
    """Print it all."""
    from forja import envs, keys, stages
    from forja.recipes.base import STAGES
    from forja.settings import Settings

    known = b"".join(p.read_bytes() for p in AUTHORITIES.rglob("*.crt"))
    environments = [name for name in envs.NAMES if (envs.folder(name, Settings.from_env()) / envs.MARKER).is_file()]
    facts: dict[str, object] = {
        "user": [os.getuid(), os.getgid()], "writable": writable(), "root": found("/"), "planted": planted(), "environments": environments,
        "named": named(),
        "strangers": strangers(BUNDLE.read_bytes(), known), "a_stranger": strangers(BUNDLE.read_bytes(), b""),
        "secrets": sorted(os.listdir("/run/secrets")) if Path("/run/secrets").is_dir() else [],
        "code": {v: keys.code_digest(f"forja.stages.{v}", stages.load(v).STAGE.environment) for v in STAGES},
    }  # fmt: skip
    seconds = {}
    for name in modules:
        began = time.monotonic()
        importlib.import_module(name)
        seconds[name] = round(time.monotonic() - began, 1)
    print(json.dumps({**facts, "seconds": seconds, "prefix": sys.prefix}))


if __name__ == "__main__":
    main(sys.argv[1:])
