"""The images that buildah made from k8s/images/Dockerfile, as a tenant's pods run them: restricted, their root file system read-only.

``python -m cluster.kit images`` builds them first: in here there is no way to a package index. What a step cost is in its report.
"""

from __future__ import annotations

import json
import os
import re
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cluster import restricted
from cluster.kit import image_archive, image_base, images
from cluster.kit.node import Node
from cluster.kit.places import Places

from forja import keys, stages
from forja.kube import Kube
from forja.recipes.base import STAGES

PROBE = (Path(__file__).parent / "image_probe.py").read_text()
IMPORTS = {
    "control": ("airflow", "mlflow", "kafka", "deltalake", "obstore", "pyarrow", "psycopg2", "kubernetes"),
    "ml": ("torch", "torchvision", "nvidia.dali", "polars", "onnxruntime", "sklearn", "deltalake", "mlflow", "tritonclient.http"),
    "serving": ("numpy", "onnxruntime", "supervisor"),
}
"""Main packages of each environment."""

SPEC = {
    "securityContext": {
        "runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001, "seccompProfile": {"type": "RuntimeDefault"},
    },
    "volumes": [{"name": "tmp", "emptyDir": {}}],
}  # fmt: skip

UNWANTED = re.compile(r"index|cert|ssl|proxy|token|secret|password", re.IGNORECASE)
"""No variable of an image is called so."""


def pod(namespace: str, image: str, command: list[str], name: str) -> dict[str, Any]:
    """A restricted pod of one of our images; /tmp is all that it can write to."""
    made = restricted.pod(namespace, "", name=name, labels={"app": name}, spec=SPEC)
    (container,) = made["spec"]["containers"]
    container |= {"image": images.ref(image), "command": command, "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}]}  # noqa: S108
    return made


def problems(facts: dict[str, Any], image: str) -> Iterator[str]:
    """What is wrong with an image, by what it says of itself from the inside."""
    if facts["user"] != [10001, 10001]:
        yield f"it runs as {facts['user']}"
    if facts["writable"] != ["/tmp"]:  # noqa: S108
        yield f"it can write to {facts['writable']}"
    for kind, paths in facts["root"].items():
        if paths:
            yield f"{kind}: {paths}"
        if len(facts["planted"][kind]) != 1:
            yield f"the probe finds no {kind}"
    if facts["secrets"]:
        yield f"secrets of the build: {facts['secrets']}"
    if facts["strangers"] or not facts["a_stranger"]:
        yield f"{facts['strangers']} certificates of another machine (the probe knows {facts['a_stranger']})"
    if facts["environments"] != (["ml", "serving"] if image == "ml" else [image]) or not facts["prefix"].startswith("/opt/forja-cache/"):
        yield f"environments {facts['environments']} where it should be {image}; Python's is {facts['prefix']}"
    if missing := [path for path, there in facts["named"].items() if not there]:
        yield f"the code names what Dockerfile.dockerignore keeps out: {missing}"
    for verb, digest in facts["code"].items():
        if digest != keys.code_digest(f"forja.stages.{verb}", stages.load(verb).STAGE.environment):
            yield f"other code than this checkout's: stage {verb}"
    if not {"k8s/baseline", "include/sites"} <= facts["named"].keys():
        yield "the probe doesn't know which files the code names"
    if facts["code"].keys() != set(STAGES) or facts["seconds"].keys() != set(IMPORTS[image]):
        yield "the probe didn't look at everything"


@pytest.fixture(scope="module")
def seen() -> dict[str, dict[str, Any]]:
    """What the probe said, by image."""
    return {}


@pytest.mark.parametrize("image", images.TARGETS)
def test_an_image_from_the_inside(kube: Kube, tenant: Callable[..., str], seen: dict[str, dict[str, Any]], image: str) -> None:
    namespace = tenant()
    kube.create(pod(namespace, image, ["python", "-c", PROBE, *IMPORTS[image]], "probe"))
    state = restricted.wait("the probe's end", lambda: ended(kube, namespace), 300)
    said = restricted.log(kube, namespace, "probe")
    assert state["exitCode"] == 0, said[-3000:]
    seen[image] = json.loads(said.splitlines()[-1])
    print(f"image {image}: imports took {seen[image]['seconds']} s")
    assert list(problems(seen[image], image)) == []


def ended(kube: Kube, namespace: str) -> dict[str, Any] | None:
    found = kube.get("Pod", "probe", namespace) or {}
    states = [c["state"] for c in found.get("status", {}).get("containerStatuses", [])]
    waiting = next((s["waiting"]["reason"] for s in states if "waiting" in s), "")
    assert not waiting.startswith(("ErrImage", "ImagePull", "Create")), waiting
    return next((s["terminated"] for s in states if "terminated" in s), None)


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "root": lambda f: f.update(user=[0, 0]),
    "a writable root": lambda f: f["writable"].append("/"),
    "a setuid program": lambda f: f["root"]["setuid"].append("/usr/bin/su"),
    "pip's settings": lambda f: f["root"]["tools"].append("/etc/pip.conf"),
    "a blind probe": lambda f: f["planted"]["setuid"].clear(),
    "a secret": lambda f: f["secrets"].append("pip.conf"),
    "another machine's certificate": lambda f: f.update(strangers=1),
    "no bundle at all": lambda f: f.update(a_stranger=0),
    "no environment": lambda f: f["environments"].clear(),
    "the system's Python": lambda f: f.update(prefix="/usr"),
    "a folder less": lambda f: f["named"].update({"k8s/mig/layouts.yaml": False}),
    "a probe that reads no code": lambda f: f["named"].clear(),
    "other code": lambda f: f["code"].update(train="0" * 64),
    "a package less": lambda f: f["seconds"].popitem(),
}


