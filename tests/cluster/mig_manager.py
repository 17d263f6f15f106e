"""A stand-in for the GPU operator's mig-manager, for simulated nodes: it cuts nothing, it writes what a real one would lead to.

As the real one (mig-parted's cmd/nvidia-mig-manager) it reacts only when the label's value changes, and a label that is removed wakes it
not; it answers pending, pauses the operator's pods by their labels, evicts nobody and fails while a pod holds a GPU. While
gpu-feature-discovery is paused its labels are away, whoever paused it. What it cuts follows
k8s/mig/layouts.yaml. A resource that is gone stays at 0, as the kubelet leaves it. Modes are the ways in which it can be bad.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import kubernetes

from forja import kube as k8s
from forja.mig import drain, layouts
from forja.mig import node as nodes
from forja.mig.node import CONFIG, COUNT, DEPLOY, PAUSED, PRODUCT, STATE, STRATEGY

MODES = ("honest", "slow", "late", "lies", "wedges", "fails", "short")
"""honest. slow: takes SLOW_S. late: says success before the node offers it. lies: says success and changes nothing. wedges: pauses, says
pending, does nothing for ever. fails: says failed. short: leaves one slice out. With `` once`` behind it: the first time only."""

SLOW_S = 2.5


class Manager:
    """Plays mig-manager on one simulated node until it is stopped.

    Args:
        config: kubeconfig file of an identity that may patch nodes and their status.
    """

    def __init__(self, config: Path, node: str, mode: str = "honest") -> None:
        assert mode.removesuffix(" once") in MODES
        self.kube, self.node, self.mode = k8s.connect(config), node, mode
        self.asked: list[str] = []
        """Values that it reacted to."""
        self._config, self._current, self._read = config, "", ""
        self._wake, self._stop = threading.Condition(), threading.Event()
        self._watch, self.sees = kubernetes.watch.Watch(), False
        self._facts: dict[str, str] = {}
        self.error: BaseException | None = None

    def run(self) -> None:
        """Work off what the label asks for."""
        while not self._stop.is_set():
            with self._wake:
                # The real one's own wait: a value that comes back while it works goes unseen.
                if self._read == self._current and not self._wake.wait(0.2):
                    continue
                self._read = value = self._current
            if value:
                self.asked.append(value)
                self._reconfigure(value)

    def watch(self) -> None:
        """Follow the label of the node."""
        client = kubernetes.config.new_client_from_config(str(self._config))
        before: str | None = None
        while not self._stop.is_set():
            events = self._watch.stream(
                kubernetes.client.CoreV1Api(client).list_node, field_selector=f"metadata.name={self.node}", timeout_seconds=2
            )
            for event in events:
                labels = event["object"].metadata.labels or {}
                value = labels.get(CONFIG, "")
                self._discover(labels)
                self.sees = True
                if value != before:
                    first, before = before is None, value
                    with self._wake:
                        self._current = value
                        if first:  # what is in force when it starts is looked at by the real one, and found applied
                            self._read = value
                        elif value:
                            self._wake.notify_all()

    def _discover(self, labels: dict[str, str]) -> None:
        """What gpu-feature-discovery does when it is paused, and when it is let go on."""
        there = {k: v for k, v in labels.items() if k in (PRODUCT, COUNT, STRATEGY)}
        self._facts = self._facts or there
        paused = labels.get(f"{DEPLOY}gpu-feature-discovery") == PAUSED
        if paused and there:
            self._labels(dict.fromkeys(self._facts))
        elif not paused and not there:
            self._labels(self._facts)

    def _reconfigure(self, value: str) -> None:
        mode, _, once = self.mode.partition(" ")
        mode = "honest" if once and len(self.asked) > 1 else mode
        if mode == "lies":
            self._labels({STATE: "success"})
            return
        node = nodes.look(self.kube, self.node)
        known = layouts.load()
        if value not in known:
            self._labels({STATE: "failed"})
            return
        offer = nodes.wanted(node, value, known)
        if node.offers == offer:
            self._labels({STATE: "success"})
            return
        held = {k: PAUSED for k, v in node.deploy.items() if v != "false"}
        self._labels({STATE: "pending", **held})
        if mode == "wedges":
            return
        self._stop.wait(SLOW_S if mode == "slow" else 0.1)
        busy = [p for p in nodes.pods_on(self.kube, self.node) if drain.uses_gpu(p)]
        back = dict.fromkeys(held, "true")
        if mode == "fails" or busy:
            self._labels({STATE: "failed", **back})
            return
        if mode == "late":
            self._labels({STATE: "success", **back})
            self._stop.wait(1.5)
        if mode == "short":
            name = next(iter(offer))
            offer = {**offer, name: offer[name] - 1}
        amounts = {**dict.fromkeys(node.offers, "0"), **{k: str(v) for k, v in offer.items()}}
        self.kube.patch("Node", self.node, {"status": {"capacity": amounts, "allocatable": amounts}}, part="status")
        self._labels({STATE: "success", **back})

    def _labels(self, labels: Mapping[str, str | None]) -> None:
        self.kube.patch("Node", self.node, {"metadata": {"labels": labels}})

    def stop(self) -> None:
        """End its threads."""
        self._stop.set()
        self._watch.stop()

    def guarded(self, work: str) -> None:
        """Run a thread's work; what it dies of is kept, unless it was told to end."""
        try:
            getattr(self, work)()
        except BaseException as error:
            if not self._stop.is_set():
                self.error = error


@contextlib.contextmanager
def managing(config: Path, node: str, mode: str = "honest") -> Iterator[Manager]:
    """The manager at work on a node during the block; an error of its own is the test's."""
    manager = Manager(config, node, mode)
    threads = [threading.Thread(target=manager.guarded, args=(work,), daemon=True) for work in ("watch", "run")]
    for thread in threads:
        thread.start()
    wait_until(lambda: manager.sees or manager.error is not None, "the manager sees the node")
    try:
        yield manager
    finally:
        manager.stop()
        for thread in threads:
            thread.join(15)
        assert manager.error is None, manager.error


def wait_until(ask: object, what: str, seconds: float = 30) -> None:
    """Wait until ``ask()`` is true."""
    assert callable(ask)
    ends = time.monotonic() + seconds
    while not ask():
        assert time.monotonic() < ends, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def simulated_node(name: str) -> k8s.Object:
    """A node of a test's own as kwok plays it: two H100, whole, with the operator's pods at work."""
    from cluster.kit.simulated import nodes as examples

    example = examples()[0]
    deploy = {f"{DEPLOY}{pod}": "true" for pod in ("device-plugin", "gpu-feature-discovery", "dcgm-exporter")} | {f"{DEPLOY}nvsm": "false"}
    labels = {**example["metadata"]["labels"], **deploy, "kubernetes.io/hostname": name, "nvidia.com/gpu.count": "2"}
    amounts = {**example["status"]["allocatable"], "nvidia.com/gpu": "2"}
    return {
        **example, "metadata": {**example["metadata"], "name": name, "labels": labels},
        "status": {"allocatable": amounts, "capacity": dict(amounts)},
    }  # fmt: skip
