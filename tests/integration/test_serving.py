"""Releases on the real Triton, Envoy, MLflow and supervisor, while a client asks twenty times a second."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from integration.conftest import new_stack
from integration.plant import Client
from integration.releases import MODEL, Serving

from forja import envs, receipts
from forja.errors import BadInput, Conflict, Refused, Unavailable
from forja.lake import Lake
from forja.services import probes, supervisor
from forja.services.triton import SLOTS, slot
from forja.serving import repository, rollout, slots, triton
from forja.serving.envoy_router import EnvoyRouter
from forja.serving.router import Route


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with new_stack() as stack:
        stack.need("envoy", "triton", "mlflow")
        models = tmp_path_factory.mktemp("models")
        python = envs.python("ml", stack.settings)
        subprocess.run([python, Path(__file__).with_name("serving_models.py"), models, *map(str, range(1, 9))], check=True)
        yield Serving(stack=stack, models=models, lake=Lake(stack.settings.lake), router=EnvoyRouter(stack.settings))


def test_first_release_goes_live_and_again_changes_nothing(serving: Serving) -> None:
    first = serving.release(1)
    assert first.facts["slot"] == "blue"
    assert first.facts["route"] == {"version": 1, "weights": {"blue": 100}}
    assert serving.answers(1)
    assert serving.aliases() == {"champion": "1"}
    pid = serving.pid("blue")
    again = serving.release(1)
    assert again.path == first.path
    assert serving.pid("blue") == pid
    assert serving.router.read(MODEL).version == 1


def test_repairs_only_what_differs(serving: Serving) -> None:
    serving.release(1)
    route, place = serving.router.read(MODEL), slot(serving.settings, MODEL, serving.router.read(MODEL).live)
    serving.mlflow().delete_registered_model_alias(MODEL, "champion")
    rds = serving.settings.state / "envoy" / "rds.yaml"
    lost = {**json.loads(rds.read_text()), "version_info": "lost", "resources": []}
    rds.with_suffix(".new").write_text(json.dumps(lost))
    rds.with_suffix(".new").rename(rds)
    supervisor.stop_program(serving.settings, place.program)
    serving.release(1)
    assert serving.answers(1)
    assert serving.aliases()["champion"] == "1"
    assert serving.router.read(MODEL) == route


@pytest.mark.parametrize(("patience_s", "killed"), [(60.0, False), (1.0, True)], ids=["it answers later", "it hangs"])
def test_a_live_server_that_is_late_is_not_restarted(
    patience_s: float, killed: bool, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving.release(1)
    live = serving.router.read(MODEL).live
    pid = serving.pid(live)
    monkeypatch.setattr(slots, "PATIENCE_S", patience_s)
    os.kill(pid, signal.SIGSTOP)
    resume = threading.Timer(8, os.kill, (pid, signal.SIGCONT))  # later than one probe waits
    try:
        if not killed:
            resume.start()
        serving.release(1)
    finally:
        resume.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert (serving.pid(live) != pid) is killed
    assert serving.answers(1)


@pytest.mark.parametrize("victim", ["server", "python backend"])
def test_killed_triton_is_not_noticed(victim: str, serving: Serving) -> None:
    serving.release(1)
    live = serving.router.read(MODEL).live
    with Client(endpoint=serving.endpoint, model=MODEL, sample=serving.golden(1).inputs[:1]) as client:
        time.sleep(1)
        for _ in range(2):
            pid = serving.pid(live)
            os.kill(pid if victim == "server" else stub(pid), signal.SIGKILL)
            serving.stack.wait("another Triton", lambda pid=pid: serving.pid(live) not in (0, pid) and serving.answers(1))
            time.sleep(1)
    assert client.failed == []
    assert len(client.seconds) > 60
    print(f"slowest answer {max(client.seconds):.1f} s of {len(client.seconds)}")


def stub(server: int) -> int:
    """Process id of the python backend that a Triton server has started."""
    return next(p.pid for p in psutil.Process(server).children() if "triton_python_backend_stub" in " ".join(p.cmdline()))


def test_without_retries_the_kill_is_noticed(serving: Serving) -> None:
    """Must fail: the same kill with Envoy's retries taken out."""
    serving.release(1)
    live = serving.router.read(MODEL).live
    rds = serving.settings.state / "envoy" / "rds.yaml"
    table = json.loads(rds.read_text())
    for route in table["resources"][0]["virtual_hosts"][0]["routes"]:
        route.get("route", {}).pop("retry_policy", None)
    rds.with_suffix(".new").write_text(json.dumps({**table, "version_info": "no-retries"}))
    rds.with_suffix(".new").rename(rds)
    time.sleep(1)
    with Client(endpoint=serving.endpoint, model=MODEL, sample=serving.golden(1).inputs[:1]) as client:
        time.sleep(0.5)
        pid = serving.pid(live)
        os.kill(pid, signal.SIGKILL)
        time.sleep(1)
    assert client.failed
    serving.release(1)  # puts the recorded routes back


