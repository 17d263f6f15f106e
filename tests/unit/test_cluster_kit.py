"""What drives the test cluster, as far as it needs none: names of builds, small images, refusals."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from cluster.kit import ClusterError, build, down, mkimage, pki, simulated
from cluster.kit.places import Places, places
from cluster.kit.versions import BINARIES
from cryptography.exceptions import InvalidSignature


def digests() -> dict[str, str]:
    return {b.name: build.digest(b) for b in BINARIES}


@pytest.mark.parametrize(
    ("change", "rebuilt"),
    [
        pytest.param("etcd/go.mod", {"etcd"}, id="a pin"),
        pytest.param("fakegpu/main.go", {"fakegpu"}, id="a source"),
        pytest.param("containerd/go.sum", {"containerd", "containerd-shim-runc-v2", "ctr"}, id="three of one module"),
    ],
)
def test_a_change_rebuilds_what_it_is_in_and_nothing_else(
    change: str, rebuilt: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(build.KIT / "go", tmp_path / "go")
    monkeypatch.setattr(build, "KIT", tmp_path)
    before = digests()
    assert before == digests()
    (tmp_path / "go" / change).write_text("\n" + (tmp_path / "go" / change).read_text())
    after = digests()
    assert {name for name in before if before[name] != after[name]} == rebuilt


def test_an_image_made_by_hand_is_the_same_every_time(tmp_path: Path) -> None:
    archives = []
    for folder in ("a", "b"):
        root = tmp_path / folder / "root"
        root.mkdir(parents=True)
        (root / "program").write_text("content")
        mkimage.archive(root, tmp_path / folder / "image.tar", "forja.test/x:1", "/program")
        archives.append((tmp_path / folder / "image.tar").read_bytes())
    assert archives[0] == archives[1]
    with tarfile.open(tmp_path / "a" / "image.tar") as tar:
        index = json.loads(tar.extractfile("index.json").read())  # type: ignore[union-attr]
        (manifest,) = index["manifests"]
        assert manifest["annotations"]["io.containerd.image.name"] == "forja.test/x:1"
        blob = json.loads(tar.extractfile(f"blobs/sha256/{manifest['digest'][7:]}").read())  # type: ignore[union-attr]
        config = json.loads(tar.extractfile(f"blobs/sha256/{blob['config']['digest'][7:]}").read())  # type: ignore[union-attr]
    assert config["config"]["Entrypoint"] == ["/program"]
    assert config["rootfs"]["diff_ids"] == [blob["layers"][0]["digest"]]


def test_a_machine_that_lacks_something_says_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(build, "APT", {"no-such-program": "no-such-package"})
    said = "; ".join(build.missing())
    assert all(word in said for word in ("root", "Go 1.26", "apt-get install no-such-package"))
    with pytest.raises(ClusterError, match="the test cluster needs root"):
        build.build(Places(cache=Path("/nowhere")))


@pytest.mark.parametrize(
    ("other", "refused"),
    [pytest.param("/elsewhere/forja/cluster/run", True, id="another's"), pytest.param("", False, id="one's own")],
)
def test_one_cluster_at_a_time(other: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Places(cache=tmp_path / "cluster")
    marker = tmp_path / "marker.json"
    marker.write_text(json.dumps({"state": other or str(mine.state), "checkout": "/elsewhere/checkout"}))
    monkeypatch.setattr(down, "MARKER", marker)
    if not refused:
        down.only_mine(mine)
        return
    with pytest.raises(ClusterError, match=r"its state in /elsewhere/forja/cluster/run.*FORJA_CACHE=/elsewhere/forja"):
        down.only_mine(mine)


def test_a_cache_that_the_node_cannot_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORJA_CACHE", "/run/forja")
    with pytest.raises(ClusterError, match="FORJA_CACHE"):
        places()


def test_certificates_are_signed_by_their_own_authority(tmp_path: Path) -> None:
    pki.make(tmp_path / "pki")
    config = json.loads((tmp_path / "pki" / "admin.kubeconfig").read_text())
    assert config["clusters"][0]["cluster"]["server"] == pki.API
    assert (tmp_path / "pki" / "admin.kubeconfig").stat().st_mode & 0o077 == 0
    one, other = pki.authority("ca"), pki.authority("ca")
    leaf = pki.signed(one, "somebody")[0]
    leaf.verify_directly_issued_by(one[0])
    with pytest.raises(InvalidSignature):
        leaf.verify_directly_issued_by(other[0])


def test_simulated_nodes_say_what_they_are() -> None:
    for node in simulated.nodes():
        assert node["metadata"]["labels"]["type"] == "kwok"
        assert node["spec"]["taints"] == [simulated.TAINT]
