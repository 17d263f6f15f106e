"""Layouts of nodes: the file in k8s/mig, and a strict reader of mig-parted's format."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import yaml

from forja.errors import BadInput
from forja.mig import layouts, planner
from forja.mig.change import Times
from forja.mig.tables import GPUS, Gpu, gpu, of_product

H100 = "0x233010DE"


def test_the_file_is_a_config_map_that_the_operator_takes() -> None:
    body = yaml.safe_load(layouts.PATH.read_text())
    assert (body["kind"], list(body["data"])) == ("ConfigMap", ["config.yaml"])
    assert layouts.parse(body["data"]["config.yaml"]) == layouts.load()


@pytest.mark.parametrize("one", GPUS.values(), ids=lambda g: g.name)
@pytest.mark.parametrize("name", layouts.load())
def test_every_layout_fits_every_gpu_that_it_is_for(name: str, one: Gpu) -> None:
    entries = [e for e in layouts.load()[name] if e.matches(one)]
    assert len(entries) == (one.units == 8 or name != "train-and-serve"), "an entry for each GPU of the table that has a half and slices"
    for entry in entries:
        assert planner.fits(one, entry.instances).layout is not None


@pytest.mark.parametrize(
    ("name", "kind", "count", "offer"),
    [
        ("all-disabled", "h100-80", 8, {"nvidia.com/gpu": 8}),
        ("all-enabled", "h100-80", 8, {}),
        ("small", "h100-80", 2, {"nvidia.com/mig-1g.10gb": 14}),
        ("small", "a30", 2, {"nvidia.com/mig-1g.6gb": 8}),
        ("balanced", "h200", 1, {"nvidia.com/mig-1g.18gb": 2, "nvidia.com/mig-2g.35gb": 1, "nvidia.com/mig-3g.71gb": 1}),
    ],
)
def test_what_a_node_offers(name: str, kind: str, count: int, offer: dict[str, int]) -> None:
    assert layouts.resources(name, layouts.load()[name], gpu(kind), count) == offer


def test_a_gpu_without_an_entry_is_not_guessed() -> None:
    with pytest.raises(BadInput, match="GPU 0 of 4 x a30"):
        layouts.resources("train-and-serve", layouts.load()["train-and-serve"], gpu("a30"), 4)


def written(entries: str, *, version: str = "v1") -> str:
    return f"version: {version}\nmig-configs:\n  mine:\n{textwrap.indent(textwrap.dedent(entries), '  ')}"


def test_entries_for_some_gpus_of_a_node() -> None:
    text = written(f"""
        - {{devices: [0, 1], device-filter: "{H100}", mig-enabled: true, mig-devices: {{1g.10gb+me: 1, 1g.10gb: 0, 3g.40gb: 1}}}}
        - {{devices: [2], mig-enabled: false}}
    """)
    entries = layouts.parse(text)["mine"]
    offer = {"nvidia.com/gpu": 1, "nvidia.com/mig-1g.10gb.me": 2, "nvidia.com/mig-3g.40gb": 2}
    assert layouts.resources("mine", entries, gpu("h100-80"), 3) == offer


GOOD = "- {devices: all, mig-enabled: false}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("a: [", "no YAML", id="no YAML"),
        pytest.param("[]", "mig-configs", id="no mapping"),
        pytest.param(written(GOOD, version="v2"), "allowed: v1", id="version"),
        pytest.param("mig-configs: {}", "version is missing", id="no version"),
        pytest.param("version: v1\nmig-configs: {}", "layouts by name", id="no layouts"),
        pytest.param("version: v1\nmig-configs: {a: []}", "one entry or more", id="no entries"),
        pytest.param("version: v1\nmig-configs: {'a b': [1]}", "value of a label", id="name that no label can hold"),
        pytest.param(written(GOOD) + "\nextra: 1", "unknown field.*extra", id="unknown field above"),
        pytest.param(written("- {devices: all, mig-enabled: false, mig-device: {}}"), "unknown field.*mig-device'", id="unknown field"),
        pytest.param(written("- {mig-enabled: false}"), "devices is missing", id="no devices"),
        pytest.param(written("- {devices: all}"), "mig-enabled is missing", id="no mode"),
        pytest.param(written("- {devices: all, mig-enabled: 'yes'}"), "true or false", id="mode that is no boolean"),
        pytest.param(written("- {devices: some, mig-enabled: false}"), "all, or a list", id="devices"),
        pytest.param(written("- {devices: [0, 0], mig-enabled: false}"), "all, or a list", id="an index twice"),
        pytest.param(written("- {devices: [-1], mig-enabled: false}"), "all, or a list", id="an index below 0"),
        pytest.param(written("- {devices: [true], mig-enabled: false}"), "all, or a list", id="an index that is no number"),
        pytest.param(written("- {devices: all, mig-enabled: true}"), "mig-devices.*nothing", id="enabled without instances"),
        pytest.param(written("- {devices: all, mig-enabled: false, mig-devices: {1g.5gb: 1}}"), "mig-enabled is false", id="disabled with"),
        pytest.param(written("- {devices: all, mig-enabled: true, mig-devices: {1g.5gb: -1}}"), "0 or more", id="count below 0"),
        pytest.param(written("- {devices: all, mig-enabled: true, mig-devices: {1g.5gb: 1.5}}"), "0 or more", id="half an instance"),
        pytest.param(written("- {devices: all, mig-enabled: true, mig-devices: {1g.5gb: 0}}"), "one instance or more", id="all counts 0"),
        pytest.param(written("- {devices: all, mig-enabled: true, mig-devices: {1c.3g.20gb: 1}}"), "compute instances", id="compute"),
        pytest.param(written("- {devices: all, device-filter: H100, mig-enabled: false}"), "0x233010DE", id="filter"),
        pytest.param(written("- {devices: all, device-filter: '0x000010DE', mig-enabled: false}"), "known GPU", id="filter of no GPU"),
        pytest.param(written("- {devices: all, mig-enabled: true, mig-devices: {1g.10gb: 2}}"), "profile on h100", id="no such profile"),
        pytest.param(written("- {devices: all, mig-enabled: true, mig-devices: {1g.10gb: 7}}"), "a100-40 takes at most 4", id="no filter"),
        pytest.param(
            written(f"- {{devices: all, device-filter: '{H100}', mig-enabled: true, mig-devices: {{3g.40gb: 2, 1g.10gb: 1}}}}"),
            "9 memory slices", id="does not fit",
        ),
        pytest.param(written(f"{GOOD}\n- {{devices: [0], mig-enabled: false}}"), "two entries for one", id="two entries for a GPU"),
        pytest.param(written("- {devices: all, devices: all, mig-enabled: false}"), "key is there twice", id="a key twice"),
        pytest.param("kind: ConfigMap\ndata: {config.yml: x}", "config.yaml alone", id="key of the ConfigMap"),
        pytest.param("kind: ConfigMap\ndata: {config.yaml: 'version: v3'}", "mig-configs is missing", id="within the ConfigMap"),
    ],
)  # fmt: skip
def test_bad_files(text: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        layouts.parse(text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="can be read"):
        layouts.load(tmp_path / "none.yaml")


def test_an_unknown_layout_names_those_there_are() -> None:
    with pytest.raises(BadInput, match=r"all-disabled.*balanced"):
        layouts.pick(layouts.load(), "tiny")


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA-H100-80GB-HBM3", "h100-80"), ("NVIDIA-H100-80GB-HBM3-SHARED", "h100-80"), ("NVIDIA-A30", "a30"),
        ("NVIDIA-A100-SXM4-40GB-MIG-1g.5gb", "a100-40"), ("NVIDIA-L40S", ""), ("", ""),
    ],
)  # fmt: skip
def test_products(product: str, name: str) -> None:
    found = of_product(product)
    assert (found.name if found else "") == name


def test_no_two_gpus_share_a_board_or_a_product() -> None:
    for field in ("devices", "products"):
        every = [value for one in GPUS.values() for value in getattr(one, field)]
        assert len(every) == len(set(every))


def test_deadlines_by_environment() -> None:
    assert Times.from_env({}) == Times()
    assert Times.from_env({"FORJA_MIG_TIMES": "drain_s=5, apply_s=0.5"}) == Times(drain_s=5, apply_s=0.5)


@pytest.mark.parametrize("text", ["drain=5", "drain_s", "drain_s=0", "drain_s=-1", "drain_s=x", "drain_s=nan"])
def test_bad_deadlines(text: str) -> None:
    with pytest.raises(BadInput, match="FORJA_MIG_TIMES"):
        Times.from_env({"FORJA_MIG_TIMES": text})
