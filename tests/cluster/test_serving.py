"""Releases as Deployments behind the Gateway API, on the real cluster, while a client asks twenty times a second."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.kit.node import Node
from cluster.kit.places import ROOT, places
from cluster.platform import Platform
from cluster.releases import RULES, ClusterServing, Recorded, account, apply_traffic, at_rest, claimed, elsewhere, secure
from integration.plant import Client
from integration.releases import MODEL
from integration.test_serving import CONTROLS, asked, killed_before_the_proof, raising, refused_by_the_proof

from forja import envs
from forja import kube as k8s
from forja.errors import Conflict, Refused, Unavailable
from forja.kube import ApiError, Kube
from forja.serving import deployments, triton
from forja.serving.gateway_router import GatewayRouter
from forja.serving.router import Route

NAMESPACE = "forja-vision"


@pytest.fixture(scope="module")
def serving(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterServing]:
    """The platform with nothing released; releases of this process have the rights of k8s/access/release.yaml and no more."""
    secure(platform.kube, platform.site)
    apply_traffic(platform.kube)
    models = tmp_path_factory.mktemp("models")
    python = envs.python("ml", platform.settings)
    subprocess.run([python, ROOT / "tests" / "integration" / "serving_models.py", models, *map(str, range(1, 9))], check=True)
    gateway = platform.site.gateway
    assert gateway is not None
    kubeconfig = account(platform.kube, places().kubeconfig, NAMESPACE, "forja-release", models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(k8s, "connect", lambda: recorded(kubeconfig))
        made = ClusterServing(
            stack=platform, models=models, lake=platform.lake, namespace=NAMESPACE, kube=platform.kube, kubeconfig=kubeconfig,
            router=GatewayRouter(platform.kube, NAMESPACE, gateway, platform.settings.endpoint),
        )  # fmt: skip
        # A run that new data started would release the same model beside these tests.
        platform.until("both DAGs to be at rest", lambda: at_rest(platform), 280)
        made.clean()
        yield made
        made.clean()


def recorded(kubeconfig: Path, connect: Callable[[Path], Kube] = k8s.connect) -> Recorded:
    return Recorded(connect(kubeconfig)._client)


def client(serving: ClusterServing) -> Client:
    return Client(endpoint=serving.endpoint, model=MODEL, sample=serving.golden(1).inputs[:1])


def test_first_release_goes_live_and_again_changes_nothing(serving: ClusterServing) -> None:
    first = serving.release(1)
    assert (first.facts["slot"], first.facts["route"]) == (serving.live(), {"version": 1, "weights": {serving.live(): 100}})
    assert serving.answers(1)
    assert serving.aliases()["champion"] == first.facts["version"]
    before = serving.kube.list("Pod", NAMESPACE)
    again = serving.release(1)
    assert again.path == first.path
    assert serving.router.read(MODEL).version == 1
    assert {p["metadata"]["uid"] for p in serving.kube.list("Pod", NAMESPACE)} == {p["metadata"]["uid"] for p in before}


def test_next_release_is_not_noticed_and_the_last_but_one_goes(serving: ClusterServing) -> None:
    serving.release(1)
    versions, names = [], [serving.live()]
    with client(serving) as asking:
        for seed in (2, 3):
            versions.append(serving.release(seed).facts["version"])
            names.append(serving.live())
            assert serving.answers(seed)
    assert asking.failed == []
    assert len(asking.seconds) > 60
    route = serving.router.read(MODEL)
    assert (route.live, route.before) == (names[2], names[1])
    assert set(serving.deployments()) == set(names[1:])
    assert triton.ready(f"{names[1]}.{NAMESPACE}.svc", MODEL, versions[0]), "what was live before still serves"


def test_wrong_golden_answers_leave_what_is_live(serving: ClusterServing) -> None:
    serving.release(2)
    route, there, aliases = serving.router.read(MODEL), set(serving.deployments()), serving.aliases()
    serving.gate(4, damaged=True)
    with client(serving) as asking, pytest.raises(Refused, match="golden answers"):
        serving.release(4, damaged=True)
    assert asking.failed == []
    assert (serving.router.read(MODEL), set(serving.deployments())) == (claimed(route), there)
    assert serving.answers(2)
    assert serving.aliases()["champion"] == aliases["champion"]


def test_a_model_that_does_not_load_is_refused_with_tritons_reason(serving: ClusterServing) -> None:
    serving.release(2)
    there = set(serving.deployments())
    (serving.models / "99.onnx").write_bytes(b"no model")
    (serving.models / "99.npz").write_bytes((serving.models / "1.npz").read_bytes())
    with pytest.raises(Refused, match=r"(?s)could not load.*INVALID_PROTOBUF"):
        serving.release(99)
    assert set(serving.deployments()) == there
    assert serving.answers(2)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no such image": ({"image": "127.0.0.1:1/nosuch:1"}, r"(?s)container triton doesn't start \((Err)?ImagePull.*nosuch"),
    "an image without a server": ({"image": "forja.test/python:3.11"}, r"(?s)container triton (doesn't start|ended)"),
    "a fetch that fails": ({"fetch_image": "forja.test/python:3.11"}, r"(?s)container fetch (doesn't start|ended)"),
    "more than the node has": ({"cpus": 500.0, "start_s": 5}, "Insufficient cpu"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_pods_that_do_not_start_are_told_and_removed(case: str, serving: ClusterServing, monkeypatch: pytest.MonkeyPatch) -> None:
    serving.release(2)
    route, there = serving.router.read(MODEL), set(serving.deployments())
    changes, message = BROKEN[case]
    elsewhere(monkeypatch, **changes)
    with pytest.raises(Unavailable, match=message):
        serving.release(5)
    assert (serving.router.read(MODEL), set(serving.deployments())) == (claimed(route), there)
    assert serving.answers(2)


def test_a_changed_site_is_proven_beside_what_is_live(serving: ClusterServing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very release that is live, by another image or another pod: what answers clients isn't touched before the proof."""
    serving.release(2)
    live, route = serving.live(), serving.router.read(MODEL)
    image, uids = serving.image(live), {pod["metadata"]["uid"] for pod in serving.pods(live)}
    with client(serving) as asking:
        with monkeypatch.context() as patch:
            elsewhere(patch, image="127.0.0.1:1/nosuch:1")
            with pytest.raises(Unavailable, match="nosuch"):
                serving.release(2)
            elsewhere(patch, image=image, cpus=0.2)
            patch.setattr(triton, "smoke", raising(Refused("wrong answers")))
            with pytest.raises(Refused, match="wrong answers"):
                serving.release(2)
        assert (serving.live(), serving.image(live), set(serving.deployments())) == (live, image, {live, route.before})
        assert {pod["metadata"]["uid"] for pod in serving.pods(live)} == uids
        elsewhere(monkeypatch, cpus=0.2)
        serving.release(2)
    assert asking.failed == []
    assert (serving.live() != live, serving.router.read(MODEL).before) == (True, live)
    assert serving.answers(2)


