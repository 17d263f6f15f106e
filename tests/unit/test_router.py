"""Routes as data, and the files that Envoy reads. What Envoy does with them is tested in integration/test_serving.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forja.errors import BadInput, Conflict, Damaged, Unavailable
from forja.serving import router
from forja.serving.router import EnvoyRouter, Route
from forja.settings import Settings

BAD = {
    "not 100 together": {"weights": {"blue": 50, "green": 40}},
    "below 0": {"weights": {"blue": 150, "green": -50}},
    "a slot that nobody has": {"weights": {"red": 100}},
    "a mirror that nobody has": {"weights": {"blue": 100}, "mirror": "red"},
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


def test_files_hold_all_models(settings: Settings) -> None:
    envoy = Followed(settings)
    envoy.swap(0, Route(model="digits", weights={"blue": 90, "green": 10}, mirror="green"))
    envoy.swap(0, Route(model="ai4i", weights={"green": 100}))
    cds, rds = files(settings)
    assert [c["name"] for c in cds["resources"]] == ["ai4i-blue", "ai4i-green", "digits-blue", "digits-green"]
    ai4i, digits, rest = rds["resources"][0]["virtual_hosts"][0]["routes"]
    assert [r["match"] for r in (ai4i, digits)] == [{"path_separated_prefix": f"/v2/models/{m}"} for m in ("ai4i", "digits")]
    weights = digits["route"]["weighted_clusters"]["clusters"]
    assert weights == [{"name": "digits-blue", "weight": 90}, {"name": "digits-green", "weight": 10}]
    assert digits["route"]["request_mirror_policies"] == [{"cluster": "digits-green"}]
    assert "request_mirror_policies" not in ai4i["route"]
    assert rest["direct_response"]["status"] == 404
    assert len({port(c) for c in cds["resources"]}) == 4


def test_equal_routes_are_equal_bytes(settings: Settings) -> None:
    envoy = Followed(settings)
    envoy.swap(0, Route(model="digits", weights={"blue": 100}))
    before = files(settings)
    envoy.ensure()
    assert files(settings) == before
    envoy.swap(1, Route(model="digits", weights={"green": 100}))
    assert files(settings)[1]["version_info"] != before[1]["version_info"]


def test_lost_files_come_back(settings: Settings) -> None:
    envoy = Followed(settings)
    envoy.swap(0, Route(model="digits", weights={"blue": 100}))
    before = files(settings)
    (settings.state / "envoy" / "rds.yaml").unlink()
    envoy.ensure()
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
    assert table["virtual_hosts"][0]["request_body_buffer_limit"] == router.BODY_BYTES


def files(settings: Settings) -> tuple[Any, Any]:
    folder = settings.state / "envoy"
    return json.loads((folder / "cds.yaml").read_text()), json.loads((folder / "rds.yaml").read_text())


def port(cluster: Any) -> int:
    found = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["port_value"]
    return int(found)
