"""A release as a Deployment: its manifest, what its pods say, its files. What a cluster makes of it: cluster/test_serving.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forja import recipes
from forja.errors import BadInput, Damaged, ForjaError, Unavailable
from forja.kube import Object
from forja.lake import Lake, sha256
from forja.serving import deployments, fetch, pod_state, repository, triton_pod
from forja.serving.repository import Release
from forja.serving.triton_pod import Marks, Serving
from forja.sites import Gateway

GATEWAY = Gateway(name="models", namespace="forja-gateway", image="s:1", fetch_image="c:1", replicas=2, gpus=1)
SERVING = Serving(
    model="digits", namespace="forja-vision", gateway=GATEWAY, lake="s3://forja/lake", endpoint="http://models", secrets=("forja-lake",)
)
MARKS = Marks(path="vision/digits/release/k/x-release.json", sha256="0" * 64, beside=4)
RELEASE = Release(
    model="digits", version="3", variant="int8", classes=tuple("0123456789"), shape=(1, 8, 8), max_batch=32,
    preprocess=repository.preprocess(recipes.load("digits").dataset), receipts={},
)  # fmt: skip


def containers(deployment: Object) -> Iterator[Object]:
    pod = deployment["spec"]["template"]["spec"]
    yield from (*pod["initContainers"], *pod["containers"])


def test_the_pod_is_restricted_and_bounded() -> None:
    found = triton_pod.deployment(SERVING, RELEASE, MARKS)
    pod = found["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(found):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert all("emptyDir" in volume and volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"])


def test_only_the_container_that_fetches_gets_the_lakes_credentials() -> None:
    fetching, serving = containers(triton_pod.deployment(SERVING, RELEASE, MARKS))
    assert fetching["envFrom"] == [{"secretRef": {"name": "forja-lake"}}]
    assert fetching["command"][-3:] == [MARKS.path, MARKS.sha256, "/repository"]
    assert "envFrom" not in serving
    assert {"name": "repository", "mountPath": "/repository", "readOnly": True} in serving["volumeMounts"]
    assert ("nvidia.com/gpu" in fetching["resources"]["limits"], serving["resources"]["limits"]["nvidia.com/gpu"]) == (False, "1")


def test_connections_drain_before_the_server_ends() -> None:
    pod = triton_pod.deployment(SERVING, RELEASE, MARKS)["spec"]["template"]["spec"]
    drain = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert 0 < drain < pod["terminationGracePeriodSeconds"] - 30, "a request may take 30 s after the drain"


def test_service_and_pods_agree() -> None:
    found, service = triton_pod.deployment(SERVING, RELEASE, MARKS), triton_pod.service(SERVING, RELEASE)
    assert found["metadata"]["name"] == service["metadata"]["name"] == triton_pod.name(SERVING, RELEASE)
    assert service["spec"]["selector"].items() <= found["spec"]["template"]["metadata"]["labels"].items()
    assert found["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]


def test_what_serves_is_part_of_the_backends_name_and_selector() -> None:
    """Another image is another Deployment, whose pods neither the old Service nor the old Deployment finds."""
    for changes in ({"image": "s:2"}, {"fetch_image": "c:2"}, {"cpus": 3.0}, {"gpus": 0}):
        other = dataclasses.replace(SERVING, gateway=dataclasses.replace(GATEWAY, **changes))  # type: ignore[arg-type]
        assert triton_pod.name(other, RELEASE) != triton_pod.name(SERVING, RELEASE)
        assert triton_pod.selector(other, RELEASE) != triton_pod.selector(SERVING, RELEASE)
    more = dataclasses.replace(SERVING, gateway=dataclasses.replace(GATEWAY, replicas=5))
    assert triton_pod.name(more, RELEASE) == triton_pod.name(SERVING, RELEASE), "more of the same pods need no new proof"
    named = triton_pod.deployment(SERVING, RELEASE, dataclasses.replace(MARKS, again="5", path="elsewhere"))["metadata"]["name"]
    assert named == triton_pod.name(SERVING, RELEASE)


def test_pods_are_kept_apart_and_not_all_taken_at_once() -> None:
    found, budget = triton_pod.deployment(SERVING, RELEASE, MARKS), triton_pod.budget(SERVING, RELEASE)
    (apart,) = found["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert (apart["topologyKey"], apart["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    assert apart["labelSelector"] == found["spec"]["selector"] == budget["spec"]["selector"]
    assert budget["spec"]["maxUnavailable"] == 1


def test_pods_of_the_newest_template() -> None:
    found = triton_pod.deployment(SERVING, RELEASE, dataclasses.replace(MARKS, again="5"))
    notes = found["spec"]["template"]["metadata"]["annotations"]
    pods = [{"metadata": {"annotations": a}} for a in ({**notes, "a.webhook/said": "x"}, {**notes, triton_pod.AGAIN: "4"}, None)]
    assert triton_pod.newest(found, pods) == pods[:1]


def test_marks_are_read_back_and_only_again_makes_new_pods() -> None:
    def pods(marks: Marks) -> Any:
        return triton_pod.deployment(SERVING, RELEASE, marks)["spec"]["template"]

    again = dataclasses.replace(MARKS, again="5")
    for marks in (MARKS, again):
        assert triton_pod.marks(triton_pod.deployment(SERVING, RELEASE, marks)) == marks
    assert pods(dataclasses.replace(MARKS, beside=9)) == pods(MARKS)
    assert pods(again) != pods(MARKS)
    with pytest.raises(KeyError):
        triton_pod.marks({"metadata": {"annotations": {}}, "spec": {"template": {"metadata": {}}}})


def deployment(*conditions: Object, generation: int = 1, seen: int = 1, **counts: int) -> Object:
    status = {"observedGeneration": seen, "conditions": list(conditions), **counts}
    return {"metadata": {"name": "d", "generation": generation}, "spec": {"replicas": 2}, "status": status}


ROLLED: dict[str, tuple[Object, bool]] = {
    "all of the newest": (deployment(replicas=2, updatedReplicas=2, availableReplicas=2), True),
    "nothing yet": (deployment(), False),
    "an old pod is there": (deployment(replicas=3, updatedReplicas=2, availableReplicas=3), False),
    "one is not ready": (deployment(replicas=2, updatedReplicas=2, availableReplicas=1), False),
    "not looked at": (deployment(generation=2, replicas=2, updatedReplicas=2, availableReplicas=2), False),
}


@pytest.mark.parametrize("case", ROLLED)
def test_rolled_out(case: str) -> None:
    found, done = ROLLED[case]
    assert deployments._rolled_out(found) is done


def pod(state: Object, *, name: str = "triton", last: Object | None = None) -> Object:
    kind = "initContainerStatuses" if name == "fetch" else "containerStatuses"
    return {"metadata": {"name": "p"}, "status": {kind: [{"name": name, "state": state, "lastState": last or {}}]}}


def ended(code: int, message: str = "") -> Object:
    return {"terminated": {"exitCode": code, "reason": "Error", "message": message}}


WAITING = {"waiting": {"reason": "CrashLoopBackOff"}}
QUOTA = {"type": "ReplicaFailure", "status": "True", "message": 'pods "d-1" is forbidden: exceeded quota: forja-gpu'}
FAILURES: dict[str, tuple[Object, list[Object], type[ForjaError] | None, str]] = {
    "starting": (deployment(), [pod({"waiting": {"reason": "ContainerCreating"}})], None, ""),
    "running": (deployment(), [pod({"running": {}}, last=ended(137))], None, ""),
    "no such registry": (deployment(), [pod({"waiting": {"reason": "ErrImagePull", "message": "no host"}})], Unavailable, "no host"),
    "no such image": (deployment(), [pod({"waiting": {"reason": "ImagePullBackOff", "message": "not found"}})], Unavailable, "not found"),
    "no such secret": (deployment(), [pod({"waiting": {"reason": "CreateContainerConfigError"}}, name="fetch")], Unavailable, "fetch"),
    "quota": (deployment(QUOTA), [], Unavailable, "exceeded quota"),
    "making a pod failed otherwise": (deployment({**QUOTA, "message": "etcd timed out"}), [], None, ""),
    "damaged release": (deployment(), [pod(ended(6, "Damaged: object x"), name="fetch")], Damaged, "object x"),
    "bad credentials": (deployment(), [pod(WAITING, name="fetch", last=ended(2, "BadInput: refuses"))], BadInput, "refuses"),
    "the lake is away": (deployment(), [pod(ended(5), name="fetch")], None, ""),
    "fetched": (deployment(), [pod(ended(0), name="fetch")], None, ""),
    "server crashes": (deployment(), [pod(WAITING, last=ended(139, "signal 11"))], Unavailable, "signal 11"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_when_waiting_is_useless(case: str) -> None:
    found, pods, kind, word = FAILURES[case]
    error = pod_state.failure(found, pods)
    assert type(error) is (kind or type(None))
    assert word in str(error)


def test_what_is_waited_for() -> None:
    unscheduled = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: Insufficient nvidia.com/gpu"}
    assert "Insufficient nvidia.com/gpu" in pod_state.pending([{"metadata": {"name": "p"}, "status": {"conditions": [unscheduled]}}])
    assert "ContainerCreating" in pod_state.pending([pod({"waiting": {"reason": "ContainerCreating"}})])
    assert pod_state.pending([]) == "no pod yet"


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))


def stored(lake: Lake, **changes: Any) -> tuple[Release, str, str]:
    """A release in the lake, the path of its release.json, and that file's digest."""
    contents = repository.files(RELEASE, b"model")
    objects = {name: f"vision/digits/release/k/{name.rpartition('/')[2]}" for name in contents}
    release = dataclasses.replace(repository.sealed(RELEASE, contents), objects=objects, **changes)
    for name, data in contents.items():
        lake.replace(objects[name], data)
    body = repository.to_json(release)
    lake.replace("vision/digits/release/k/release.json", body)
    return release, "vision/digits/release/k/release.json", sha256(body)


