"""What a person sees of a pipeline: the real Airflow in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.conftest import Stack

from forja.recipes.base import CHAIN
from forja.services import airflow

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's package chromium: apt-get install chromium")


@pytest.fixture
def page(stack: Stack) -> Iterator[Any]:
    """A page of a browser that is logged in; the test fails for an error on its console and for a request off this machine."""
    from playwright.sync_api import sync_playwright

    stack.need("airflow")
    url = f"http://127.0.0.1:{stack.settings.ports['airflow']}"
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        context = browser.new_context(base_url=url, viewport={"width": 1600, "height": 1000})
        context.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else wrong.append(f"request: {r.url}"))
        login = context.new_page()
        login.goto("/")
        user, password = airflow.login(stack.settings)
        login.fill("input[name=username]", user)
        login.fill("input[name=password]", password)
        login.click("button[type=submit]")
        login.get_by_role("link", name="Dags", exact=True).wait_for()
        login.close()
        # From here on: before the login Airflow's own page asks for what it may not have yet.
        context.on("console", lambda m: wrong.append(f"console: {m.text} {m.location}") if m.type == "error" else None)
        context.on("weberror", lambda e: wrong.append(f"error: {e.error}"))
        page = context.new_page()
        page.set_default_timeout(20_000)
        yield page
        browser.close()
    assert not wrong


@pytest.mark.timeout(180)
def test_graph_and_documentation(page: Any, stack: Stack) -> None:
    stack.wait("the DAG", lambda: page.request.get("/api/v2/dags/digits").ok)
    page.goto("/dags")
    page.get_by_role("link", name="digits_ingest", exact=True).wait_for()
    page.get_by_role("link", name="digits", exact=True).first.click()
    page.get_by_label("Show Graph").click()
    page.get_by_test_id("expand-all-button").click()
    nodes = page.locator(".react-flow__node")
    for task in ("admit", *CHAIN[1:]):
        nodes.get_by_text(task, exact=task != "optimize").first.wait_for()
    page.get_by_label("Dag Docs").click()
    docs = page.get_by_role("dialog")
    docs.get_by_role("heading", name="Handwritten digits").wait_for()
    assert "When a run fails" in docs.inner_text()
    assert [row.inner_text() for row in docs.locator("tbody tr td:first-child").all()] == ["admit", *CHAIN[1:]]

    page.goto("/dags/digits/tasks/train")
    page.get_by_role("button", name="Documentation").click()
    docs.get_by_text("When it fails:").wait_for()
    assert "Exit status of the stage" in docs.inner_text()
