"""The page of a receipt, in Airflow's own web server: nobody reads it without logging in, and nothing in it can run."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest

from forja.lake import Lake, sha256
from forja.receipts import Input, Output, Receipt
from forja.services import airflow
from forja.settings import Settings

KEY = "0123456789abcdef" * 2
PATH = f"vision/digits/train/{KEY}/receipt.json"
EVIL = "<script>alert(1)</script>"
RECEIPT = Receipt(
    stage="train", recipe="digits", team="vision", key=KEY, code="0" * 64, command=f"./forja stage train {EVIL}",
    inputs={
        "dataset": [Input(ref=f"vision/digits/transform/{KEY}/receipt.json", digest="0" * 64)],
        "raw": [Input(ref="vision/digits/raw@3", digest="1" * 64)],
    },
    outputs={f"model{EVIL}": Output(path="a/b", sha256="2" * 64, bytes=1234567)}, metrics={"accuracy": 0.98765},
    facts={"mlflow_run": "abc", "odd": {EVIL: "'\"&"}}, report=["trained 20 epochs", EVIL], versions={"torch": "2.10.0"},
    started="2026-01-01T00:00:00.000+00:00", finished="2026-01-01T00:00:09.000+00:00", seconds=9.0,
)  # fmt: skip


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    """A lake outside the state folder, which the web server knows as ``forja up`` tells it: by services.airflow alone."""
    settings = Settings.from_env({**os.environ, "FORJA_STATE": str(tmp_path / "state"), "FORJA_LAKE": str(tmp_path / "lake")})
    for name in [n for n in os.environ if n.startswith(("FORJA_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name, value in airflow.environment(settings).items():
        if not name.startswith(("AIRFLOW", "PYTHON")):
            monkeypatch.setenv(name, value)
    lake = Lake(settings.lake)
    lake.create(PATH, RECEIPT.to_json())
    return lake


@pytest.fixture(scope="module")
def server(airflow_home: Path) -> Any:
    """Airflow's web application with the plugin as Airflow itself loads it."""
    from airflow.api_fastapi.app import create_app

    return create_app(apps="core")


def client(server: Any, role: str | None) -> Any:
    from airflow.api_fastapi.app import get_auth_manager
    from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
    from fastapi.testclient import TestClient

    web = TestClient(server, base_url="http://127.0.0.1:8080")
    if role is not None:
        web.cookies.set("_token", get_auth_manager().generate_jwt(SimpleAuthManagerUser(username="someone", role=role)))
    return web