@pytest.mark.parametrize("change", BROKEN)
def test_what_is_wrong_with_an_image_is_found(seen: dict[str, dict[str, Any]], change: str) -> None:
    facts = json.loads(json.dumps(seen["control"]))
    BROKEN[change](facts)
    assert len(set(problems(facts, "control")) - set(problems(seen["control"], "control"))) == 1


@pytest.mark.parametrize("image", images.TARGETS)
def test_an_image_says_nothing_of_the_machine_that_built_it(node: Node, image: str) -> None:
    digest = image_archive.held(node).images[images.ref(image)]
    text = node.ctr("content", "get", digest)
    config = json.loads(text)
    variables = dict(v.split("=", 1) for v in config["config"]["Env"])
    assert not [v for v in variables if UNWANTED.search(v)]
    assert UNWANTED.search("UV_INDEX_URL")
    assert "://" not in text
    assert config["config"]["User"] == "10001:10001"
    assert any("--mount=type=secret" in step["created_by"] for step in config["history"]), "the history is that of our Dockerfile"


def test_triton_starts_with_an_empty_repository(kube: Kube, tenant: Callable[..., str]) -> None:
    namespace = tenant()
    command = ["sh", "-c", "mkdir /tmp/models && exec python -m forja.serving.server /tmp/models"]
    made = pod(namespace, "serving", command, "triton")
    made["spec"]["containers"][0]["env"] = [{"name": "FORJA_STATE", "value": "/tmp/forja"}]  # noqa: S108
    kube.create(made)
    address = restricted.wait("Triton's pod", lambda: address_of(kube, namespace))
    restricted.wait("Triton", lambda: status(f"http://{address}:8000/v2/health/ready") == 200)
    assert status(f"http://{address}:8000/v2/models/none/ready") == 400
    for port in (8001, 8002):
        assert status(f"http://{address}:{port}/") == 0, "gRPC and the metrics don't leave the pod"


def address_of(kube: Kube, namespace: str) -> str:
    found = kube.get("Pod", "triton", namespace) or {}
    if found.get("status", {}).get("phase") in ("Failed", "Succeeded"):
        pytest.fail(restricted.log(kube, namespace, "triton")[-3000:])
    return str(found.get("status", {}).get("podIP") or "")


def status(url: str) -> int:
    """Status of an answer; 0 when there is none."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_only_layers_that_containerd_lacks_are_sent(node: Node) -> None:
    name = images.ref("serving")
    have, wanted = image_archive.held(node), image_base.identity(node.places, name)
    assert have.images[name] == wanted, "the cluster runs another build: python -m cluster.kit images"
    with image_archive.exported(node, name, wanted, have) as export:
        assert (export.fresh, export.size) == ((), 0)
        image_archive.send(node, export)
    after = image_archive.held(node)
    assert after.images[name] == wanted
    assert after.layers == have.layers
    *_, last = json.loads(node.ctr("content", "get", wanted))["rootfs"]["diff_ids"]
    fewer = replace(have, layers={k: v for k, v in have.layers.items() if k != last})
    with image_archive.exported(node, name, wanted, fewer) as export:
        assert export.fresh == (have.layers[last]["digest"],)


def test_an_environment_is_on_the_disk_once(node: Node) -> None:
    for name in images.TARGETS:
        marker = f"opt/forja-cache/{name}/forja-complete.json"
        snapshots = node.places.containerd / "io.containerd.snapshotter.v1.overlayfs" / "snapshots"
        unpacked = {p.stat().st_ino for p in snapshots.glob(f"*/fs/{marker}")}
        built = {p.stat().st_ino for p in (node.places.cache / "buildah" / "overlay").glob(f"*/diff/{marker}")}
        # That of an image of its own is; the half gigabyte of serving that the image ml has too is another layer, and a copy.
        assert unpacked & built, name


def test_only_equal_files_are_shared(tmp_path: Path) -> None:
    where = Places(cache=tmp_path)
    built = tmp_path / "buildah" / "overlay" / "x" / "diff" / "opt" / "forja-cache" / "ml"
    unpacked = where.containerd / "io.containerd.snapshotter.v1.overlayfs" / "snapshots" / "7" / "fs" / "opt" / "forja-cache" / "ml"
    for folder in (built, unpacked):
        folder.mkdir(parents=True)
        for name in ("forja-complete.json", "same.py", "newer.py", "other-size.py", "other-mode.py"):
            (folder / name).write_text("text")
            os.utime(folder / name, (1, 1))
    os.utime(unpacked / "newer.py", (2, 2))
    (unpacked / "other-size.py").write_text("longer text")
    os.utime(unpacked / "other-size.py", (1, 1))
    (unpacked / "other-mode.py").chmod(0o600)
    assert image_archive.share(where, "control") == 0
    assert image_archive.share(where, "ml") == 8
    shared = {p.name for p in unpacked.iterdir() if p.stat().st_ino == (built / p.name).stat().st_ino}
    assert shared == {"forja-complete.json", "same.py"}
    (unpacked / "forja-complete.json").unlink()
    (unpacked / "forja-complete.json").write_text("{}")
    assert image_archive.share(where, "ml") == 0, "another environment, not this one"
