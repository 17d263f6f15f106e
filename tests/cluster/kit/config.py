"""Configuration files of the node and the command line of each process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cluster.kit import versions as v
from cluster.kit.build import binary
from cluster.kit.node import SOCKET
from cluster.kit.places import Places

CGROUPS = Path("/sys/fs/cgroup")
UNIFIED = (CGROUPS / "cgroup.controllers").is_file()
"""Whether the machine has cgroup v2 alone."""

RUNC = ("/usr/sbin/runc", "/usr/bin/runc", "/usr/local/sbin/runc")

ETCD = "http://127.0.0.1:2379"


def write(places: Places) -> None:
    """Write all files that the processes read, certificates aside."""
    folder = places.state / "config"
    (folder / "cni").mkdir(parents=True, exist_ok=True)
    (folder / "cni" / "10-pods.conflist").write_text(json.dumps(network()))
    (folder / "containerd.toml").write_text(containerd(places))
    (folder / "containerd-store.toml").write_text(containerd(places, pods=False))
    (folder / "kubelet.json").write_text(json.dumps(kubelet(places)))
    (folder / "kube-proxy.json").write_text(json.dumps(proxy(places)))
    (folder / "jobset.json").write_text(json.dumps(jobset(places)))
    (folder / "empty.conf").touch()  # pods with dnsPolicy Default, such as CoreDNS itself, ask nobody
    places.resolv.write_text(f"nameserver {v.DNS_IP}\nsearch {v.SEARCH}\noptions ndots:5\n")


def network() -> dict[str, Any]:
    """CNI: each pod has a routed link of its own, so that policies can be enforced where packets are forwarded."""
    pool = {"type": "host-local", "dataDir": "/var/lib/cni", "ranges": [[{"subnet": v.POD_CIDR}]], "routes": [{"dst": "0.0.0.0/0"}]}
    link = {"type": "ptp", "ipMasq": False, "ipam": pool}
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": [link, {"type": "portmap", "capabilities": {"portMappings": True}}]}


def containerd(places: Places, *, pods: bool = True) -> str:
    """Containerd with its store of images in the cache. With ``pods`` false only the store: what the last node left is cleared so."""
    runc = next((path for path in RUNC if Path(path).is_file()), "runc")
    unused = [f"io.containerd.snapshotter.v1.{name}" for name in ("btrfs", "zfs", "devmapper", "blockfile", "erofs")]
    unused += ["io.containerd.tracing.processor.v1.otlp", "io.containerd.nri.v1.nri"]
    if not pods:
        unused += [
            f"io.containerd.{name}" for name in ("grpc.v1.cri", "cri.v1.images", "cri.v1.runtime", "podsandbox.controller.v1.podsandbox")
        ]
    return f"""version = 3
