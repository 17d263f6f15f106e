"""The Kafka doorbell as an Airflow trigger: rings while there is something to ingest."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from airflow.sdk.exceptions import AirflowNotFoundException
from airflow.triggers.base import BaseEventTrigger, TriggerEvent

from forja import doorbell
from forja.settings import Settings

CALM_S = 60.0
"""Longest wait between two tries to reach a broker that doesn't answer."""


class Doorbell(BaseEventTrigger):
    """Rings when ``topic`` holds records that the consumer group has not ingested, and again while that stays so.

    Args:
        topic: Kafka topic.
        group: consumer group of the ingest stage.
        every_s: seconds between two looks.
        gap_s: seconds after a ring that nobody answered; they double with each further one, up to ten minutes.
    """

    def __init__(self, topic: str, group: str, every_s: float = 1.0, gap_s: float = 20.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.topic, self.group, self.every_s, self.gap_s = topic, group, every_s, gap_s

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Class path and arguments: the same on every parse, or Airflow would start the trigger anew."""
        return "forja_airflow.trigger.Doorbell", {
            "topic": self.topic, "group": self.group, "every_s": self.every_s, "gap_s": self.gap_s,
        }  # fmt: skip

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look for ever. A trigger that raises is started again at once, for ever, so broker errors end here."""
        # The client logs every try of every connection; what matters is in this trigger's own words.
        logging.getLogger("kafka").setLevel(logging.CRITICAL)
        bootstrap = await self._bootstrap()
        last: doorbell.Ring | None = None
        calm = self.every_s
        # The client is not thread safe and its calls block: one thread, for this trigger alone.
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="doorbell") as thread:
            loop, client = asyncio.get_running_loop(), None
            try:
                while True:
                    try:
                        if client is None:
                            client = await loop.run_in_executor(thread, doorbell.connect, bootstrap, self.group)
                        level = await loop.run_in_executor(thread, doorbell.level, client, self.topic)
                    except Exception as error:
                        # Whatever the client raises, the way on is a new client.
                        self.log.warning("Kafka at %s doesn't answer; next look in %.0f s: %s", bootstrap, calm, error)
                        await self._close(thread, client)
                        client = None
                        await asyncio.sleep(calm)
                        calm = min(calm * 2, CALM_S)
                        continue
                    calm, now = self.every_s, time.monotonic()
                    if due := doorbell.ring(level, last, now=now, gap_s=self.gap_s):
                        last = due
                        yield TriggerEvent({"topic": self.topic, "lag": level.lag})  # type: ignore[no-untyped-call]
                    await asyncio.sleep(self.every_s)
            finally:
                await self._close(thread, client)

    async def _close(self, thread: ThreadPoolExecutor, client: Any) -> None:
        if client is not None:
            with contextlib.suppress(Exception):
                await asyncio.get_running_loop().run_in_executor(thread, lambda: client.close(autocommit=False, timeout_ms=1000))

    async def _bootstrap(self) -> str:
        """Kafka's address: the connection's, as for the stages, else the environment's."""
        from airflow.sdk import BaseHook

        try:
            connection = await BaseHook.aget_connection("forja_kafka")
        except AirflowNotFoundException:
            return Settings.from_env().kafka
        return str(connection.extra_dejson.get("env", {}).get("FORJA_KAFKA") or Settings.from_env().kafka)
