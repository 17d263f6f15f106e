"""The one place for versions, names and addresses of the test cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass

KUBERNETES = "1.36.3"
ETCD = "3.6.16"
CONTAINERD = "2.2.9"
COREDNS = "1.14.6"
KWOK = "0.8.0"
JOBSET = "0.10.1"
ENVOY_GATEWAY = "1.9.1"
GATEWAY_API = "1.6.1"
ENVOY = "1.40.0"
VERSITYGW = "1.8.0"

NODE = "node1"
NODE_IP = "10.99.0.1"
"""Address of the node, and of everything that runs in its network without being a pod."""
NO_ROUTE = "10.99.0.254"
"""Default route that some components want; nothing is there."""
POD_CIDR, CLUSTER_CIDR, SERVICE_CIDR = "10.244.0.0/24", "10.244.0.0/16", "10.96.0.0/16"
DNS_IP, API_IP = "10.96.0.10", "10.96.0.1"
SIMULATED_NODES = ("gpu-0", "gpu-1")
SIMULATED_CIDR = "10.250.0.0/24"
JOBSET_PORT = 9443
RESOURCES = {"nvidia.com/gpu": 8, "nvidia.com/mig-1g.10gb": 7}
"""What the pretend device plugins of the real node advertise."""

SEARCH = "forja.svc.cluster.local svc.cluster.local cluster.local"
NAME = os.environ.get("FORJA_CLUSTER") or "forja-cluster"
"""Of the cluster on this machine: of its network namespace and its cgroup. Clusters of two names don't see each other."""

APT = {
    "unshare": "util-linux",
    "ip": "iproute2",
    "runc": "runc",
    "nft": "nftables",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ipset": "ipset",
    "busybox": "busybox-static",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "/usr/lib/cni/ptp": "containernetworking-plugins",
}
"""Debian's packages by a program of each."""


@dataclass(frozen=True, kw_only=True)
class Binary:
    """A program that is built from source.

    Args:
        name: of the program.
        module: folder in go/ with its go.mod and go.sum.
        package: Go package to build.
        stamps: variables that the linker sets, for the program's own answer to --version.
    """

    name: str
    module: str
    package: str = "."
    stamps: tuple[tuple[str, str], ...] = ()


_MINOR = KUBERNETES.split(".")[1]
_KUBERNETES = tuple(
    (f"k8s.io/{package}.{name}", value)
    for package in ("component-base/version", "client-go/pkg/version")
    for name, value in (
        ("gitVersion", f"v{KUBERNETES}"), ("gitMajor", "1"), ("gitMinor", _MINOR), ("gitTreeState", "clean"),
        ("buildDate", "2026-01-01T00:00:00Z"),
    )
)  # fmt: skip
_CONTAINERD = (("github.com/containerd/containerd/v2/version.Version", f"v{CONTAINERD}"),)

_COMMANDS = "github.com/containerd/containerd/v2/cmd"

BINARIES = (
    *(
        Binary(name=name, module="k8s", package=f"k8s.io/kubernetes/cmd/{name}", stamps=_KUBERNETES)
        for name in ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl", "kube-proxy")
    ),
    Binary(name="etcd", module="etcd", package="go.etcd.io/etcd/server/v3"),
    *(
        Binary(name=name, module="containerd", package=f"{_COMMANDS}/{name}", stamps=_CONTAINERD)
        for name in ("containerd", "containerd-shim-runc-v2", "ctr")
    ),
    Binary(name="coredns", module="coredns"),
    Binary(name="kwok", module="kwok", package="sigs.k8s.io/kwok/cmd/kwok"),
    Binary(name="netpold", module="netpold"),
    Binary(name="fakegpu", module="fakegpu"),
    Binary(name="pause", module="pause"),
    Binary(name="jobset", module="jobset", package="sigs.k8s.io/jobset"),
    Binary(name="envoy-gateway", module="envoy-gateway", package="github.com/envoyproxy/gateway/cmd/envoy-gateway"),
    Binary(name="versitygw", module="versitygw", package="github.com/versity/versitygw/cmd/versitygw"),
)