def test_fetch_brings_what_was_proven(lake: Lake, tmp_path: Path) -> None:
    release, path, digest = stored(lake)
    assert fetch.fetch(lake, path, digest, tmp_path) == release
    model = tmp_path / "digits"
    assert (model / "3" / "model.onnx").read_bytes() == b"model"
    assert sorted(p.name for p in model.iterdir()) == ["3", "config.pbtxt", "labels.txt", "release.json"]
    assert repository.parse((model / "release.json").read_bytes(), "", "a pod") == release


def test_fetch_refuses_another_byte(lake: Lake, tmp_path: Path) -> None:
    _, path, digest = stored(lake)
    lake.replace("vision/digits/release/k/model.onnx", b"other")
    with pytest.raises(Damaged, match=r"model\.onnx"):
        fetch.fetch(lake, path, digest, tmp_path)
    lake.delete("vision/digits/release/k/model.onnx")
    with pytest.raises(Damaged, match=r"model\.onnx"):
        fetch.fetch(lake, path, digest, tmp_path)
    with pytest.raises(Damaged, match="SHA-256"):
        fetch.fetch(lake, path, "0" * 64, tmp_path)


def test_fetch_wants_every_file(lake: Lake, tmp_path: Path) -> None:
    release, path, _ = stored(lake)
    body = repository.to_json(dataclasses.replace(release, objects={}))
    lake.replace(path, body)
    with pytest.raises(Damaged, match="files in the lake"):
        fetch.fetch(lake, path, sha256(body), tmp_path)


@pytest.mark.parametrize(("arguments", "status", "word"), [([], 2, "PATH SHA256 FOLDER"), (["nowhere", "0", "folder"], 6, "nowhere")])
def test_fetch_as_a_command(
    arguments: list[str], status: int, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORJA_LAKE", str(tmp_path))
    assert fetch.main(arguments) == status
    assert word in capsys.readouterr().err