def test_large_requests_survive_a_kill(serving: Serving) -> None:
    """A body above Envoy's default buffer of 1 MiB is kept for a retry too."""
    serving.release(1)
    live = serving.router.read(MODEL).live
    tensor = {"name": "input", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.0] * 64}
    body = json.dumps({"inputs": [tensor]}).encode() + b" " * (2 << 20)
    url = f"{serving.settings.endpoint}/v2/models/{MODEL}/infer"
    os.kill(serving.pid(live), signal.SIGKILL)
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as answer:  # noqa: S310
        assert len(json.load(answer)["outputs"][0]["data"]) == 10


def test_next_release_is_not_noticed(serving: Serving) -> None:
    serving.release(1)
    old = serving.router.read(MODEL).live
    with Client(endpoint=serving.endpoint, model=MODEL, sample=serving.golden(1).inputs[:1]) as client:
        time.sleep(0.5)
        receipt = serving.release(2)
        time.sleep(0.5)
    assert client.failed == []
    assert receipt.facts["slot"] != old
    assert serving.answers(2)
    aliases = serving.aliases()
    assert (aliases["previous"], aliases["champion"]) == (receipt.facts["previous"], receipt.facts["version"])
    assert "challenger" not in aliases
    assert triton.ready(f"127.0.0.1:{slot(serving.settings, MODEL, old).http_port}", MODEL, receipt.facts["previous"])


def test_failing_smoke_test_leaves_what_is_live(serving: Serving) -> None:
    serving.release(2)
    route, aliases = serving.router.read(MODEL), serving.aliases()
    serving.gate(3, damaged=True)
    asking = Client(endpoint=serving.endpoint, model=MODEL, sample=serving.golden(1).inputs[:1])
    with asking as client, pytest.raises(Refused, match="golden answers"):
        serving.release(3, damaged=True)
    assert client.failed == []
    assert serving.router.read(MODEL) == route
    assert serving.answers(2)
    assert serving.aliases()["champion"] == aliases["champion"]
    idle = slot(serving.settings, MODEL, "green" if route.live == "blue" else "blue")
    assert supervisor.processes(serving.settings)[idle.program].state == "stopped"
    assert repository.installed(idle, MODEL) is None


def test_a_model_that_does_not_load_is_refused_with_tritons_reason(serving: Serving) -> None:
    serving.release(2)
    (serving.models / "99.onnx").write_bytes(b"no model")
    (serving.models / "99.npz").write_bytes((serving.models / "1.npz").read_bytes())
    with pytest.raises(Refused, match=r"(?s)could not load.*INVALID_PROTOBUF"):
        serving.release(99)
    assert serving.answers(2)


def envoys_slot(serving: Serving) -> str:
    """The slot to which Envoy itself says that it sends all requests."""
    dump = json.dumps(
        probes.http_json(f"http://127.0.0.1:{serving.settings.ports['envoy_admin']}/config_dump?resource=dynamic_route_configs")
    )
    (found,) = {s for s in SLOTS if f'"name": "{MODEL}-{s}"' in dump}
    return found


