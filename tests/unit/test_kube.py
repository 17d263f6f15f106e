"""The client of the Kubernetes API where there is none; against a real one: tests/cluster/test_kube.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml

from forja import kube
from forja.errors import BY_EXIT_CODE, BadInput, Unavailable


def config(folder: Path, server: str) -> Path:
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump({
        "apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {"token": "t0ken"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    }))  # fmt: skip
    return path


@contextmanager
def server(status: int, body: bytes, *, missing: int = 0) -> Iterator[tuple[str, list[tuple[str, str, dict[str, str]]]]]:
    """Answers every request the same way, ``missing`` bytes short, and keeps what was asked."""
    asked: list[tuple[str, str, dict[str, str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + missing))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = do_DELETE = answer

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as made:
        Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}", asked
        made.shutdown()


@pytest.mark.parametrize(
    ("kind", "namespace", "path"),
    [
        ("Pod", "a", "/api/v1/namespaces/a/pods"),
        ("Pod", "", "/api/v1/pods"),
        ("Node", "a", "/api/v1/nodes"),
        ("HTTPRoute", "a", "/apis/gateway.networking.k8s.io/v1/namespaces/a/httproutes"),
    ],
)
def test_paths(kind: str, namespace: str, path: str) -> None:
    assert kube.place(kind, namespace) == path


def test_a_kubeconfig_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"{tmp_path}/none.*KUBECONFIG"):
        kube.connect(tmp_path / "none")


def test_a_server_that_is_away_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="the Kubernetes API doesn't answer GET /api/v1/nodes"):
        kube.connect(config(tmp_path, "http://127.0.0.1:9")).list("Node")


def test_a_log_may_hold_any_bytes(tmp_path: Path) -> None:
    """What a process prints is its own business, and a read may begin or end within a character."""
    with server(200, b"one\xff\ntwo \xc3\xa9\xc3") as (address, _):
        assert kube.connect(config(tmp_path, address)).request("GET", "/api/v1/namespaces/a/pods/x/log") == "one\ufffd\ntwo \xe9\ufffd"


def test_an_error_may_hold_any_bytes(tmp_path: Path) -> None:
    """As of a proxy before the API server, in the encoding of its own language."""
    with server(503, b"ferm\xe9") as (address, _), pytest.raises(kube.ApiError, match="ferm\ufffd") as raised:
        kube.connect(config(tmp_path, address)).list("Pod")
    assert raised.value.status == 503


def test_an_answer_that_breaks_off_is_unavailable(tmp_path: Path) -> None:
    """As from a server that goes down while it answers."""
    with server(200, b'{"items": [', missing=99) as (address, _), pytest.raises(Unavailable, match="GET /api/v1/nodes"):
        kube.connect(config(tmp_path, address)).list("Node")


@pytest.mark.parametrize(("status", "passing"), [(403, False), (404, False), (409, False), (429, True), (500, True), (503, True)])
def test_which_errors_may_pass(status: int, passing: bool) -> None:
    assert kube.ApiError("GET /x", status, "Reason", "message").passing is passing


@pytest.mark.parametrize(("status", "code"), [(403, 3), (409, 4), (429, 5), (500, 5), (503, 5), (400, 2), (401, 2), (404, 2), (422, 2)])
def test_exit_statuses(status: int, code: int) -> None:
    error = kube.ApiError("GET /x", status, "Reason", "message")
    assert error.exit_code == code
    assert error.retry is BY_EXIT_CODE[code].retry


def test_a_kubeconfig_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text("a: [")
    with pytest.raises(BadInput, match=r"kubeconfig.*parsing"):
        kube.connect(path)


def test_a_refusal_keeps_the_servers_words(tmp_path: Path) -> None:
    said = {"kind": "Status", "reason": "Forbidden", "message": 'pods "x" is forbidden: exceeded quota: gpu'}
    with server(403, json.dumps(said).encode()) as (address, _), pytest.raises(kube.ApiError, match="exceeded quota: gpu") as raised:
        kube.connect(config(tmp_path, address)).create({"kind": "Pod", "metadata": {"namespace": "a", "name": "x"}})
    assert (raised.value.status, raised.value.reason) == (403, "Forbidden")


def test_an_answer_that_is_no_status_is_kept_as_text(tmp_path: Path) -> None:
    with server(502, b"<html>bad gateway</html>") as (address, _), pytest.raises(kube.ApiError, match="bad gateway") as raised:
        kube.connect(config(tmp_path, address)).list("Pod")
    assert raised.value.status == 502


def test_what_is_sent(tmp_path: Path) -> None:
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "a", "name": "x"}}
    with server(200, b"{}") as (address, asked):
        api = kube.connect(config(tmp_path, address))
        api.create(manifest, dry_run=True)
        api.apply(manifest, manager="m")
        api.impersonating("system:serviceaccount:a:b").delete("Pod", "x", "a", grace_s=0)
    (create, apply, delete) = asked
    assert create[:2] == ("POST", "/api/v1/namespaces/a/pods?dryRun=All")
    assert create[2]["authorization"] == "Bearer t0ken"
    assert apply[:2] == ("PATCH", "/api/v1/namespaces/a/pods/x?fieldManager=m&force=true")
    assert apply[2]["content-type"] == "application/apply-patch+yaml"
    assert delete[:2] == ("DELETE", "/api/v1/namespaces/a/pods/x")
    assert delete[2]["impersonate-user"] == "system:serviceaccount:a:b"
    assert "impersonate-user" not in create[2]


def test_gone_is_none_and_not_an_error(tmp_path: Path) -> None:
    with server(404, b'{"reason": "NotFound", "message": "no"}') as (address, _):
        api = kube.connect(config(tmp_path, address))
        assert api.get("Pod", "x", "a") is None
        assert api.delete("Pod", "x", "a") is False
