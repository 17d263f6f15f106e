"""The gang of a stage, built from the cluster's site file without a cluster, and what its operator makes of the cluster's words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from gang_parts import ARGUMENTS, DONE, FAILED, KEY, MIDNIGHT, PROFILE, QUOTA, RECIPE, SITE, Api, job, jobset, member, operator, there

from forja.errors import BadInput, Conflict, Unavailable
from forja.kube import ApiError, place
from forja.recipes.base import STAGES
from forja.training import launch
from forja_airflow.gang import jobset as gang_jobset
from forja_airflow.gang import trigger as gang_trigger
from forja_airflow.gang.operator import GangStageOperator, failure, gang
from forja_airflow.pods.operator import PodStageOperator
from forja_airflow.pods.spec import pod


def test_members_are_the_pod_of_the_profile_and_nothing_more() -> None:
    alone = PodStageOperator(task_id="train", verb="train", recipe="digits", **pod(PROFILE, site=SITE, recipe=RECIPE, verb="train"))
    alone.arm(ARGUMENTS, KEY)
    from kubernetes.client import ApiClient

    want = ApiClient().sanitize_for_serialization(alone.build_pod_request_obj(dry_run=True))["spec"]
    spec = job(jobset())["template"]["spec"]
    (container,), (wanted,) = spec["containers"], want["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert spec["automountServiceAccountToken"] is False
    assert container["env"][: len(wanted["env"])] == wanted["env"]
    own = {"terminationGracePeriodSeconds", "activeDeadlineSeconds", "containers"}
    assert {k: v for k, v in spec.items() if k not in own} == {k: v for k, v in want.items() if k not in own}
    assert {k: v for k, v in container.items() if k != "env"} == {k: v for k, v in wanted.items() if k != "env"}
    most = want["activeDeadlineSeconds"] + PROFILE.queue_timeout_s
    assert most < job(jobset())["activeDeadlineSeconds"] < spec["activeDeadlineSeconds"], "Airflow's end, the Job's, the kubelet's"


def test_members_can_meet_and_the_gang_begins_again_as_a_whole() -> None:
    made = jobset()
    assert made["metadata"]["name"] == "digits-0123456789"
    assert made["metadata"]["namespace"] == "forja-vision"
    assert made["metadata"]["labels"]["forja/key"] == KEY
    assert made["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    assert made["spec"]["failurePolicy"]["maxRestarts"] == PROFILE.retries
    assert made["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy", "DeadlineExceeded"]
    assert (job(made)["completions"], job(made)["parallelism"], job(made)["backoffLimit"]) == (2, 2, 0)
    assert job(made)["completionMode"] == "Indexed"
    (rule,) = job(made)["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2, 3, 6]
    assert "name" not in job(made)["template"]["metadata"]
    env = {e["name"]: e for e in job(made)["template"]["spec"]["containers"][0]["env"]}
    assert env["FORJA_GANG_ATTEMPT"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"
    # What the pods are told, forja.training reads.
    told = {name: e["value"] for name, e in env.items() if "value" in e}
    member = launch.member({**told, "JOB_COMPLETION_INDEX": "1", "FORJA_GANG_ATTEMPT": "3"})
    assert member == launch.Member(
        nodes=2, index=1, endpoint="digits-0123456789-gang-0-0.digits-0123456789:29500", attempt="3",
        join_s=PROFILE.queue_timeout_s + 600,
    )  # fmt: skip


def test_names_fit_into_host_names() -> None:
    """A pod's host name is a label of DNS: 63 characters."""
    name = gang_jobset.name_of("a" * 32, KEY)
    assert len(f"{name}-{gang_jobset.JOB}-0-999") <= 63
    assert gang_jobset.name_of("ai_4_i", KEY) == "ai-4-i-0123456789"


def test_the_same_work_is_the_same_gang() -> None:
    assert jobset() == jobset()
    more = jobset(dataclasses.replace(PROFILE, memory_gib=64))
    assert more["metadata"]["name"] == jobset()["metadata"]["name"]
    assert more["metadata"]["annotations"] != jobset()["metadata"]["annotations"]


@pytest.mark.parametrize("verb", [v for v in STAGES if v != "train"])
def test_other_stages_are_refused(verb: str) -> None:
    with pytest.raises(BadInput, match=f"field nodes: got 2; allowed: 1 for {verb}: only train runs as a gang"):
        gang(PROFILE, site=SITE, recipe=RECIPE, verb=verb)


def test_ranks_must_be_shared_out_evenly() -> None:
    with pytest.raises(BadInput, match=r"field nodes: got 3; allowed: a divisor of 2.*training.ranks of the recipe digits"):
        gang(dataclasses.replace(PROFILE, nodes=3), site=SITE, recipe=RECIPE, verb="train")


