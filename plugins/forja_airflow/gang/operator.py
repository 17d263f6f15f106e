"""Training as a gang of pods: the pod of a profile with several nodes, as often as it says, in a JobSet."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubernetes.client import ApiClient

from forja import errors
from forja.errors import BadInput, ForjaError
from forja.kube import ApiError
from forja.profiles import Profile
from forja.recipes.base import Recipe
from forja.sites import Site
from forja_airflow import clusters, runs
from forja_airflow.gang import jobset as jobsets
from forja_airflow.gang.trigger import GangTrigger
from forja_airflow.pods import create
from forja_airflow.pods.operator import PodStageOperator
from forja_airflow.pods.spec import pod
from forja_airflow.pods.times import STARTUP_S

if TYPE_CHECKING:
    from airflow.sdk import Context

    from forja.kube import Kube, Object


class GangStageOperator(PodStageOperator):
    """Runs train as a gang of pods, or adopts what is there. See StageOperator for arguments and result.

    The gang's name comes from the work's key, so a task that was killed finds it again, and a second one waits for the same gang.
    Failing members are the JobSet's business: it begins the whole gang again from its checkpoint, as often as the profile's retries
    allow. A retry of the task is for what happens to Airflow.

    Args:
        nodes: members.
        restarts: how often the gang may begin again.
        queue_s: seconds that a pod may wait for a node.
        run_s: seconds that the gang may run.
    """

    ui_color = "#dfeee6"
    what = "gang"

    def __init__(self, *, nodes: int, restarts: int, queue_s: int, run_s: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.nodes, self.restarts, self.queue_s, self.run_s = nodes, restarts, queue_s, run_s
        self._gang: Object | None = None

    def _begin(self, context: Context) -> str | None:
        """Adopt the receipt that is there, or start the gang and give the slot back until it has ended."""
        run = runs.begin(self.verb, self.recipe, self.inputs, self.variant)
        self.agree(run.settings.lake)
        if run.prepared.receipt is not None:
            self._remove_done(run.prepared.key, context)
            return self._result(runs.settle(self, run, run.prepared.receipt, context), context)
        self.arm(runs.arguments(run), run.prepared.key)
        self._gang, taken = self._submit(self.jobset(run.prepared.key), context)
        meta = self._gang["metadata"]
        runs.log.info("JobSet %s/%s: %s", meta["namespace"], meta["name"], f"adopted, {taken}" if taken else f"{self.nodes} pods")
        return self._watch(self._gang, context, adopted=bool(taken) and not self._again)

    def _submit(self, wanted: Object, context: Context) -> tuple[Object, str]:
        """The JobSet, made or taken over; what the API refuses means the same as for a pod."""
        with runs.airflow_errors():
            try:
                return jobsets.submit(self._kube(), wanted, heed=lambda: self.heed(context), say=runs.log.warning)
            except ApiError as error:
                quota = create.QUOTA.search(error.message)
                passing = error.status not in create.FINAL or (quota is not None and not create.hopeless(quota[1]))
                kind, what = (AirflowException, "didn't make") if passing else (AirflowFailException, "refuses")
                raise kind(f"the cluster {what} the gang: {error}") from None

    def _watch(self, there: Object, context: Context, **knows: Any) -> NoReturn:
        """Give the slot back until the gang has ended; ``knows`` are arguments of resume."""
        self.heed(context)
        meta = there["metadata"]
        trigger = GangTrigger(
            str(self.kubernetes_conn_id), meta["namespace"], meta["name"], meta["uid"], self.queue_s, self._deadline(there)
        )  # fmt: skip
        named = {"metadata": {k: meta[k] for k in ("name", "namespace", "uid")}}
        self.defer(trigger=trigger, method_name="resume", kwargs={"jobset": named, **knows})

    def _deadline(self, there: Object) -> float:
        return jobsets.moment(there["metadata"]["creationTimestamp"]) + self.queue_s + STARTUP_S + self.run_s

    def _remove_done(self, key: str, context: Context) -> None:
        """Remove what an earlier try left, when the work is known to be done; a cluster that is away doesn't undo it."""
        if context["ti"].try_number == 1:
            return
        try:
            jobsets.remove_done(self._kube(), jobsets.name_of(self.recipe, key), str(self.namespace), key)
        except (ForjaError, AirflowException) as error:
            runs.log.warning("what an earlier try left of the gang can't be removed: %s", error)

    def jobset(self, key: str) -> Object:
        """The manifest: the pod that the profile describes, once for each member."""
        alone = ApiClient().sanitize_for_serialization(self.build_pod_request_obj(dry_run=True))
        return jobsets.manifest(
            alone, recipe=self.recipe, key=key, nodes=self.nodes, restarts=self.restarts, queue_s=self.queue_s
        )  # fmt: skip

    def resume(self, context: Context, event: dict[str, Any], jobset: Object, refused: int = 0, adopted: bool = False) -> str | None:
        """The gang has ended, or must: its receipt's path.

        Args:
            jobset: its name, namespace and uid.
            refused: how often the trigger came back because the cluster refused to tell it about a gang that runs.
            adopted: the gang is one that an earlier try left: when somebody takes it away, as happens when a person clears a deferred
                task, this try goes on with a gang of its own.

        Raises:
            AirflowFailException: the gang failed for good.
            AirflowException: it is worth another try.
        """
        self._gang, status = jobset, event["status"]
        kube, there = self._found(jobset)
        with runs.airflow_errors():
            if status == "refused":
                status = "gone" if there is None else jobsets.state(there)
                if there is not None and status == "running":
                    status = "refused"
                    if refused < self.MAX_REDEFER_ATTEMPTS and time.time() < self._deadline(there):
                        runs.log.warning("the gang runs; it is watched again, though the cluster refused it: %s", event["message"])
                        self._watch(there, context, refused=refused + 1, adopted=adopted)
            if status == "gone" and adopted:
                return self._anew(context)
            try:
                if status in ("completed", "gone"):
                    return self._adopt(context, self._times(kube, there), event["message"] if status == "gone" else "")
                end = jobsets.epitaph(kube, there or jobset)
            finally:
                jobsets.remove(kube, jobset)
        raise failure(status, event["message"], end)

    def _found(self, jobset: Object) -> tuple[Kube, Object | None]:
        """The cluster, and the gang as it is there; None when it isn't.

        Raises:
            AirflowException: no answer, or a refusal, which says nothing about the gang: the next try adopts it.
        """
        meta = jobset["metadata"]
        try:
            with runs.airflow_errors():
                kube = self._kube()
                there = kube.get("JobSet", meta["name"], meta["namespace"])
        except AirflowFailException as error:
            raise AirflowException(f"the cluster refuses to tell about the gang: {error}") from error
        return kube, there if there is not None and there["metadata"]["uid"] == meta["uid"] else None

    def _adopt(self, context: Context, times: dict[str, float], gone: str) -> str:
        """The receipt that member 0 left.

        Args:
            gone: what happened to a gang that didn't end by itself.
        """
        run = runs.begin(self.verb, self.recipe, self.inputs, self.variant)
        if gone and run.prepared.receipt is None:
            raise AirflowException(f"the gang is gone, and left no receipt: {gone}")
        return self._result(runs.settle(self, run, run.prepared.receipt or runs.last(run), context, **times), context)

    def _times(self, kube: Kube, jobset: Object | None) -> dict[str, float]:
        """When member 0 began and ended."""
        end = jobsets.ended(next(iter(jobsets.pods(kube, jobset) if jobset else []), {}))
        return {"spawned": jobsets.moment(end["startedAt"]), "ended": jobsets.moment(end["finishedAt"])} if end else {}

    def on_kill(self) -> None:
        """Only told: heed ends the gang where this task goes on, since a handler of signals shouldn't wait for the cluster's answer.

        While the task is deferred, its trigger does this.
        """
        self._told = True

    def end(self) -> None:
        """Remove the gang."""
        if self._gang is not None:
            with runs.airflow_errors():
                jobsets.remove(self._kube(), self._gang)

    def _kube(self) -> Kube:
        return clusters.connect(str(self.kubernetes_conn_id))