@pytest.mark.parametrize("passes", [True, False], ids=["the proof passes then", "the proof fails then"])
def test_killed_between_moving_the_requests_and_their_proof(passes: bool, serving: ClusterServing) -> None:
    serving.release(1)
    old = serving.live()
    with client(serving) as asking:
        killed_before_the_proof(serving, 3)
        assert serving.live() != old
        if passes:
            serving.release(3)
        else:
            refused_by_the_proof(serving, 3)
    assert asking.failed == []
    route = serving.router.read(MODEL)
    assert (route.live == old, route.proven) == (not passes, True)
    assert serving.answers(3 if passes else 1)
    assert len(serving.deployments()) == (2 if passes else 1)


def test_two_releases_at_once_end_in_one_of_them(serving: ClusterServing) -> None:
    """Nothing is held between them: the route takes one swap from each version, and the other one is told."""
    for seed in (3, 7):
        serving.gate(seed)
    serving.release(1)
    with client(serving) as asking:
        both = [serving.spawn(3), serving.spawn(7)]
        output = [process.communicate(timeout=200)[0] for process in both]
    print(*output, sep="\n")
    assert asking.failed == []
    ended = [process.returncode for process in both]
    assert 0 in ended, output
    # Conflict, or Unavailable when its servers went while they were asked: both are tried again.
    assert set(ended) <= {0, Conflict.exit_code, Unavailable.exit_code}, output
    assert sorted((serving.answers(3), serving.answers(7))) == [False, True]
    live = 3 if serving.answers(3) else 7
    assert serving.aliases()["champion"] == serving.release(live).facts["version"]
    assert len(serving.deployments()) == 2


def test_a_server_that_is_late_is_told_with_its_log(serving: ClusterServing, monkeypatch: pytest.MonkeyPatch) -> None:
    serving.release(2)
    monkeypatch.setattr(deployments, "LOAD_S", 0.0)
    with pytest.raises(Unavailable, match=r"doesn't serve.*its server runs"):
        serving.release(5)
    assert serving.answers(2)


def test_route_is_compare_and_swap(serving: ClusterServing) -> None:
    serving.release(2)
    route = serving.router.read(MODEL)
    with pytest.raises(Conflict, match="somebody else"):
        serving.router.swap(route.version - 1, Route(model=MODEL, weights={route.before: 100}))
    assert serving.router.read(MODEL) == route