def test_a_release_killed_between_record_and_route_costs_the_next_one_nothing(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record says one slot, Envoy uses the other: no release may stop that one."""
    serving.release(1)
    serving.release(2)
    route = serving.router.read(MODEL)
    other = next(s for s in SLOTS if s != route.live)
    serving.router._record(Route(model=MODEL, weights={other: 100}), route.version + 1)
    assert envoys_slot(serving) == route.live
    stopped: list[tuple[str, str]] = []
    real = supervisor.stop_program

    def stop(settings: Any, name: str) -> None:
        stopped.append((name.rpartition("-")[2], envoys_slot(serving)))
        real(settings, name)

    monkeypatch.setattr(supervisor, "stop_program", stop)
    with Client(endpoint=serving.endpoint, model=MODEL, sample=serving.golden(1).inputs[:1]) as client:
        serving.release(3)
    assert client.failed == []
    assert stopped == [(route.live, other)]
    assert serving.answers(3)


def test_version_is_that_of_this_runs_register_receipt(serving: Serving) -> None:
    """The optimize and gate receipts were adopted; MLflow has lost the version that they know, and register made another."""
    old = serving.release(8).facts["version"]
    model = serving.registered_again(8)
    serving.mlflow().delete_model_version(MODEL, old)
    facts = receipts.load(serving.lake, model).facts
    receipt = serving.release(8, model=model)
    assert (receipt.facts["version"], receipt.facts["mlflow_run"]) == (facts["version"], facts["mlflow_run"])
    assert facts["version"] != old
    assert serving.aliases()["champion"] == facts["version"]
    assert serving.answers(8)


def test_a_register_receipt_of_another_model_is_refused(serving: Serving) -> None:
    serving.release(8, model=serving.registered_again(8))
    route, aliases = serving.router.read(MODEL), serving.aliases()
    with pytest.raises(BadInput, match="not the model that the gate judged"):
        serving.release(8, model=serving.gate(1)["model"])
    assert serving.router.read(MODEL) == route
    assert serving.aliases()["champion"] == aliases["champion"]


CONTROLS = [
    ("GET", "config"), ("POST", "trace/setting"), ("GET", "trace/setting"), ("POST", "versions/1/../../trace/setting"), ("GET", "infer"),
    ("POST", "load"), ("POST", "../../repository/models/digits/unload"), ("POST", "../../repository/index"), ("POST", "../../logging"),
]  # fmt: skip


def asked(address: str, method: str, path: str) -> int:
    """Status of a request, its path sent as it is."""
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request(method, f"/v2/models/{MODEL}{path}", body=b"{}" if method == "POST" else None)
        return connection.getresponse().status
    finally:
        connection.close()


def test_clients_can_infer_and_look_and_nothing_else(serving: Serving) -> None:
    version = serving.release(1).facts["version"]
    assert {path: asked(serving.endpoint, "GET", path) for path in ("", "/ready", "/stats", f"/versions/{version}/ready")} == {
        "": 200, "/ready": 200, "/stats": 200, f"/versions/{version}/ready": 200,
    }  # fmt: skip
    place = slot(serving.settings, MODEL, serving.router.read(MODEL).live)
    there = f"127.0.0.1:{place.http_port}"
    for path in ("/infer", f"/versions/{version}/infer"):  # without inputs: what Triton says to that
        assert asked(serving.endpoint, "POST", path) == asked(there, "POST", path) != 404
    assert {(m, path): asked(serving.endpoint, m, f"/{path}") for m, path in CONTROLS} == dict.fromkeys(CONTROLS, 404)
    # Must-fail twin: Triton itself lets anybody do it, so it is the router that keeps clients out.
    assert [asked(there, m, f"/{path}") for m, path in CONTROLS[:3]] == [200, 200, 200]


def test_router_is_compare_and_swap(serving: Serving) -> None:
    serving.release(2)
    route = serving.router.read(MODEL)
    with pytest.raises(Conflict, match="somebody else"):
        serving.router.swap(route.version - 1, Route(model=MODEL, weights={"blue": 50, "green": 50}))
    assert serving.router.read(MODEL) == route


def test_route_comes_back_when_envoy_does_not_take_it(serving: Serving) -> None:
    serving.release(2)
    route = serving.router.read(MODEL)
    supervisor.stop_program(serving.settings, "envoy")
    try:
        with pytest.raises(Unavailable, match="route before is in force"):
            EnvoyRouter(serving.settings, in_force_s=1).swap(route.version, Route(model=MODEL, weights={"blue": 50, "green": 50}))
    finally:
        serving.stack.need("envoy")
    assert serving.router.read(MODEL).weights == route.weights
    assert serving.answers(2)


def test_mlflow_away_delays_the_aliases_only(serving: Serving) -> None:
    serving.release(2)
    serving.gate(4)
    supervisor.stop_program(serving.settings, "mlflow")
    try:
        with pytest.raises(Unavailable, match="MLflow"):
            serving.release(4)
        assert serving.answers(4)
    finally:
        serving.stack.need("mlflow")
    version = serving.router.read(MODEL).version
    receipt = serving.release(4)
    assert serving.router.read(MODEL).version == version
    assert serving.aliases()["champion"] == receipt.facts["version"]


@pytest.mark.parametrize("line", ["into slot", "golden answers", "all requests go"])
def test_killed_release_converges_on_retry(line: str, serving: Serving) -> None:
    seed = {"into slot": 5, "golden answers": 1, "all requests go": 6}[line]
    serving.gate(seed)
    with Client(endpoint=serving.endpoint, model=MODEL, sample=serving.golden(1).inputs[:1]) as client:
        process = serving.spawn(seed)
        assert process.stdout is not None
        for text in process.stdout:
            if line in text:
                os.killpg(process.pid, signal.SIGKILL)
                break
        process.wait()
        assert process.returncode == -signal.SIGKILL
        receipt = serving.release(seed)
    assert client.failed == []
    assert serving.answers(seed)
    assert serving.aliases()["champion"] == receipt.facts["version"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the release's own cleans up after it."""


def killed_before_the_proof(serving: Serving, seed: int) -> None:
    """A release that ends between moving the requests and their proof."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "_through_router", raising(Killed()))
        with pytest.raises(Killed):
            serving.release(seed)
    assert not serving.router.read(MODEL).proven


def refused_by_the_proof(serving: Serving, seed: int) -> None:
    """A release whose answers through the router are wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "_through_router", raising(Refused("wrong answers through the router")))
        with pytest.raises(Refused, match="through the router"):
            serving.release(seed)