def failure(status: str, message: str, end: jobsets.End) -> AirflowException:
    """What an end of a gang means for Airflow.

    Args:
        status: the trigger's.
        message: the trigger's.
        end: what the cluster knows of it.
    """
    if status == "failed":
        kind = errors.BY_EXIT_CODE.get(end.code)
        if kind is not None and kind.retry:
            # Restarts come at once, a service that is away comes back in its own time.
            return AirflowException(f"the gang failed: {kind.__doc__}\n{end.text}")
        why = "it has used up its restarts" if kind is None else "no restart can mend it"
        return AirflowFailException(f"the gang failed, and {why}:\n{end.text}")
    what = {"held up": "the gang never ran", "late": "the gang was ended", "refused": "the cluster refuses to tell about the gang"}[status]
    return AirflowException(f"{what}: {message}" + ("" if end.text in message else f"\n{end.text}"))


def gang(profile: Profile, *, site: Site, recipe: Recipe, verb: str) -> dict[str, Any]:
    """Arguments of the operator for a profile with several nodes.

    Raises:
        BadInput: a stage that can't be shared out, or ranks that can't be.
    """
    if verb != "train":
        raise BadInput(
            f"profile {profile.name}: field nodes", value=profile.nodes, allowed=f"1 for {verb}: only train runs as a gang of pods",
            do=f"give {verb} another profile in the recipe {recipe.name}",
        )  # fmt: skip
    if recipe.training.ranks % profile.nodes:
        raise BadInput(
            f"profile {profile.name}: field nodes", value=profile.nodes, allowed=f"a divisor of {recipe.training.ranks}",
            do=f"see training.ranks of the recipe {recipe.name}: each node gets its share of them",
        )  # fmt: skip
    return {
        **pod(profile, site=site, recipe=recipe, verb=verb),
        "nodes": profile.nodes, "restarts": profile.retries, "queue_s": profile.queue_timeout_s, "run_s": profile.run_timeout_s,
    }  # fmt: skip
