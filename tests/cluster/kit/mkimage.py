"""Small images made by hand, without a build tool: a folder becomes an OCI archive of one layer.

The big ones, with Python environments in them, are images.py's.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.kit.build import binary
from cluster.kit.places import ROOT, Places
from cluster.kit.versions import ENVOY

BUSYBOX = Path("/bin/busybox")
USERS = "root:x:0:0:root:/:/bin/sh\nforja:x:1000:1000:forja:/tmp:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"
LAYOUT = 2
"""Raise it when this file makes other images out of the same parts."""


def images(places: Places) -> list[Image]:
    """The small images, in the order in which a node needs them."""
    pause, coredns, gateway = (binary(places, n) for n in ("pause", "coredns", "envoy-gateway"))
    envoy = envoy_program()
    python = f"{sys.version} {sys.base_prefix}"
    shell = f"busybox {BUSYBOX.stat().st_size}"
    return [
        Image("pause", "1", pause.name, lambda d: shutil.copy(pause, d / "pause"), entrypoint="/pause"),
        Image("coredns", "1", coredns.name, lambda d: shutil.copy(coredns, d / "coredns"), entrypoint="/coredns"),
        Image("busybox", "1", shell, _busybox),
        Image("python", "3.11", f"{shell} {python}", _python),
        Image("envoy-gateway", "1", f"{shell} {gateway.name} {envoy.stat().st_size}", lambda d: _gateway(d, gateway, envoy)),
    ]


def envoy_program() -> Path:
    """Envoy itself, out of the wheel in the environment `serving`."""
    python = subprocess.run([ROOT / "forja", "setup", "--path", "serving"], capture_output=True, text=True, check=True).stdout.strip()
    return next(Path(python).parents[1].glob("lib/python3.*/site-packages/envoy/_bin/envoy"))


def make(places: Places) -> list[tuple[str, Path]]:
    """Make the archives that aren't there; names of all images with their archives."""
    places.images.mkdir(parents=True, exist_ok=True)
    found = []
    for image in images(places):
        path = places.images / f"{image.name}-{image.digest}.tar"
        if not path.is_file():
            with tempfile.TemporaryDirectory(dir=places.images, prefix=".making-") as scratch:
                root, half = Path(scratch) / "root", Path(scratch) / "archive.tar"
                root.mkdir()
                image.fill(root)
                archive(root, half, image.ref, image.entrypoint)
                half.rename(path)
            for old in places.images.glob(f"{image.name}-{'?' * 12}.tar"):
                if old != path:
                    old.unlink()
        found.append((image.ref, path))
    return found


def archive(root: Path, path: Path, ref: str, entrypoint: str) -> None:
    """Write ``root`` as an OCI archive of one layer, owned by root, without times: equal folders give equal images."""
    layer = path.with_name("layer.tar")
    with tarfile.open(layer, "w") as tar:
        for name in sorted(os.listdir(root)):
            tar.add(root / name, arcname=name, filter=_plain)
    with layer.open("rb") as file:
        diff = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    run: dict[str, object] = {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin:/sbin"], "WorkingDir": "/"}
    run |= {"Entrypoint": [entrypoint]} if entrypoint else {"Cmd": ["/bin/sh"]}
    config = _json(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": run,
            "rootfs": {"type": "layers", "diff_ids": [diff]},
            "history": [{"created_by": "forja's test cluster"}],
        }
    )
    kind = "application/vnd.oci.image"
    layers = [{"mediaType": f"{kind}.layer.v1.tar", "digest": diff, "size": layer.stat().st_size}]
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": f"{kind}.manifest.v1+json",
            "config": {"mediaType": f"{kind}.config.v1+json", **_descriptor(config)},
            "layers": layers,
        }
    )
    named = {
        "mediaType": f"{kind}.manifest.v1+json",
        **_descriptor(manifest),
        "platform": {"architecture": "amd64", "os": "linux"},
        "annotations": {"io.containerd.image.name": ref, "org.opencontainers.image.ref.name": ref.rsplit(":", 1)[-1]},
    }
    index = _json({"schemaVersion": 2, "mediaType": f"{kind}.index.v1+json", "manifests": [named]})
    with tarfile.open(path, "w") as tar:
        blobs = {f"blobs/sha256/{hashlib.sha256(b).hexdigest()}": b for b in (config, manifest)}
        for name, content in {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": index, **blobs}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        tar.add(layer, arcname=f"blobs/sha256/{diff.removeprefix('sha256:')}", filter=_plain)
    layer.unlink()


def _busybox(root: Path) -> None:
    for folder in ("bin", "etc", "tmp", "proc", "sys", "dev", "www"):
        (root / folder).mkdir()
    (root / "tmp").chmod(0o1777)
    shutil.copy(BUSYBOX, root / "bin" / "busybox")
    for applet in subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "etc" / "passwd").write_text(USERS)
    (root / "etc" / "nsswitch.conf").write_text("hosts: files dns\n")


