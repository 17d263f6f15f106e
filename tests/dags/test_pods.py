"""The pod of a stage, built from the cluster's site file without a cluster."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from forja import recipes
from forja.errors import BadInput
from forja.lake import Lake
from forja.profiles import Profile
from forja.receipts import Receipt
from forja.recipes.base import STAGES
from forja.sites import load_site
from forja.stages.base import Stage
from forja_airflow import runs
from forja_airflow.pods import create as podcreate
from forja_airflow.pods.operator import PodStageOperator
from forja_airflow.pods.spec import pod

SITE = load_site("cluster")
RECIPE = recipes.load("digits")


def operator(profile: Profile, verb: str = "train") -> PodStageOperator:
    arguments = pod(profile, site=SITE, recipe=RECIPE, verb=verb)
    op = PodStageOperator(task_id=verb, verb=verb, recipe="digits", **arguments)
    op.arm([verb, "--recipe", "digits", "--in", "dataset=a/b", "--code", "0" * 64], "f" * 32)
    return op


def build(profile: Profile, verb: str = "train") -> Any:
    from airflow.providers.cncf.kubernetes.kubernetes_helper_functions import POD_NAME_MAX_LENGTH
    from kubernetes.client import ApiClient

    built = ApiClient().sanitize_for_serialization(operator(profile, verb).build_pod_request_obj(dry_run=True))
    assert len(built["metadata"]["name"]) <= POD_NAME_MAX_LENGTH
    return built


@pytest.mark.parametrize("verb", STAGES)
def test_pod_is_restricted(verb: str) -> None:
    """What the Pod Security Standard `restricted` asks, and more: https://kubernetes.io/docs/concepts/security/pod-security-standards/"""
    profile = SITE.profile(getattr(RECIPE.profiles, verb))
    built = build(profile, verb)
    spec = built["spec"]
    (container,) = spec["containers"]  # no sidecar
    assert spec["restartPolicy"] == "Never"
    # Only release asks the cluster's API something.
    assert spec["automountServiceAccountToken"] is (verb == "release")
    assert spec["serviceAccountName"] == ("forja-release" if verb == "release" else "forja-stage")
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not spec.get("hostNetwork")
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "privileged": False, "readOnlyRootFilesystem": True,
    }  # fmt: skip
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert container["image"] == profile.image
    assert container["command"] == ["python", "-m", "forja.stages"]
    assert container["args"][:3] == [verb, "--recipe", "digits"]
    assert container["envFrom"] == [{"secretRef": {"name": "forja-lake"}}]
    assert {e["name"]: e.get("value") for e in container["env"]}["FORJA_SITE"] == "cluster"
    assert all("valueFrom" not in e for e in container["env"])
    assert {m["mountPath"] for m in container["volumeMounts"]} >= {"/tmp", "/var/cache/forja"}  # noqa: S108
    assert all(set(v) == {"name", "emptyDir"} and v["emptyDir"]["sizeLimit"] for v in spec["volumes"])
    labels = built["metadata"]["labels"]
    assert (labels["forja/recipe"], labels["forja/stage"], labels["forja/key"]) == ("digits", verb, "f" * 32)
    assert spec["activeDeadlineSeconds"] == 600 + profile.run_timeout_s


def test_a_recipe_whose_name_is_no_label_is_refused() -> None:
    with pytest.raises(BadInput, match="got 'digits_'; allowed: a letter or a digit at its end"):
        pod(SITE.profile("etl"), site=SITE, recipe=dataclasses.replace(RECIPE, name="digits_"), verb="transform")


def test_training_gets_its_gpu() -> None:
    built = build(SITE.profile("training"))
    spec = built["spec"]
    assert spec["containers"][0]["resources"]["limits"] == {
        "cpu": "8000m", "memory": "32768Mi", "ephemeral-storage": "51200Mi", "nvidia.com/gpu": "1",
    }  # fmt: skip
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert spec["priorityClassName"] == "forja-training"
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8192Mi"}} in spec["volumes"]


def test_a_slice_instead_of_a_gpu() -> None:
    profile = dataclasses.replace(SITE.profile("training"), gpus=0, mig="1g.10gb", node_selector={"pool": "a100"})
    spec = build(profile)["spec"]
    limits = spec["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/mig-1g.10gb"] == "1"
    assert "nvidia.com/gpu" not in limits
    assert spec["nodeSelector"] == {"pool": "a100"}


def test_operator_neither_blocks_a_slot_nor_logs_the_spec() -> None:
    op = operator(SITE.profile("training"))
    assert op.deferrable
    assert not op.do_xcom_push
    assert not op.log_pod_spec_on_failure
    assert not op.log_events_on_startup  # it would list the namespace's events at each look
    assert op.schedule_timeout_seconds == 21600
    assert op.execution_timeout.total_seconds() == 21600 + 600 + 86400


def lakes(op: PodStageOperator) -> list[str]:
    (container,) = op.build_pod_request_obj(dry_run=True).spec.containers
    return [v.value for v in container.env if v.name == "FORJA_LAKE"]


