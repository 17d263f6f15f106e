"""Watches a stage's pod while its task has given its slot back: patient with an API that is away, and telling its log as it comes."""

from __future__ import annotations

import asyncio
import datetime
import time
from functools import cached_property
from typing import Any

import aiohttp
from airflow.providers.cncf.kubernetes.triggers.pod import KubernetesPodTrigger
from airflow.providers.cncf.kubernetes.utils.pod_manager import AsyncPodManager, PodLaunchTimeoutException
from kubernetes_asyncio.client.exceptions import ApiException

from forja_airflow.pods import log, reason

AWAY = (aiohttp.ClientError, OSError, TimeoutError)
"""Errors of a connection, which pass."""

FINAL = (400, 401, 403, 404, 405, 422)
"""Statuses of the API that no patience mends."""

PAUSE_S = 5.0
"""Seconds between two tries while the API is away."""


class PodTrigger(KubernetesPodTrigger):
    """As the provider's. An API server that is away fails nothing before the task's own deadline: the pod needs it as little."""

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Where the triggerer finds this class, and its arguments."""
        return f"{__name__}.{type(self).__name__}", super().serialize()[1]

    @cached_property
    def pod_manager(self) -> AsyncPodManager:
        """Reads pods and logs."""
        return Pods(self)

    async def _get_pod(self) -> Any:  # type: ignore[override] # the provider's is wrapped in a retry
        return await self.pod_manager.read_pod(None)


class Pods(AsyncPodManager):
    """Reads one trigger's pod: in the task's log it says what a pending pod waits for, whenever that changes."""

    def __init__(self, trigger: PodTrigger) -> None:
        super().__init__(async_hook=trigger.hook)
        self._trigger, self._said = trigger, ""
        self._deadline = float(trigger.trigger_kwargs.get("_execution_deadline") or time.time() + 86400)

    async def read_pod(self, pod: Any) -> Any:
        """The pod as it is now.

        Raises:
            ApiException: it isn't there, or may not be read.
            PodLaunchTimeoutException: it is lost with its node; the provider makes the event "timeout" of it, which waits for nothing.
        """
        while True:
            try:
                found = await self._hook.get_pod(self._trigger.pod_name, self._trigger.pod_namespace)
            except (*AWAY, ApiException) as error:
                if getattr(error, "status", 0) in FINAL or time.time() > self._deadline:
                    raise
                self._say(f"the cluster's API doesn't answer ({type(error).__name__}); the pod goes on without it")
                await asyncio.sleep(PAUSE_S)
                continue
            if reason.lost(found):
                raise PodLaunchTimeoutException(f"pod {found.metadata.name} was to end long ago, and its node doesn't say that it did")
            self._say(reason.waits(found) if found.status.phase == "Pending" else "")
            return found

    async def fetch_container_logs_before_current_sec(  # type: ignore[override] # a datetime is enough
        self, pod: Any, container_name: str, since_time: datetime.datetime | str | None = None
    ) -> datetime.datetime | None:
        """Tell the log's new lines; the moment of the last one."""
        after = log.moment(since_time)
        try:
            lines = await self._hook.read_logs(
                self._trigger.pod_name, self._trigger.pod_namespace, container_name, log.since_seconds(after)
            )
        except (*AWAY, ApiException) as error:  # the next time, or at the end
            self.log.debug("the log can't be read now: %s", error)
            return after
        return await asyncio.to_thread(self._tell, lines, after)

    def _tell(self, lines: list[str], after: datetime.datetime | None) -> datetime.datetime | None:
        for moment, text in log.new(lines, after):
            self.log.info("%s", text)
            after = moment
        return after

    def _say(self, text: str) -> None:
        # An image that can't be pulled is tried again and again, each time in other words.
        about = "an image" if text.startswith(reason.PULL) else text
        if text and about != self._said:
            self.log.info("waits: %s", text)
        self._said = about