def _python(root: Path) -> None:
    """This interpreter and its standard library, with the shared libraries that they are linked with."""
    _busybox(root)
    program = Path(sys.base_prefix) / "bin" / "python3.11"
    library = Path(sys.base_prefix) / "lib"
    home = root / "opt" / "python"
    unwanted = shutil.ignore_patterns("test", "site-packages", "__pycache__", "config-*", "idlelib", "tkinter", "ensurepip", "turtledemo")
    shutil.copytree(library / "python3.11", home / "lib" / "python3.11", ignore=unwanted, symlinks=True)
    (home / "lib" / "python3.11" / "site-packages").mkdir()
    (home / "bin").mkdir()
    shutil.copy(program, home / "bin" / "python3.11")
    linked = [program, *(home / "lib" / "python3.11" / "lib-dynload").glob("*.so")]
    for needed in sorted({lib for path in linked for lib in _shared(path)}):
        # The loader has to be where the program asks for it; all others where the loader looks.
        place = root / needed.lstrip("/") if "ld-linux" in needed else root / "lib" / "x86_64-linux-gnu" / Path(needed).name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(needed, place)
    # The C library loads these by name when a host name is looked up: nothing is linked with them.
    for name in ("libnss_dns.so.2", "libnss_files.so.2", "libresolv.so.2"):
        if (extra := Path("/lib/x86_64-linux-gnu") / name).is_file():
            shutil.copy(extra, root / "lib" / "x86_64-linux-gnu" / name)
    (root / "usr" / "local" / "bin").mkdir(parents=True)
    for name in ("python3", "python"):
        (root / "usr" / "local" / "bin" / name).symlink_to("/opt/python/bin/python3.11")


def _gateway(root: Path, gateway: Path, envoy: Path) -> None:
    _busybox(root)
    shutil.copy(gateway, root / "bin" / "envoy-gateway")
    program = root / "eg" / "data" / "envoy-versions" / ENVOY / "bin"
    program.mkdir(parents=True)
    shutil.copy(envoy, program / "envoy")
    (program / "envoy").chmod(0o755)
    for needed in _shared(envoy):
        place = root / needed.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(needed, place)


def _shared(path: Path) -> list[str]:
    """Shared libraries that a program is linked with, as ldd finds them."""
    said = subprocess.run(["ldd", path], capture_output=True, text=True).stdout
    return [word for line in said.splitlines() for word in line.split() if word.startswith("/")]


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _descriptor(content: bytes) -> dict[str, object]:
    return {"digest": f"sha256:{hashlib.sha256(content).hexdigest()}", "size": len(content)}


@dataclass(frozen=True)
class Image:
    """A small image.

    Args:
        name: last part of its name, forja.test/NAME.
        tag: of its name.
        made_of: what decides its content, as text.
        fill: writes its files into an empty folder.
        entrypoint: program that it starts; a shell when empty.
    """

    name: str
    tag: str
    made_of: str
    fill: Callable[[Path], object]
    entrypoint: str = ""

    @property
    def ref(self) -> str:
        """Name by which pods ask for it."""
        return f"forja.test/{self.name}:{self.tag}"

    @property
    def digest(self) -> str:
        """12 hex digits of what it is made of."""
        return hashlib.sha256(f"{LAYOUT} {self.ref} {self.made_of}".encode()).hexdigest()[:12]
