"""The page of a receipt, mounted in Airflow's web server under /forja. Who reads a recipe's DAG may read its receipts."""

from __future__ import annotations

import re
from typing import Annotated

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.resource_details import DagDetails
from airflow.api_fastapi.core_api.security import GetUserDep, requires_authenticated
from fastapi import Depends, FastAPI, HTTPException, Path, Response

from forja import receipts
from forja.errors import BadInput, Damaged
from forja.lake import Lake
from forja.receipts import Receipt
from forja.settings import Settings
from forja_airflow import receipt_html

RECEIPT = re.compile(r"[a-z][a-z0-9_]*/(?P<recipe>[a-z][a-z0-9_]*)/[a-z]+/[0-9a-f]{32}/receipt(-\d{6})?\.json")
REPORT = "report.html"
"""Output of a gate."""

HEADERS = {
    # Everything is in the page itself; nothing in it may run.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "private, no-store",
}

# An app that is mounted has no authentication unless it brings its own.
app = FastAPI(title="Forja receipts", docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(requires_authenticated())])


def allowed(path: Annotated[str, Path()], user: GetUserDep) -> Receipt:
    """The receipt at ``path`` in the lake; 403 for a user who may not read its DAG, 404 when there is none."""
    match = RECEIPT.fullmatch(path)
    if match is None:
        raise HTTPException(404, "no such receipt")
    if not get_auth_manager().is_authorized_dag(method="GET", details=DagDetails(id=match["recipe"]), user=user):
        raise HTTPException(403, "reading this receipt needs the right to read its DAG")
    try:
        return receipts.load(Lake(Settings.from_env().lake), path)
    except (BadInput, Damaged) as error:
        raise HTTPException(404, "no such receipt") from error


AllowedDep = Annotated[Receipt, Depends(allowed)]


@app.get("/receipts/{path:path}")
def show(receipt: AllowedDep) -> Response:
    """The page."""
    return Response(receipt_html.page(receipt, Settings.from_env().mlflow), media_type="text/html; charset=utf-8", headers=HEADERS)


@app.get("/report/{path:path}")
def report(receipt: AllowedDep) -> Response:
    """The report of a run, as its gate made it; 404 for a receipt without one."""
    if REPORT not in receipt.outputs:
        raise HTTPException(404, "this receipt has no report")
    output = receipt.outputs[REPORT]
    try:
        content = Lake(Settings.from_env().lake).read(output.path, output.sha256)
    except Damaged as error:
        raise HTTPException(404, str(error)) from error
    return Response(content, media_type="text/html; charset=utf-8", headers=HEADERS)


@app.get("/json/{path:path}")
def as_json(receipt: AllowedDep) -> Response:
    """The receipt itself."""
    return Response(receipt.to_json(), media_type="application/json", headers=HEADERS)
