"""Questions to a service that tell whether it is ready; each answers within a few seconds."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

TIMEOUT_S = 2.0


def http_ok(url: str) -> bool:
    """Whether a GET of ``url`` answers 200."""
    return _get(url)[0] == 200


def http_json(url: str) -> dict[str, Any]:
    """The JSON object at ``url``; an empty one unless it answers 200 with one."""
    status, body = _get(url)
    found = json.loads(body) if status == 200 else {}
    return found if isinstance(found, dict) else {}


def _get(url: str) -> tuple[int, bytes]:
    # No proxy: these are addresses of this machine, and a proxy of the environment must not see them.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def kafka_ok(server: str) -> bool:
    """Whether the broker at ``server`` (host:port) answers a metadata request."""
    from kafka import KafkaAdminClient
    from kafka.errors import KafkaError

    try:
        client = KafkaAdminClient(bootstrap_servers=server, bootstrap_timeout_ms=int(TIMEOUT_S * 1000), request_timeout_ms=2000)
        try:
            return bool(client.describe_cluster()["brokers"])
        finally:
            client.close()
    except KafkaError:
        return False