def test_somebody_moves_the_route_during_a_release(serving: ClusterServing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The release is refused and what the other one did stands; a retry goes on with the Deployment that is there."""
    serving.release(2)
    route = serving.router.read(MODEL)
    real = deployments.Deployments.put

    def put(*arguments: Any) -> None:
        real(*arguments)
        serving.router.swap(route.version, route)

    with monkeypatch.context() as patch:
        patch.setattr(deployments.Deployments, "put", put)
        with pytest.raises(Conflict):
            serving.release(5)
    assert serving.router.read(MODEL) == dataclasses.replace(route, version=route.version + 1)
    assert serving.answers(2)
    serving.release(5)
    assert serving.answers(5)
    assert len(serving.deployments()) == 2


@pytest.mark.parametrize("line", ["into deployment", "golden answers", "all requests go"])
def test_killed_release_converges_on_retry(line: str, serving: ClusterServing) -> None:
    seed = {"into deployment": 6, "golden answers": 7, "all requests go": 8}[line]
    serving.release(1)
    serving.gate(seed)
    with client(serving) as asking:
        process = serving.spawn(seed)
        assert process.stdout is not None
        said = []
        for text in process.stdout:
            said.append(text)
            if line in text:
                os.killpg(process.pid, signal.SIGKILL)
                break
        process.wait()
        assert process.returncode == -signal.SIGKILL, "".join(said)
        receipt = serving.release(seed)
    assert asking.failed == []
    assert serving.answers(seed)
    assert len(serving.deployments()) == 2
    assert serving.aliases()["champion"] == receipt.facts["version"]


def test_what_a_hand_did_to_the_live_release_is_repaired(serving: ClusterServing) -> None:
    serving.release(1)
    live, route = serving.live(), serving.router.read(MODEL)
    serving.kube.patch("Deployment", live, {"spec": {"replicas": 0}}, NAMESPACE)
    serving.release(1)
    assert (serving.answers(1), serving.router.read(MODEL)) == (True, route)
    serving.kube.delete("Deployment", live, NAMESPACE)
    serving.release(1)
    assert (serving.answers(1), serving.live()) == (True, live)
    found = serving.kube.get("HTTPRoute", MODEL, NAMESPACE)
    assert found is not None
    (rule,) = found["spec"]["rules"]
    serving.kube.patch("HTTPRoute", MODEL, {"spec": {"rules": [{**rule, "backendRefs": []}]}}, NAMESPACE)
    serving.release(1)
    assert (serving.answers(1), serving.live()) == (True, live)
    serving.kube.delete("HTTPRoute", MODEL, NAMESPACE)
    serving.release(1)
    assert (serving.answers(1), serving.live()) == (True, live)


def test_weights_are_kept_exactly(serving: ClusterServing) -> None:
    versions = [serving.release(seed).facts["version"] for seed in (1, 2)]
    route = serving.router.read(MODEL)
    shared = serving.router.swap(route.version, dataclasses.replace(route, weights={route.live: 90, route.before: 10}))
    body = json.dumps({"inputs": [{"name": "input", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.0] * 64}]}).encode()

    def version() -> str:
        with urllib.request.urlopen(urllib.request.Request(f"{serving.settings.endpoint}/v2/models/{MODEL}/infer", body)) as answer:  # noqa: S310
            return str(json.load(answer)["model_version"])

    found = Counter(version() for _ in range(300))
    serving.router.swap(shared.version, route)
    assert found[versions[1]] == pytest.approx(270, abs=3)
    assert found[versions[0]] == pytest.approx(30, abs=3)


def test_a_mirror_gets_copies_and_its_answers_go_nowhere(serving: ClusterServing) -> None:
    versions = [serving.release(seed).facts["version"] for seed in (1, 2)]
    route = serving.router.read(MODEL)
    there = f"{route.before}.{NAMESPACE}.svc"

    def asked_so_far() -> int:
        with urllib.request.urlopen(f"http://{there}/v2/models/{MODEL}/stats") as answer:
            counts = json.load(answer)["model_stats"][0]["inference_stats"]
            return int(counts["success"]["count"]) + int(counts["fail"]["count"])

    before, inputs = asked_so_far(), serving.golden(1).inputs[:1]
    shared = serving.router.swap(route.version, dataclasses.replace(route, mirror=route.before))
    with triton.Endpoint(serving.endpoint, MODEL) as endpoint:
        answered = {endpoint.ask(inputs)[1] for _ in range(40)}
    serving.stack.until("40 copies", lambda: asked_so_far() == before + 40, 20)
    serving.router.swap(shared.version, route)
    assert answered == {versions[1]}


def test_clients_can_infer_and_look_and_nothing_else(serving: ClusterServing) -> None:
    version = serving.release(1).facts["version"]
    assert {path: asked(serving.endpoint, "GET", path) for path in ("", "/ready", "/stats", f"/versions/{version}/ready")} == {
        "": 200, "/ready": 200, "/stats": 200, f"/versions/{version}/ready": 200,
    }  # fmt: skip
    there = f"{serving.live()}.{NAMESPACE}.svc"
    for path in ("/infer", f"/versions/{version}/infer"):  # without inputs: what Triton says to that
        assert asked(serving.endpoint, "POST", path) == asked(there, "POST", path) != 404
    assert {(m, path): asked(serving.endpoint, m, f"/{path}") for m, path in CONTROLS} == dict.fromkeys(CONTROLS, 404)
    # Must-fail twin: Triton itself lets anybody do it, so it is the gateway that keeps clients out.
    assert [asked(there, m, f"/{path}") for m, path in CONTROLS[:3]] == [200, 200, 200]


def test_of_two_servers_one_may_be_killed_and_one_may_go(serving: ClusterServing, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(monkeypatch, replicas=2)
    asked_directly: set[str] = set()
    real = triton.smoke

    def smoke(address: str, *arguments: Any, **named: Any) -> float:
        asked_directly.add(address)
        return real(address, *arguments, **named)

    monkeypatch.setattr(triton, "smoke", smoke)
    serving.release(1)
    killed, deleted = serving.pods(serving.live())
    assert asked_directly == {serving.endpoint, *(f"{pod['status']['podIP']}:8000" for pod in (killed, deleted))}
    budget = serving.kube.get("PodDisruptionBudget", serving.live(), NAMESPACE)
    assert budget is not None
    assert (budget["status"]["expectedPods"], budget["status"]["disruptionsAllowed"]) == (2, 1)
    with client(serving) as asking:
        container = killed["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
        node.ctr("tasks", "kill", "--signal", "SIGKILL", container)
        serving.stack.until("the killed one again", lambda: restarted(serving, killed["metadata"]["name"]))
        serving.kube.delete("Pod", deleted["metadata"]["name"], NAMESPACE)
        serving.release(1)  # waits until both serve
    assert asking.failed == []
    assert len(asking.seconds) > 60


def restarted(serving: ClusterServing, name: str) -> bool:
    pod = serving.kube.get("Pod", name, NAMESPACE)
    assert pod is not None
    status = pod["status"]["containerStatuses"][0]
    return bool(status["restartCount"] and status["ready"])


DENIED: dict[str, Callable[[Kube], object]] = {
    "read the Secrets": lambda api: api.list("Secret", NAMESPACE),
    "read one of them": lambda api: api.get("Secret", "forja-lake", NAMESPACE),
    "make a pod": lambda api: api.create({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "p", "namespace": NAMESPACE}}),
    "run something in a pod": lambda api: api.request("POST", f"/api/v1/namespaces/{NAMESPACE}/pods/p/exec?command=id"),
    "delete a route": lambda api: api.delete("HTTPRoute", MODEL, NAMESPACE),
    "delete a Service": lambda api: api.delete("Service", "s", NAMESPACE),
    "give itself rights": lambda api: api.patch("RoleBinding", "forja-release", {"subjects": []}, NAMESPACE),
    "look into another tenant's namespace": lambda api: api.list("Deployment", "forja-maintenance"),
    "serve in another tenant's namespace": lambda api: api.patch("HTTPRoute", "ai4i", {}, "forja-maintenance"),
    "look at the gateway's": lambda api: api.get("Gateway", "models", "forja-gateway"),
    "look at all namespaces": lambda api: api.list("Deployment"),
}


@pytest.mark.parametrize("what", DENIED)
def test_the_release_stage_may_not(what: str, serving: ClusterServing, request: pytest.FixtureRequest) -> None:
    api = Kube(recorded(serving.kubeconfig)._client)
    assert api.list("Deployment", NAMESPACE), "it may do its own work"
    with pytest.raises(ApiError) as caught:
        DENIED[what](api)
    assert (caught.value.status, caught.value.reason) == (403, "Forbidden")
    assert f"system:serviceaccount:{NAMESPACE}:forja-release" in caught.value.message


def test_the_release_stage_may_do_what_it_needs_and_no_more(serving: ClusterServing) -> None:
    """Runs last: all that the releases of this file asked for."""
    assert Recorded.asked == RULES
