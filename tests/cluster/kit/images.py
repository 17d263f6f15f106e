"""The images with Python environments: built by buildah from k8s/images/Dockerfile, then brought into the node's containerd.

Nothing is made twice. buildah keeps every step and makes one again only when what it was made of has changed: an environment when its
lock, environment.py or the base has, the code's layer when the code has. containerd gets only layers that it lacks.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.kit import ClusterError
from cluster.kit.image_archive import Held, drop_nameless, exported, held, send, share
from cluster.kit.image_base import base, buildah, identity
from cluster.kit.node import Node
from cluster.kit.places import ROOT, Places

VERSION = "0.1.0"
DISK_GB = {"control": 6, "serving": 3, "ml": 26}
"""The most that each takes at once the first time: in buildah's store, on the way, and twice in containerd (packed, unpacked)."""
TARGETS = tuple(DISK_GB)


def main(names: Sequence[str]) -> int:
    """Command line: ``images [NAME ...]``; all of them when none is named. Prints what was done to each, with seconds and sizes.

    Raises:
        ClusterError: an unknown name, too little disk, or a step that failed.
    """
    if unknown := set(names) - set(TARGETS):
        raise ClusterError(f"no image {', '.join(sorted(unknown))}", f"name any of {', '.join(TARGETS)}")
    node = Node()
    for name in names or TARGETS:
        print(ensure(node, name).line(), flush=True)
    return 0


def ensure(node: Node, name: str) -> Report:
    """Build an image if something has changed, and bring it into containerd when the cluster is up."""
    report = Report(name=name)
    with _alone(node.places):
        before = identity(node.places, ref(name))
        build(node.places, name, report)
        after = identity(node.places, ref(name))
        report.verdict = report.verdict or ("unchanged" if after == before else "code layer only")
        if node.first():
            load(node, name, report)
        else:
            report.notes.append("the cluster isn't up: not imported")
    return report


def ref(name: str) -> str:
    """Name by which pods ask for the image."""
    return f"docker.io/forja/{name}:{VERSION}"


def build(places: Places, name: str, report: Report) -> None:
    """Build target ``name`` of the Dockerfile. ``report.verdict`` becomes "built" if that took a new environment."""
    with report.timed("base"):
        start = base(places)
    environment = f"localhost/forja/{name}-environment:{VERSION}"
    before = identity(places, environment)
    if not before and (free := shutil.disk_usage(places.cache).free / 1e9) < DISK_GB[name]:
        raise ClusterError(f"image {name} takes up to {DISK_GB[name]} GB of disk under {places.cache}: {free:.0f} GB are free")
    # The environment has a name of its own, so that it stays when the image around it is made again.
    with report.timed("environment"):
        _build(places, start, f"{name}-environment", environment)
    if identity(places, environment) != before:
        report.verdict = "built"
    with report.timed("code"):
        _build(places, start, name, ref(name))
        buildah(places, "rmi", "--prune")


def load(node: Node, name: str, report: Report) -> None:
    """Bring an image into containerd, unless the very same one is there."""
    wanted, have = identity(node.places, ref(name)), held(node)
    if have.images.get(ref(name)) == wanted:
        return
    if report.verdict == "unchanged":
        report.verdict = "imported"
    _send(node, name, wanted, have, report)


def _send(node: Node, name: str, wanted: str, have: Held, report: Report) -> None:
    began = time.monotonic()
    with exported(node, ref(name), wanted, have) as export:
        report.seconds["export"] = time.monotonic() - began
        with report.timed("import"):
            send(node, export)
        report.notes.append(f"{export.size / 1e6:.0f} MB in {len(export.fresh)} new layers")
    drop_nameless(node)
    if report.verdict != "code layer only":
        with report.timed("share"):
            share(node.places, name)


def _build(places: Places, start: str, target: str, tag: str) -> None:
    folder = ROOT / "k8s" / "images"
    where = ("--isolation", "chroot", "--network", "host", "--pull-never")
    what = ("--build-arg", f"BASE={start}", "--target", target, "--tag", tag)
    files = ("--file", folder / "Dockerfile", "--ignorefile", folder / "Dockerfile.dockerignore")
    buildah(places, "build", "--layers", "--format", "oci", *where, *_secrets(), *what, *files, ROOT)


def _secrets() -> Iterator[str]:
    """What pip and uv of this machine are set up with, for the build alone: certificates, and a private index if there is one."""
    home = Path.home() / ".config"
    candidates = {
        "ca.pem": (os.environ.get("SSL_CERT_FILE"), "/etc/ssl/certs/ca-certificates.crt"),
        "pip.conf": (os.environ.get("PIP_CONFIG_FILE"), home / "pip" / "pip.conf", "/etc/pip.conf"),
        "uv.toml": (os.environ.get("UV_CONFIG_FILE"), home / "uv" / "uv.toml", "/etc/uv/uv.toml"),
    }
    for name, paths in candidates.items():
        if path := next((p for p in paths if p and Path(p).is_file()), None):
            yield from ("--secret", f"id={name},src={path}")


@contextmanager
def _alone(places: Places) -> Iterator[None]:
    """One build at a time on this machine."""
    places.images.mkdir(parents=True, exist_ok=True)
    with (places.images / "build.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(kw_only=True)
class Report:
    """What was done to an image."""

    name: str
    verdict: str = ""
    """built, code layer only, imported or unchanged."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By step: base, environment, code, export, import, share."""
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Measure a step."""
        began = time.monotonic()
        yield
        self.seconds[step] = time.monotonic() - began

    def line(self) -> str:
        """One line for people."""
        steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in self.seconds.items())
        return f"image {self.name:8} {self.verdict:16} {'; '.join([steps, *self.notes])}"