@pytest.mark.parametrize("address", [f"/forja/receipts/{PATH}", f"/forja/json/{PATH}", f"/forja/report/{PATH}", "/forja/receipts/none"])
def test_nobody_reads_it_without_logging_in(server: Any, lake: Lake, address: str) -> None:
    assert client(server, None).get(address).status_code == 401
    forged = client(server, None)
    forged.cookies.set("_token", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiIsInJvbGUiOiJhZG1pbiJ9.")
    assert forged.get(address).status_code in (401, 403)


@pytest.mark.parametrize("address", ["/forja/docs", "/forja/openapi.json", "/forja/redoc", "/forja/"])
def test_nothing_else_is_served(server: Any, address: str) -> None:
    assert client(server, "admin").get(address).status_code == 404


def test_page(server: Any, lake: Lake) -> None:
    answer = client(server, "viewer").get(f"/forja/receipts/{PATH}")
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    text = answer.text
    assert EVIL not in text
    assert "&lt;script&gt;" in text
    assert "0.98765" in text
    assert "1,234,567 bytes" in text
    assert f"../vision/digits/transform/{KEY}/receipt.json" in text
    assert client(server, "viewer").get(f"/forja/json/{PATH}").json()["metrics"] == {"accuracy": 0.98765}


def test_links_lead_to_the_inputs_page(server: Any, lake: Lake) -> None:
    lake.create(f"vision/digits/transform/{KEY}/receipt.json", dataclasses.replace(RECEIPT, stage="transform").to_json())
    web = client(server, "viewer")
    address = f"/forja/receipts/{PATH}"
    links = [urljoin(address, link) for link in re.findall(r"href='([^']+)'", web.get(address).text)]
    mlflow = f"{Settings.from_env().mlflow}/#/runs/abc"
    assert links == ["/dags/digits", mlflow, f"/forja/receipts/vision/digits/transform/{KEY}/receipt.json", f"/forja/json/{PATH}"]
    assert [web.get(link).status_code for link in links if link != mlflow] == [200, 200, 200]


def test_tables_and_numbers_are_for_people(server: Any, lake: Lake) -> None:
    verdicts = [{"variant": "fp32", "value": 1.0, "passed": True}, {"variant": "int8", "value": None, "passed": False}]
    table = ["variant   value", "fp32          1"]
    facts = {"verdicts": verdicts, "route": {"version": 1}, "previous": None, "empty": []}
    path = f"vision/digits/gate/{KEY}/receipt.json"
    lake.create(path, dataclasses.replace(RECEIPT, stage="gate", facts=facts, metrics={"bytes": 1095988.0}, report=table).to_json())
    text = client(server, "viewer").get(f"/forja/receipts/{path}").text
    assert "\n".join(table) in text, "columns stay columns"
    assert "<th>variant</th><th>passed</th><th>value</th>" in text
    assert "<td><code>int8</code></td><td><code>false</code></td><td><code>none</code></td>" in text
    assert "<td>version</td><td><code>1</code></td>" in text
    assert "1,095,988" in text
    assert "finished 2026-01-01 00:00:09 UTC" in text


def test_the_report_of_a_run(server: Any, lake: Lake) -> None:
    """The gate's receipt leads to it; a receipt without one, and a report that is damaged, are not found."""
    page, path = b"<!doctype html><title>report</title>", f"vision/digits/gate/{KEY}/receipt.json"
    output = Output(path=f"vision/digits/gate/{KEY}/report.html", sha256=sha256(page), bytes=len(page))
    lake.create(output.path, page)
    lake.create(path, dataclasses.replace(RECEIPT, stage="gate", outputs={"report.html": output}).to_json())
    web = client(server, "viewer")
    address = f"/forja/receipts/{path}"
    links = [urljoin(address, link) for link in re.findall(r"href='([^']+)'", web.get(address).text)]
    assert f"/forja/report/{path}" in links
    answer = web.get(f"/forja/report/{path}")
    assert (answer.status_code, answer.content) == (200, page)
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert web.get(f"/forja/report/{PATH}").status_code == 404
    lake.replace(output.path, b"another page")
    assert web.get(f"/forja/report/{path}").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "vision/digits/train/none/receipt.json",
        f"vision/digits/train/{'f' * 32}/receipt.json",
        f"vision/digits/train/{KEY}/claim-000001.json",
        "%2e%2e/%2e%2e/etc/passwd",
        f"vision/digits/train/{KEY}/../{KEY}/receipt.json%00",
    ],
)
def test_only_receipts_are_read(server: Any, lake: Lake, path: str) -> None:
    answer = client(server, "admin").get(f"/forja/receipts/{path}")
    assert answer.status_code == 404
    assert "root:" not in answer.text


def test_plugin_loads_once_and_without_fastapi() -> None:
    code = """
import sys
from airflow.sdk import DAG
import forja_plugin
print("answer", "fastapi" in sys.modules, "forja_airflow" in sys.modules)
from airflow import plugins_manager
plugins, errors = plugins_manager._get_plugins()
print("answer", [p.name for p in plugins if p.name == "forja"], errors, sum(1 for m in sys.modules if m.endswith("receipt_html")))
"""
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("answer")] == ["answer False False", "answer ['forja'] {} 0"]
