"""Forja's entry in Airflow's plugins: the page that shows a receipt. The package forja_airflow is imported, never scanned."""

from typing import Any

from airflow.plugins_manager import AirflowPlugin


async def receipts(scope: Any, receive: Any, send: Any) -> None:
    """The page, imported at the first request: Airflow loads plugins in every task too, and FastAPI takes its time."""
    from forja_airflow.page import app

    await app(scope, receive, send)


class ForjaPlugin(AirflowPlugin):
    """Receipts under /forja."""

    name = "forja"
    fastapi_apps = [  # noqa: RUF012 - Airflow declares it so
        {"app": receipts, "url_prefix": "/forja", "name": "Forja receipts"},
    ]
