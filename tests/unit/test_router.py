"""Routes as data, and the files that Envoy reads. What Envoy does with them is tested in integration/test_serving.py."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from forja.errors import BadInput, Conflict, Damaged, Unavailable
from forja.serving import envoy_router
from forja.serving.envoy_router import EnvoyRouter
from forja.serving.router import Route
from forja.settings import Settings

BAD = {
    "not 100 together": {"weights": {"blue": 50, "green": 40}},
    "below 0": {"weights": {"blue": 150, "green": -50}},
    "no name of a backend": {"weights": {"Red!": 100}},
    "no name of a mirror": {"weights": {"blue": 100}, "mirror": "a.b"},
}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    # Nothing listens on the admin port: a port of the discard service, which no test starts.
    return Settings.from_env({"FORJA_STATE": str(tmp_path), "FORJA_PORT_ENVOY_ADMIN": "1999", "HOME": str(tmp_path)})


class Followed(EnvoyRouter):
    """Envoy that follows at once: it says that it uses what the files say."""

    def _in_force(self) -> tuple[tuple[str, str], str]:
        folder = self._settings.state / "envoy"
        found = [json.loads((folder / name).read_text())["version_info"] for name in ("cds.yaml", "rds.yaml")]
        return (found[0], found[1]), ""


@pytest.mark.parametrize("name", BAD)
def test_bad_routes(name: str) -> None:
    with pytest.raises(BadInput):
        Route(model="digits", **BAD[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("route", [{"weights": {"red": 100}}, {"weights": {"blue": 100}, "mirror": "red"}], ids=["weight", "mirror"])
def test_envoy_has_two_slots(route: dict[str, Any], settings: Settings) -> None:
    with pytest.raises(BadInput, match="allowed: blue, green"):
        Followed(settings).swap(0, Route(model="digits", **route))
    assert Followed(settings).read("digits") == Route(model="digits")


def test_live_slot() -> None:
    assert Route(model="digits").live == ""
    assert Route(model="digits", weights={"blue": 10, "green": 90}).live == "green"


def test_swap_counts_and_refuses_the_second(settings: Settings) -> None:
    first = Followed(settings)
    assert first.read("digits") == Route(model="digits")
    taken = first.swap(0, Route(model="digits", weights={"blue": 100}))
    assert taken.version == 1
    with pytest.raises(Conflict, match="got 1; allowed: 0"):
        Followed(settings).swap(0, Route(model="digits", weights={"green": 100}))
    assert Followed(settings).read("digits") == taken


def test_envoy_that_does_not_follow_gets_the_old_files_back(settings: Settings) -> None:
    good = Followed(settings).swap(0, Route(model="digits", weights={"blue": 100}))
    before = files(settings)
    with pytest.raises(Unavailable, match="route before is in force again"):
        EnvoyRouter(settings, in_force_s=0.2).swap(1, Route(model="digits", weights={"green": 100}))
    assert files(settings) == before
    after = Followed(settings).read("digits")
    assert (after.weights, after.version) == (good.weights, 3)  # a version is never used for two routes


def test_going_back_stays_written_when_envoy_is_late(settings: Settings) -> None:
    Followed(settings).swap(0, Route(model="digits", weights={"blue": 100}))
    Followed(settings).swap(1, Route(model="digits", weights={"green": 100}, before="blue", proven=False))
    with pytest.raises(Unavailable, match="written, not yet confirmed"):
        EnvoyRouter(settings, in_force_s=0.2).swap(2, Route(model="digits", weights={"blue": 100}), restore=False)
    assert Followed(settings).read("digits") == Route(model="digits", version=3, weights={"blue": 100})
    Followed(settings).ensure("digits")
    assert "digits-blue" in str(files(settings)[1])


def test_proof_is_recorded_without_another_version(settings: Settings) -> None:
    taken = Followed(settings).swap(0, Route(model="digits", weights={"blue": 100}, proven=False))
    before = files(settings)
    assert not Followed(settings).read("digits").proven
    proven = EnvoyRouter(settings).prove(taken)
    assert Followed(settings).read("digits") == proven == dataclasses.replace(taken, proven=True)
    assert files(settings) == before
    Followed(settings).swap(1, Route(model="digits", weights={"green": 100}))
    with pytest.raises(Conflict):
        EnvoyRouter(settings).prove(taken)


def test_a_record_of_before_the_proof_was_recorded_is_proven(settings: Settings) -> None:
    Followed(settings).swap(0, Route(model="digits", weights={"blue": 100}))
    path = settings.state / "envoy" / "routes" / "digits.json"
    record = json.loads(path.read_text())
    del record["proven"]
    path.write_text(json.dumps(record))
    assert Followed(settings).read("digits").proven


def test_files_hold_all_models(settings: Settings) -> None:
    envoy = Followed(settings)
    envoy.swap(0, Route(model="digits", weights={"blue": 90, "green": 10}, mirror="green"))
    envoy.swap(0, Route(model="ai4i", weights={"green": 100}))
    cds, rds = files(settings)
    assert [c["name"] for c in cds["resources"]] == ["ai4i-blue", "ai4i-green", "digits-blue", "digits-green"]
    ai4i, ai4i_get, digits, digits_get, rest = rds["resources"][0]["virtual_hosts"][0]["routes"]
    assert digits["route"] == digits_get["route"]
    assert ai4i["route"] == ai4i_get["route"]
    weights = digits["route"]["weighted_clusters"]["clusters"]
    assert weights == [{"name": "digits-blue", "weight": 90}, {"name": "digits-green", "weight": 10}]
    assert digits["route"]["request_mirror_policies"] == [{"cluster": "digits-green"}]
    assert "request_mirror_policies" not in ai4i["route"]
    assert rest["direct_response"]["status"] == 404
    assert len({port(c) for c in cds["resources"]}) == 4


@pytest.mark.parametrize(
    ("method", "path", "passes"),
    [
        ("POST", "/v2/models/digits/infer", True),
        ("POST", "/v2/models/digits/versions/12/infer", True),
        ("GET", "/v2/models/digits", True),
        ("GET", "/v2/models/digits/ready", True),
        ("GET", "/v2/models/digits/versions/1/ready", True),
        ("GET", "/v2/models/digits/stats", True),
        ("GET", "/v2/models/digits/infer", False),
        ("POST", "/v2/models/digits", False),
        ("POST", "/v2/models/digits/trace/setting", False),
        ("GET", "/v2/models/digits/trace/setting", False),
        ("GET", "/v2/models/digits/config", False),
        ("POST", "/v2/models/digits/versions/../trace/setting", False),
        ("POST", "/v2/models/digits/versions/1/infer/../../../trace/setting", False),
        ("POST", "/v2/models/digits2/infer", False),
        ("POST", "/v2/models/stats/infer", False),
        ("POST", "/v2/repository/models/digits/unload", False),
    ],
)
def test_what_passes_to_a_model(method: str, path: str, passes: bool) -> None:
    """Envoy matches the whole path, as re.fullmatch does."""
    found = [m for m in envoy_router._matches("digits") if re.fullmatch(m["safe_regex"]["regex"], path)]
    assert any(m["headers"] == [{"name": ":method", "string_match": {"exact": method}}] for m in found) is passes


def test_equal_routes_are_equal_bytes(settings: Settings) -> None:
    envoy = Followed(settings)
    envoy.swap(0, Route(model="digits", weights={"blue": 100}))
    before = files(settings)
    envoy.ensure("digits")
    assert files(settings) == before
    envoy.swap(1, Route(model="digits", weights={"green": 100}))
    assert files(settings)[1]["version_info"] != before[1]["version_info"]


def test_lost_files_come_back(settings: Settings) -> None:
    envoy = Followed(settings)
    envoy.swap(0, Route(model="digits", weights={"blue": 100}))
    before = files(settings)
    (settings.state / "envoy" / "rds.yaml").unlink()
    envoy.ensure("digits")
    assert files(settings) == before


def test_damaged_record(settings: Settings) -> None:
    Followed(settings).swap(0, Route(model="digits", weights={"blue": 100}))
    (settings.state / "envoy" / "routes" / "digits.json").write_text("{")
    with pytest.raises(Damaged, match=r"digits\.json"):
        EnvoyRouter(settings).read("digits")


def test_more_retries_at_a_time_than_envoys_three(settings: Settings) -> None:
    Followed(settings).swap(0, Route(model="digits", weights={"blue": 100}))
    (cluster, _), (table,) = (x["resources"] for x in files(settings))
    assert cluster["circuit_breakers"]["thresholds"][0]["max_retries"] >= 1000
    route = table["virtual_hosts"][0]["routes"][0]["route"]
    assert "503" not in str(route["retry_policy"])
    assert table["virtual_hosts"][0]["request_body_buffer_limit"] == envoy_router.BODY_BYTES


def files(settings: Settings) -> tuple[Any, Any]:
    folder = settings.state / "envoy"
    return json.loads((folder / "cds.yaml").read_text()), json.loads((folder / "rds.yaml").read_text())


def port(cluster: Any) -> int:
    found = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["port_value"]
    return int(found)