def test_pods_use_the_lake_of_their_task() -> None:
    op = operator(SITE.profile("training"))
    op.agree("s3://forja/lake/")
    assert lakes(op) == ["s3://forja/lake/"]
    with pytest.raises(AirflowFailException, match=r"got 's3://forja/lake'; allowed: s3://other/lake.*connection forja_lake"):
        operator(SITE.profile("training")).agree("s3://other/lake")


def test_a_site_without_a_lake_gets_the_tasks() -> None:
    profile = SITE.profile("training")
    profile = dataclasses.replace(profile, env={k: v for k, v in profile.env.items() if k != "FORJA_LAKE"})
    op = operator(profile)
    op.agree("s3://other/lake")
    assert lakes(op) == ["s3://other/lake"]
    with pytest.raises(AirflowFailException, match="lake for stages in pods: got '/var/lib/forja/lake'"):
        operator(profile).agree("/var/lib/forja/lake")


def test_a_pod_is_refused_before_it_starts_when_the_lakes_differ(place: Path, raw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = PodStageOperator(
        task_id="transform", verb="transform", recipe="digits", inputs={"raw": raw},
        **pod(SITE.profile("etl"), site=SITE, recipe=RECIPE, verb="transform"),
    )  # fmt: skip
    monkeypatch.setattr(runs, "environment", dict)
    with pytest.raises(AirflowFailException, match="FORJA_LAKE of the pods"):
        op.execute({})


@pytest.mark.parametrize(("site", "refused"), [("local", "site local has no gateway"), ("cluster", "inputs of release")])
def test_release_in_a_pod_needs_a_gateway(site: str, refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORJA_SITE", site)
    monkeypatch.setattr(runs, "environment", dict)
    with pytest.raises(AirflowFailException, match=refused):
        operator(SITE.profile("release"), "release").execute({})


def test_a_receipt_from_another_gpu_is_found_by_what_its_pod_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker has no GPU, so it reckons another key than the pod; for other stages a name elsewhere counts for nothing."""
    lake = Lake(str(place / "state" / "lake"))
    said = f"vision/digits/optimize/{'e' * 32}/receipt.json"
    receipt = Receipt(
        stage="optimize", recipe="digits", team="vision", key="e" * 32, code="", command="", inputs={}, outputs={}, metrics={}, facts={},
        report=[], versions={}, started="", finished="2026-01-01T00:00:00.000+00:00", seconds=1.0, variant="fp32",
    )  # fmt: skip
    lake.create(said, receipt.to_json())
    stage = Stage(environment="ml", repeat="memoised", hardware=True)
    prepared = SimpleNamespace(folder=f"vision/digits/optimize/{'f' * 32}", stage=stage)
    run: Any = SimpleNamespace(lake=lake, prepared=prepared)
    assert runs.last(run, said).path == said
    prepared.stage = dataclasses.replace(stage, hardware=False)
    with pytest.raises(AirflowException, match="left no receipt"):
        runs.last(run, said)


def parsed(kind: str, text: str) -> Any:
    """An object of the API as its client gives it."""
    from kubernetes.client import ApiClient

    return ApiClient().deserialize(SimpleNamespace(data=text), kind)


def ended(code: int, message: str = "", reason: str = "Error") -> Any:
    state = {"terminated": {"exitCode": code, "message": message, "reason": reason}}
    base = {"name": "base", "state": state, "image": "i", "imageID": "", "ready": False, "restartCount": 0}
    limits = {"limits": {"memory": "512Mi"}}
    pod = {
        "metadata": {"name": "x", "namespace": "y"}, "spec": {"containers": [{"name": "base", "resources": limits}]},
        "status": {"phase": "Failed", "containerStatuses": [base]},
    }  # fmt: skip
    return parsed("V1Pod", json.dumps(pod))


@pytest.mark.parametrize(
    ("code", "reason", "kind", "said"),
    [
        (2, "Error", AirflowFailException, "BadInput: the last line"),
        (3, "Error", AirflowFailException, "BadInput: the last line"),
        (5, "Error", AirflowException, "BadInput: the last line"),
        (1, "Error", AirflowException, "BadInput: the last line"),
        (137, "OOMKilled", AirflowException, "OOMKilled: the stage needed more than its 512Mi of memory"),
    ],
)
def test_exit_status_says_whether_a_retry_helps(
    code: int, reason: str, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = operator(SITE.profile("training"))
    monkeypatch.setattr(podcreate, "events", lambda *_: [])
    for name in ("patch_already_checked", "process_pod_deletion"):
        monkeypatch.setattr(op, name, lambda *a, **k: None)  # these talk to a cluster
    monkeypatch.setattr(op, "is_istio_enabled", lambda pod: False)
    pod = ended(code, "first\nBadInput: the last line", reason)
    with pytest.raises(AirflowException, match=said) as raised:
        op.cleanup(pod, pod)
    assert type(raised.value) is kind


def test_the_same_dag_files_make_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.dag_processing.dagbag import DagBag

    monkeypatch.setenv("FORJA_SITE", "cluster")
    bag = DagBag(dag_folder=str(Path(__file__).resolve().parents[2] / "dags"))
    assert bag.import_errors == {}
    tasks = bag.dags["digits"].task_dict
    assert isinstance(tasks["train"], PodStageOperator)
    assert tasks["train"].pool == "gpu"
    assert set(tasks["gate"].upstream_task_ids) == {"optimize"}