root = "{places.containerd}"
state = "/run/containerd"
disabled_plugins = {json.dumps(unused)}
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "forja.test/pause:1"
[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  enable_selinux = false
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      runtime_path = "{binary(places, "containerd-shim-runc-v2")}"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        BinaryName = "{runc}"
        SystemdCgroup = false
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "{places.state}/config/cni"
"""


def kubelet(places: Places) -> dict[str, Any]:
    """The kubelet's: pods in a cgroup of the cluster's own, nothing evicted or collected before the disk is all but full."""
    pki = places.state / "pki"
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{v.NAME}",
        "containerRuntimeEndpoint": f"unix://{SOCKET}",
        "address": v.NODE_IP,
        "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True}, "x509": {"clientCAFile": f"{pki}/ca.crt"}},
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{pki}/kubelet-server.crt",
        "tlsPrivateKeyFile": f"{pki}/kubelet-server.key",
        "clusterDomain": "cluster.local",
        "clusterDNS": [v.DNS_IP],
        "resolvConf": f"{places.state}/config/empty.conf",
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "maxOpenFiles": 20000,
        "volumePluginDir": f"{places.state}/volume-plugins",
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%"},
    }


def proxy(places: Places) -> dict[str, Any]:
    """kube-proxy's; settings of conntrack are the whole machine's and stay as they are."""
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "hostnameOverride": v.NODE,
        "clientConnection": {"kubeconfig": f"{places.state}/pki/proxy.kubeconfig"},
        "clusterCIDR": v.CLUSTER_CIDR,
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "oomScoreAdj": 0,
    }


def jobset(places: Places) -> dict[str, Any]:
    """The JobSet controller's."""
    return {
        "apiVersion": "config.jobset.x-k8s.io/v1alpha1",
        "kind": "Configuration",
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
        "webhook": {"port": v.JOBSET_PORT, "certDir": f"{places.state}/pki/jobset"},
        "health": {"healthProbeBindAddress": "127.0.0.1:18081"},
        "metrics": {"bindAddress": "0"},
    }


def commands(places: Places) -> dict[str, list[str]]:
    """Command line of each process by its name."""
    pki, config = places.state / "pki", places.state / "config"
    admin = f"--kubeconfig={pki}/admin.kubeconfig"
    made: dict[str, list[str]] = {
        "etcd": [
            f"--data-dir={places.state}/etcd", f"--listen-client-urls={ETCD}", f"--advertise-client-urls={ETCD}",
            "--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
            "--initial-cluster=default=http://127.0.0.1:2380", "--unsafe-no-fsync",
        ],
        "kube-apiserver": _api_server(pki),
        "kube-controller-manager": [
            *_kubeconfigs(f"{pki}/controller-manager.kubeconfig"), f"--service-account-private-key-file={pki}/sa.key",
            f"--root-ca-file={pki}/ca.crt", f"--cluster-signing-cert-file={pki}/ca.crt", f"--cluster-signing-key-file={pki}/ca.key",
            "--use-service-account-credentials=true", "--allocate-node-cidrs=false",
            f"--service-cluster-ip-range={v.SERVICE_CIDR}", "--leader-elect=false", "--bind-address=127.0.0.1",
            f"--flex-volume-plugin-dir={places.state}/volume-plugins",
        ],
        "kube-scheduler": [*_kubeconfigs(f"{pki}/scheduler.kubeconfig"), "--leader-elect=false", "--bind-address=127.0.0.1"],
        "kube-proxy": [f"--config={config}/kube-proxy.json", "--v=2"],
        "containerd": ["-c", f"{config}/containerd.toml"],
        "kubelet": [
            f"--config={config}/kubelet.json", f"--kubeconfig={pki}/kubelet.kubeconfig", f"--hostname-override={v.NODE}",
            f"--node-ip={v.NODE_IP}", f"--cert-dir={pki}", "--v=2",
        ],
        "netpold": [admin, f"--node={v.NODE}"],
        "kwok": [
            f"--config={places.manifests}/kwok-stages.yaml", admin, "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
            "--node-lease-duration-seconds=40", f"--cidr={v.SIMULATED_CIDR}", f"--node-ip={v.NODE_IP}", "--node-name=kwok-controller",
        ],
        "jobset": [f"--kubeconfig={pki}/jobset.kubeconfig", f"--config={config}/jobset.json"],
    }  # fmt: skip
    whole = {name: [str(binary(places, name)), *arguments] for name, arguments in made.items()}
    for resource, count in v.RESOURCES.items():
        whole[plugin(resource)] = [str(binary(places, "fakegpu")), f"--resource={resource}", f"--n={count}"]
    return whole


def plugin(resource: str) -> str:
    """Name of the process that advertises a resource, for example device-plugin-gpu."""
    return f"device-plugin-{resource.rpartition('/')[2]}"


def cgroups() -> list[Path]:
    """The folders of the cluster's own cgroup: one, or with cgroup v1 one for each controller."""
    if UNIFIED:
        return [CGROUPS / v.NAME]
    return [path / v.NAME for path in sorted(CGROUPS.iterdir()) if path.is_dir() and not path.is_symlink()]


def make_cgroups() -> None:
    """Make the cluster's cgroup, in which the kubelet puts all pods."""
    for folder in cgroups():
        folder.mkdir(exist_ok=True)
        for name in ("cpuset.cpus", "cpuset.mems"):
            if not UNIFIED and (folder / name).is_file():
                (folder / name).write_text((folder.parent / name).read_text())
    if UNIFIED:
        has = (CGROUPS / "cgroup.controllers").read_text().split()
        for folder in (CGROUPS, CGROUPS / v.NAME):
            (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in has))


def remove_cgroups() -> None:
    """Remove the cluster's cgroups, deepest first; those with processes in them stay."""
    for folder in cgroups():
        for path, _, _ in os.walk(folder, topdown=False):
            try:
                os.rmdir(path)
            except OSError:
                continue


def _kubeconfigs(path: str) -> list[str]:
    return [f"--{use}={path}" for use in ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")]


def _api_server(pki: Path) -> list[str]:
    return [
        f"--advertise-address={v.NODE_IP}", "--bind-address=0.0.0.0", "--secure-port=6443", f"--etcd-servers={ETCD}",
        "--allow-privileged=true", "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
        f"--client-ca-file={pki}/ca.crt", f"--tls-cert-file={pki}/apiserver.crt", f"--tls-private-key-file={pki}/apiserver.key",
        f"--kubelet-client-certificate={pki}/apiserver-kubelet-client.crt",
        f"--kubelet-client-key={pki}/apiserver-kubelet-client.key",
        f"--kubelet-certificate-authority={pki}/ca.crt", "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={pki}/sa.pub", f"--service-account-signing-key-file={pki}/sa.key",
        f"--requestheader-client-ca-file={pki}/front-proxy-ca.crt", "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-username-headers=X-Remote-User", f"--proxy-client-cert-file={pki}/front-proxy-client.crt",
        f"--proxy-client-key-file={pki}/front-proxy-client.key", f"--service-cluster-ip-range={v.SERVICE_CIDR}", "--event-ttl=2h",
    ]  # fmt: skip
