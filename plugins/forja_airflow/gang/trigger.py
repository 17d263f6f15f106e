"""Waits for a gang in Airflow's triggerer: its JobSet's end, its time-outs, and member 0's log as it comes."""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import AsyncIterator
from typing import Any

from airflow.sdk.exceptions import AirflowException, AirflowRuntimeError
from airflow.triggers.base import BaseTrigger, TriggerEvent

from forja.errors import ForjaError, Unavailable
from forja.kube import ApiError, Kube, Object, place
from forja_airflow import clusters
from forja_airflow.gang import jobset as jobsets
from forja_airflow.pods import log

EVERY_S = 2.0
"""Seconds between two looks."""

CALM_S = 30.0
"""Longest wait between two tries to reach an API server that doesn't answer."""

REFUSALS = 5
"""Looks that may be refused, one after the other, before the task is told: a token or a role may be on its way."""

END_S = 25.0
"""Seconds in which the gang's end is tried again and again: Airflow allows 30."""

ERRORS = (ForjaError, AirflowException, AirflowRuntimeError)
"""What can be wrong with a look: the cluster's answer, or the connection that Airflow gives."""


class GangTrigger(BaseTrigger):
    """Fires once: ``{"status": "completed" | "failed" | "gone" | "held up" | "late" | "refused", "message": ...}``.

    It never fires because the API server is away: it looks again, less and less often, until ``deadline``. Nor does one refusal say
    anything: the credentials are read anew, and it looks again.

    Args:
        conn_id: Airflow connection to the cluster; what it holds is not kept in Airflow's database.
        namespace: of the JobSet.
        name: of the JobSet.
        uid: of the JobSet: another one of the same name isn't watched.
        queue_s: seconds that a pod may wait for a node.
        deadline: when the gang must have ended, in seconds since 1970.
    """

    def __init__(self, conn_id: str, namespace: str, name: str, uid: str, queue_s: int, deadline: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.conn_id, self.namespace, self.name, self.uid, self.queue_s, self.deadline = conn_id, namespace, name, uid, queue_s, deadline
        self._kube: Kube | None = None
        self._pod, self._attempt = "", 0
        self._last: datetime.datetime | None = None
        self._buried: set[str] = set()
        self._mute = False
        self._whole = time.monotonic()

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Class path and arguments."""
        names = ("conn_id", "namespace", "name", "uid", "queue_s", "deadline")
        return f"{__name__}.GangTrigger", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look until there is something to tell."""
        calm, refusals = EVERY_S, 0
        while True:
            status, message = "", ""
            try:
                # The client blocks; a thread of its own keeps the triggerer's loop free.
                status, message = await asyncio.to_thread(self._look)
                calm, refusals = EVERY_S, 0
            except ERRORS as error:
                if not passes(error):
                    self._kube = None  # the file that the connection names may hold a new token
                    refusals += 1
                if refusals > REFUSALS:
                    status, message = "refused", str(error)
                calm = min(calm * 2, CALM_S)
                self.log.warning("no answer about JobSet %s; next look in %.0f s: %s", self.name, calm, error)
            if not status and time.time() > self.deadline:
                status, message = "late", "the profile's queue_timeout_s and run_timeout_s, and the time for its start, are over"
            if status:
                yield TriggerEvent({"status": status, "message": message})  # type: ignore[no-untyped-call]
                return
            await asyncio.sleep(calm)

    async def on_kill(self) -> None:
        """A person ended the task: end the gang. The triggerer's own end comes without this call."""
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        deadline = time.monotonic() + END_S
        while True:
            try:
                return jobsets.remove(self._connect(), self._named())
            except ERRORS as error:
                self._kube = None
                if time.monotonic() + EVERY_S > deadline:
                    raise
                self.log.warning("JobSet %s isn't removed yet: %s", self.name, error)
            time.sleep(EVERY_S)

    def _named(self) -> Object:
        return {"metadata": {"name": self.name, "namespace": self.namespace, "uid": self.uid}}

    def _connect(self) -> Kube:
        self._kube = self._kube or clusters.connect(self.conn_id)
        return self._kube

    def _look(self) -> tuple[str, str]:
        """Status and message; empty while there is nothing to tell."""
        kube = self._connect()
        jobset = kube.get("JobSet", self.name, self.namespace)
        if jobset is None or jobset["metadata"]["uid"] != self.uid:
            return "gone", "somebody removed its JobSet"
        members = jobsets.pods(kube, jobset)
        for name in jobsets.remove_lost(kube, members, time.time()):
            self.log.warning("pod %s is lost with its node and deleted by force", name)
        self._tell(kube, jobset, members)
        state = jobsets.state(jobset)
        if jobset["metadata"].get("deletionTimestamp") and state != "completed":
            return "", ""  # somebody removes it, so that its members fail: it is gone soon
        if state != "running":
            return state, ""
        if len(members) >= jobsets.size(jobset):
            self._whole = time.monotonic()
        reason = jobsets.held_up(kube, jobset, members, queue_s=self.queue_s, lacking_s=time.monotonic() - self._whole, now=time.time())
        return ("held up", reason) if reason else ("", "")

    def _tell(self, kube: Kube, jobset: Object, members: list[Object]) -> None:
        """Write to the task's log what is new: member 0's lines, members that failed, and restarts."""
        for pod in members[:1]:
            self._follow(kube, pod)
        for pod in members:
            end = jobsets.ended(pod)
            if end.get("exitCode") and pod["metadata"]["uid"] not in self._buried:
                self._buried.add(pod["metadata"]["uid"])
                last = (end.get("message") or "").strip().splitlines()[-1:]
                self.log.warning("pod %s ended with status %s: %s", pod["metadata"]["name"], end["exitCode"], *last or [""])
        attempt = jobset.get("status", {}).get("restarts", 0)
        if attempt > self._attempt:
            self._attempt = attempt
            most = jobset["spec"]["failurePolicy"]["maxRestarts"]
            self.log.warning("the gang begins again from its newest checkpoint, restart %s of %s", attempt, most)

    def _follow(self, kube: Kube, pod: Object) -> None:
        """Lines of a pod's log that came since the last look; a log that can't be read hides nothing else of the gang."""
        if pod["metadata"]["uid"] != self._pod:
            self._pod, self._last = pod["metadata"]["uid"], None
        query: dict[str, object] = {"timestamps": "true"}
        if (seconds := log.since_seconds(self._last)) is not None:
            query["sinceSeconds"] = seconds
        try:
            text = kube.request("GET", f"{place('Pod', self.namespace)}/{pod['metadata']['name']}/log", query=query)
        except ForjaError as error:
            early = isinstance(error, ApiError) and error.status in (400, 404)  # its container hasn't started, or is gone
            if not early and not self._mute:
                self._mute = True
                self.log.warning("the log of pod %s can't be read now: %s", pod["metadata"]["name"], error)
            return
        self._mute = False
        # Only lines of the cluster's own have a time: what else may end a line, as a progress bar's return, stands within one.
        for moment, line in log.new(str(text).split("\n"), self._last):
            self._last = moment
            self.log.info("%s", line)


def passes(error: Exception) -> bool:
    """Whether looking again can help: the API server is away or busy."""
    return isinstance(error, Unavailable) or (isinstance(error, ApiError) and (error.status >= 500 or error.status in (409, 429)))