def raising(error: BaseException) -> Callable[..., float]:
    def call(*_: object, **__: object) -> float:
        raise error

    return call


@pytest.mark.parametrize("passes", [True, False], ids=["the proof passes then", "the proof fails then"])
def test_killed_between_moving_the_requests_and_their_proof(passes: bool, serving: Serving) -> None:
    serving.release(1)
    old = serving.router.read(MODEL).live
    with Client(endpoint=serving.endpoint, model=MODEL, sample=serving.golden(1).inputs[:1]) as client:
        killed_before_the_proof(serving, 2)
        assert serving.router.read(MODEL).live != old
        if passes:
            serving.release(2)
        else:
            refused_by_the_proof(serving, 2)
    assert client.failed == []
    route = serving.router.read(MODEL)
    assert (route.live == old, route.proven) == (not passes, True)
    assert serving.answers(2 if passes else 1)


def test_two_releases_at_once_end_in_one_of_them(serving: Serving) -> None:
    serving.gate(3)
    serving.gate(7)
    with Client(endpoint=serving.endpoint, model=MODEL, sample=serving.golden(1).inputs[:1]) as client:
        both = [serving.spawn(3), serving.spawn(7)]
        output = [p.communicate(timeout=120)[0] for p in both]
    print(*output, sep="\n")
    assert client.failed == []
    assert [p.returncode for p in both] == [0, 0], output
    assert sorted((serving.answers(3), serving.answers(7))) == [False, True]