def bag(folder: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> Any:
    """The DAGs of a site that is the cluster's but for one change."""
    from airflow.dag_processing.dagbag import DagBag

    from forja import sites

    monkeypatch.setattr(sites, "SITES", folder)
    monkeypatch.setattr(sites.load_site, "__defaults__", (folder,))
    head, line = change.splitlines()
    text = (Path(__file__).resolve().parents[2] / "include" / "sites" / "cluster.toml").read_text()
    assert head in text
    (folder / "cluster.toml").write_text(text.replace(head, f"{head}\n{line}"))
    monkeypatch.setenv("FORJA_SITE", "cluster")
    return DagBag(dag_folder=str(Path(__file__).resolve().parents[2] / "dags"))


def test_a_profile_with_nodes_makes_a_gang_of_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = bag(tmp_path, monkeypatch, "[profiles.training]\nnodes = 2")
    assert found.import_errors == {}
    tasks = found.dags["digits"].task_dict
    assert isinstance(tasks["train"], GangStageOperator)
    assert not isinstance(tasks["register"], GangStageOperator)
    assert isinstance(tasks["register"], PodStageOperator)


def test_a_gang_of_another_stage_is_an_import_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = bag(tmp_path, monkeypatch, "[profiles.etl]\nnodes = 2")
    assert any("only train runs as a gang" in text for text in found.import_errors.values())


@pytest.mark.parametrize(
    ("pods", "events", "age", "said"),
    [
        ([member(0), member(1)], [], 10_000, ""),
        ([member(0), member(1, scheduled="0/3 nodes: no GPU")], [], 299, ""),
        ([member(0), member(1, scheduled="0/3 nodes: no GPU")], [], 301, "pod m-1 had no node within 300 s: 0/3 nodes: no GPU"),
        ([member(0), member(1, waiting="ImagePullBackOff")], [], 301, ""),
        ([member(0), member(1, waiting="ImagePullBackOff")], [], 601, "container of pod m-1 doesn't start: ImagePullBackOff why"),
        ([member(0, waiting="ErrImageNeverPull"), member(1)], [], 1, "container of pod m-0 doesn't start: ErrImageNeverPull why"),
        ([member(0)], [QUOTA], 299, ""),
        ([member(0)], [QUOTA], 301, "1 of 2 pods were made within 300 s: FailedCreate: exceeded quota: tenant"),
        ([], [], 301, "0 of 2 pods were made within 300 s: the cluster gives no reason"),
    ],
)
def test_a_gang_that_does_not_start_says_why(pods: Any, events: Any, age: float, said: str) -> None:
    api: Any = Api(Event=events)
    assert gang_jobset.held_up(api, jobset(), pods, queue_s=300, lacking_s=age, now=MIDNIGHT + age) == said


@pytest.mark.parametrize(
    ("ends", "code"),
    [((1, 143), 1), ((143, 2), 2), ((137, None), 137), ((None, None), 1), ((6, 1), 6), ((1, 5), 5), ((143, 5), 5), ((5, 2), 2)],
)
def test_the_exit_status_that_counts_is_the_one_that_no_retry_mends(ends: Any, code: int) -> None:
    pods = [member(i, code=end, message=f"first\nlast of {i}") if end else member(i) for i, end in enumerate(ends)]
    end = gang_jobset.epitaph(Api(Pod=pods), jobset())  # type: ignore[arg-type]
    assert end.code == code
    for i, status in enumerate(ends):
        assert (f"last of {i}" in end.text) is bool(status)


@pytest.mark.parametrize(
    ("status", "code", "kind", "said"),
    [
        ("failed", 2, AirflowFailException, "no restart can mend it"),
        ("failed", 1, AirflowFailException, "used up its restarts"),
        ("failed", 137, AirflowFailException, "used up its restarts"),
        ("failed", 5, AirflowException, "A service didn't answer; retry later"),
        ("held up", 1, AirflowException, "never ran: no GPU"),
        ("late", 1, AirflowException, "was ended"),
        ("refused", 1, AirflowException, "refuses to tell"),
    ],
)
def test_how_a_gang_ends_says_whether_a_retry_helps(status: str, code: int, kind: type[Exception], said: str) -> None:
    raised = failure(status, "no GPU", gang_jobset.End(code=code, text="words of the cluster"))
    assert type(raised) is kind
    assert said in str(raised)
    assert "words of the cluster" in str(raised)


@pytest.mark.parametrize(
    ("found", "taken", "removed"),
    [
        (there(), "as it is", 0),
        (there(status=DONE), "", 1),
        (there(annotations={gang_jobset.SPEC: "other"}), "though it was started with other settings", 0),
        (there(status=FAILED), "", 1),
    ],
)
def test_a_gang_that_is_there_is_taken_over(found: Any, taken: str, removed: int) -> None:
    api: Any = Api(there=found)
    made, how = gang_jobset.submit(api, operator().jobset(KEY))
    assert how == taken
    assert api.asked == [f"DELETE {place('JobSet', 'forja-vision')}/digits-0123456789 u1"] * removed
    assert made["metadata"]["name"] == "digits-0123456789"


def test_a_name_with_other_work_is_no_gang_of_ours() -> None:
    api: Any = Api(there=there(labels={"forja/key": "f" * 32}))
    with pytest.raises(Conflict, match="JobSet digits-0123456789 in forja-vision does other work"):
        gang_jobset.submit(api, operator().jobset(KEY))


def test_one_that_is_being_removed_is_waited_for() -> None:
    api: Any = Api(there=there(deletionTimestamp="2026-01-01T00:00:00Z"))
    with pytest.raises(Conflict, match="isn't gone"):
        gang_jobset.submit(api, operator().jobset(KEY), patience_s=0.1)


def test_the_trigger_keeps_no_secret_and_comes_back_as_it_was() -> None:
    trigger = gang_trigger.GangTrigger("kubernetes_default", "ns", "name", "uid", 60, 1.5)
    path, arguments = trigger.serialize()
    assert path.rpartition(".")[2] == "GangTrigger"
    assert arguments == {"conn_id": "kubernetes_default", "namespace": "ns", "name": "name", "uid": "uid", "queue_s": 60, "deadline": 1.5}
    assert gang_trigger.GangTrigger(**arguments).serialize() == (path, arguments)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (Unavailable("away"), True),
        (ApiError("GET", 503, "ServiceUnavailable", ""), True),
        (ApiError("GET", 429, "TooManyRequests", ""), True),
        (ApiError("GET", 403, "Forbidden", ""), False),
        (BadInput("kubeconfig"), False),
    ],
)
def test_only_an_outage_is_waited_out(error: Any, again: bool) -> None:
    assert gang_trigger.passes(error) is again
