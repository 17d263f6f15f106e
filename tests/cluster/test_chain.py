"""The digits recipe, unchanged, on a cluster: every stage a pod, the lake on S3, Triton behind the Gateway API, inside the baseline."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from cluster.platform import Platform
from cluster.releases import apply_traffic, at_rest, secure

from forja import chain, receipts, recipes
from forja.kube import Kube

DIGITS = recipes.load("digits")
NAMESPACE = "forja-vision"
STAGES = {"ingest", "transform", "train", "register", "optimize", "gate", "release"}
MEMOISED = {"transform", "train", "optimize[fp32]", "optimize[fp16]", "optimize[int8]", "gate"}

pytestmark = pytest.mark.timeout(1200)


@dataclass(kw_only=True)
class Seen:
    """Pods of stages that were there at some moment: name to labels and the identity that they run as."""

    pods: dict[str, dict[str, Any]] = field(default_factory=dict)

    def stages(self) -> set[str]:
        return {pod["metadata"]["labels"]["forja/stage"] for pod in self.pods.values()}


class Watcher:
    """Looks for pods of stages twice a second, until the block ends."""

    def __init__(self, kube: Kube) -> None:
        self._kube, self._stop, self.seen = kube, threading.Event(), Seen()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Seen:
        self._thread.start()
        return self.seen

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            found = self._kube.list("Pod", NAMESPACE, labels="forja/recipe=digits,forja/stage")
            self.seen.pods |= {pod["metadata"]["name"]: pod for pod in found}


def run(platform: Platform) -> tuple[dict[str, Any], Seen]:
    """``./forja run digits``: its summary, and the pods that it took."""
    with Watcher(platform.kube) as seen:
        done = platform.forja("run", "digits", "--json", check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.splitlines()[-1]), seen


@pytest.fixture(scope="module")
def first(platform: Platform) -> Iterator[tuple[dict[str, Any], Seen]]:
    """A run from nothing, inside the baseline: no table, no receipt, nothing released."""
    secure(platform.kube, platform.site)
    apply_traffic(platform.kube)
    for path in platform.lake.list("vision/digits"):
        platform.lake.delete(path)
    clean(platform.kube)
    yield run(platform)
    clean(platform.kube)


def clean(kube: Kube) -> None:
    kube.delete("HTTPRoute", "digits", NAMESPACE)
    for found in kube.list("Deployment", NAMESPACE, labels="app.kubernetes.io/managed-by=forja"):
        kube.delete("Deployment", found["metadata"]["name"], NAMESPACE)


def states(summary: dict[str, Any]) -> dict[str, str]:
    return {t["task"]: t["state"] for t in summary["tasks"]}


def test_events_become_a_served_model(platform: Platform, first: tuple[dict[str, Any], Seen]) -> None:
    summary, _ = first
    ingest, *others = states(summary).values()
    assert ingest in ("success", "skipped"), "skipped when Kafka's doorbell was faster than the hand"
    assert set(others) == {"success"}
    assert summary["gate"]["chosen"] == "fp32"
    assert summary["test"]["test_accuracy"] > 0.95
    assert (summary["prediction"]["sample"], summary["prediction"]["answer"]) == ("digit-0001", "1")
    assert summary["release"]["slot"].startswith("digits-")
    assert [d["metadata"]["name"] for d in platform.kube.list("Deployment", NAMESPACE)] == [summary["release"]["slot"]]
    numbers = json.loads(platform.forja("evaluate", "digits", "--json").stdout)
    assert numbers["accuracy"] == pytest.approx(summary["test"]["test_accuracy"], abs=1e-9), "served answers are the evaluated ones"
    print(f"p50 {numbers['p50_ms']} ms, p99 {numbers['p99_ms']} ms through the gateway; the chain took {summary['seconds']} s")


def test_every_stage_was_a_pod_as_its_profile_says(platform: Platform, first: tuple[dict[str, Any], Seen]) -> None:
    _, seen = first
    assert seen.stages() == STAGES
    for pod in seen.pods.values():
        stage, spec = pod["metadata"]["labels"]["forja/stage"], pod["spec"]
        profile = platform.site.profile(getattr(DIGITS.profiles, stage))
        assert spec["serviceAccountName"] == profile.service_account
        assert spec["containers"][0]["image"] == profile.image
        token = any("serviceAccountToken" in str(volume) for volume in spec["volumes"])
        assert token is (stage == "release"), "only the release stage asks the cluster's API something"
        gang = "forja/gang" in pod["metadata"]["labels"]
        assert gang is (stage == "train" and profile.nodes > 1)


def test_it_ran_inside_the_baseline(platform: Platform, first: tuple[dict[str, Any], Seen]) -> None:
    """Its three controls were there and chosen for this namespace; that each of them refuses is test_baseline's matter."""
    namespace = platform.kube.get("Namespace", NAMESPACE)
    assert namespace is not None
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    policies = {p["metadata"]["name"]: p["spec"] for p in platform.kube.list("NetworkPolicy", NAMESPACE)}
    assert policies["forja-default-deny"]["podSelector"] == {}
    quotas = platform.kube.list("ResourceQuota", NAMESPACE)
    assert any("requests.nvidia.com/gpu" in quota["status"].get("hard", {}) for quota in quotas)


def test_again_adopts_everything(platform: Platform, first: tuple[dict[str, Any], Seen]) -> None:
    platform.until("both DAGs to be at rest", lambda: at_rest(platform), 300)
    before = {verb: sum("/receipt" in p for p in platform.lake.list(f"vision/digits/{verb}")) for verb in chain.VERBS}
    live = platform.kube.get("HTTPRoute", "digits", NAMESPACE)
    summary, seen = run(platform)
    assert {t["task"] for t in summary["tasks"] if t["adopted"]} >= MEMOISED
    assert states(summary)["ingest"] == "skipped"
    # What is done takes no pod, but for optimize: whether a result made on other hardware counts is known only on the node.
    assert not seen.stages() & {"transform", "train", "gate"}
    assert {verb: sum("/receipt" in p for p in platform.lake.list(f"vision/digits/{verb}")) for verb in chain.VERBS} == before
    assert summary["receipt"] == first[0]["receipt"]
    assert receipts.load(platform.lake, summary["receipt"]).facts["version"] == first[0]["release"]["version"]
    after = platform.kube.get("HTTPRoute", "digits", NAMESPACE)
    assert live is not None
    assert after is not None
    assert after["spec"] == live["spec"]
