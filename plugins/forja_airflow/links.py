"""Links on a stage's task: its receipt, its run in MLflow, its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from airflow.sdk import BaseOperatorLink
from airflow.sdk.configuration import conf

if TYPE_CHECKING:
    from airflow.sdk.types import TaskInstanceKey

PAGE = "/forja/receipts/"
"""Where the page of forja_airflow.page is mounted."""
REPORT = "/forja/report/"
"""Where it shows the report of a run, by its gate's receipt."""


def receipt_url(path: str) -> str:
    """Address of a receipt's page on Airflow's web server; empty without a receipt."""
    base = urlsplit(conf.get("api", "base_url", fallback="")).path.rstrip("/")
    return f"{base}{PAGE}{quote(path)}" if path else ""


# Airflow asks for the links in the task's own process when the task has ended, and stores them: the operator knows the answers.
class ReceiptLink(BaseOperatorLink):
    """The receipt of what the task did or adopted."""

    name = "Receipt"

    def get_link(self, operator: Any, *, ti_key: TaskInstanceKey) -> str:
        """Address, empty when the task left no receipt."""
        return receipt_url(operator.receipt)


class ReportLink(BaseOperatorLink):
    """The page that a gate made of the run; of other stages the receipt's lines for people."""

    name = "Report"

    def get_link(self, operator: Any, *, ti_key: TaskInstanceKey) -> str:
        """Address, empty when the task left no receipt."""
        if operator.verb == "gate" and operator.receipt:
            return receipt_url(operator.receipt).replace(PAGE, REPORT, 1)
        url = receipt_url(operator.receipt)
        return f"{url}#report" if url else ""


class MlflowLink(BaseOperatorLink):
    """The run in MLflow, for stages that have one."""

    name = "MLflow run"

    def get_link(self, operator: Any, *, ti_key: TaskInstanceKey) -> str:
        """Address, empty when the stage has no run."""
        return str(operator.mlflow)


LINKS = (ReceiptLink(), ReportLink(), MlflowLink())
