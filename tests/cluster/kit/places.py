"""Where the cluster keeps what: programs and images that stay, state that `down` deletes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cluster.kit import ClusterError
from cluster.kit.versions import NAME

ROOT = Path(__file__).resolve().parents[3]
"""The checkout."""
KIT = Path(__file__).resolve().parent
MARKER = Path("/run") / f"{NAME}.json"
"""Says which state folder belongs to the cluster of this name: there is one at a time on a machine."""
DEFAULT = "forja-cluster"


@dataclass(frozen=True, kw_only=True)
class Places:
    """Folders of the cluster; none is made by reading it.

    Args:
        cache: what survives: bin, images, manifests, Go's caches, containerd's store of images.
    """

    cache: Path

    @property
    def bin(self) -> Path:
        """Programs, each named by a digest of what it was built from."""
        return self.cache / "bin"

    @property
    def images(self) -> Path:
        """OCI archives."""
        return self.cache / "images"

    @property
    def manifests(self) -> Path:
        """Manifests taken out of the sources of their projects."""
        return self.cache / "manifests"

    @property
    def containerd(self) -> Path:
        """Containerd's root: images stay in it from one cluster to the next; `down` deletes that of a cluster with another name."""
        return self.cache / "containerd" if NAME == DEFAULT else self.cache / f"containerd-{NAME}"

    @property
    def state(self) -> Path:
        """The running cluster's own: certificates, logs, etcd, pods' volumes."""
        return self.cache / "run" if NAME == DEFAULT else self.cache / f"run-{NAME}"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.state / "pki" / "admin.kubeconfig"

    @property
    def logs(self) -> Path:
        """One file for each process."""
        return self.state / "log"

    @property
    def resolv(self) -> Path:
        """The resolv.conf that asks CoreDNS."""
        return self.state / "config" / "resolv.conf"


def places() -> Places:
    """The folders, by FORJA_CACHE as everywhere else.

    Raises:
        ClusterError: the cache lies where the node has a file system of its own.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME") or "/root") / ".cache"
    cache = (Path(os.environ.get("FORJA_CACHE") or Path(home) / "forja") / "cluster").absolute()
    if cache.is_relative_to("/run") or cache.is_relative_to("/var/lib/kubelet"):
        raise ClusterError(f"the node can't see {cache}", "set FORJA_CACHE to a folder outside /run")
    return Places(cache=cache)
