"""A gang's operator, its JobSet and a cluster that says what a table says, for tests/dags/test_gang*.py."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from forja import recipes
from forja.kube import ApiError
from forja.profiles import Profile
from forja.sites import load_site
from forja_airflow.gang import jobset as gang_jobset
from forja_airflow.gang.operator import GangStageOperator, gang

SITE = load_site("cluster")
RECIPE = recipes.load("digits")
PROFILE = dataclasses.replace(SITE.profile("training"), nodes=2)
KEY = "0123456789abcdef" * 2
ARGUMENTS = ["train", "--recipe", "digits", "--in", "dataset=a/b", "--code", "0" * 64]


def operator(profile: Profile = PROFILE) -> GangStageOperator:
    op = GangStageOperator(task_id="train", verb="train", recipe="digits", **gang(profile, site=SITE, recipe=RECIPE, verb="train"))
    op.arm(ARGUMENTS, KEY)
    return op


def jobset(profile: Profile = PROFILE) -> Any:
    made = json.loads(json.dumps(operator(profile).jobset(KEY)))  # what the API gets: plain JSON
    return {**made, "metadata": {**made["metadata"], "uid": "u1", "creationTimestamp": "2026-01-01T00:00:00Z"}}


def job(made: Any) -> Any:
    (replicated,) = made["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


class Api:
    """Answers what a table says; a stand-in where the cluster's own words are the input. tests/cluster has the real API."""

    def __init__(self, **answers: Any) -> None:
        self.answers, self.asked = answers, list[str]()

    def list(self, kind: str, namespace: str, **selectors: str) -> Any:
        return self.answers.get(kind, [])

    def create(self, manifest: Any) -> Any:
        if "there" in self.answers:
            raise ApiError("POST", 409, "AlreadyExists", "it is there")
        return manifest

    def get(self, kind: str, name: str, namespace: str) -> Any:
        return self.answers.get("there")

    def request(self, method: str, path: str, body: Any) -> None:
        self.asked.append(f"{method} {path} {body['preconditions']['uid']}")
        self.answers.pop("there", None)


def member(index: int = 0, *, scheduled: str = "", waiting: str = "", code: int | None = None, message: str = "") -> Any:
    """A pod as the API gives it, made at midnight."""
    midnight = "2026-01-01T00:00:00Z"
    meta: Any = {
        "name": f"m-{index}",
        "namespace": "forja-vision",
        "uid": f"p{index}",
        "creationTimestamp": midnight,
        "labels": {gang_jobset.INDEX: str(index)},
    }
    condition = {"type": "PodScheduled", "status": "False" if scheduled else "True", "message": scheduled, "lastTransitionTime": midnight}
    state: Any = {"running": {}}
    if waiting:
        state = {"waiting": {"reason": waiting, "message": "why"}}
    if code is not None:
        state = {"terminated": {"exitCode": code, "reason": "Error", "message": message}}
    phase = "Pending" if scheduled or waiting else "Running"
    return {"metadata": meta, "status": {"phase": phase, "conditions": [condition], "containerStatuses": [{"state": state}]}}


MIDNIGHT = gang_jobset.moment("2026-01-01T00:00:00Z")
QUOTA = {
    "reason": "FailedCreate", "message": "exceeded quota: tenant", "lastTimestamp": "2026-01-01T00:00:01Z",
    "involvedObject": {"name": "digits-0123456789-gang-0"},
}  # fmt: skip


def there(**change: Any) -> Any:
    found = jobset()
    found["status"] = change.pop("status", {})
    found["metadata"] = {**found["metadata"], **change}
    return found


FAILED = {"conditions": [{"type": "Failed", "status": "True", "message": "x"}]}
DONE = {"conditions": [{"type": "Completed", "status": "True"}]}
