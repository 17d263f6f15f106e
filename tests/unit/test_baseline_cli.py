"""Commands that ask a cluster: ``./forja baseline`` and ``./forja mig`` name it in the same way, and say what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from forja.cli import app
from forja.errors import BadInput
from forja.kube import ApiError

BASELINE = ("assert", "plan", "apply", "remove")
MIG = ("plan", "diff", "assert", "apply", "revert")
COMMANDS = [*(("baseline", c) for c in BASELINE), *(("mig", c) for c in MIG)]


@pytest.fixture(autouse=True)
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A site with tenants, and no cluster that a test could meet by accident."""
    monkeypatch.setenv("FORJA_SITE", "small-cluster")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")


def forja(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def asking(command: tuple[str, str]) -> list[str]:
    """A command with what it needs to go and ask the cluster."""
    group, name = command
    more = {"plan": ["balanced", "--node", "n"], "diff": ["balanced", "--node", "n"], "revert": ["--node", "n"]}
    return [*command, *(more.get(name, ["balanced", "--node", "n"]) if group == "mig" else [])]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_lets_the_cluster_be_named(command: tuple[str, str]) -> None:
    said = forja(*command, "--help").stdout
    for option in ("--kubeconfig", "--context", "--json"):
        assert option in said


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_kubeconfig_that_is_not_there_is_named(command: tuple[str, str], tmp_path: Path) -> None:
    error = forja(*asking(command), "--kubeconfig", str(tmp_path / "nowhere")).exception
    assert isinstance(error, BadInput)
    assert f"{tmp_path}/nowhere" in str(error)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_context_that_is_not_there_is_named(command: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump({
        "apiVersion": "v1", "kind": "Config", "current-context": "x", "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}], "users": [{"name": "u", "user": {"token": "t"}}],
    }))  # fmt: skip
    error = forja(*asking(command), "--kubeconfig", str(path), "--context", "mars").exception
    assert isinstance(error, BadInput)
    assert "mars" in str(error)


def test_a_plan_as_yaml_asks_no_cluster() -> None:
    done = forja("baseline", "plan", "--yaml")
    assert done.exit_code == 0
    kinds = [o["kind"] for o in yaml.safe_load_all(done.stdout)]
    assert kinds.count("Namespace") == 2


def test_a_plan_of_one_gpu_asks_no_cluster(tmp_path: Path) -> None:
    assert forja("mig", "plan", "--gpu", "a30", "1g.6gb=2", "--kubeconfig", str(tmp_path / "nowhere")).exit_code == 0


class Forbidden:
    """A cluster in which the account may do nothing."""

    def refuse(self, *_: object, **__: object) -> object:
        raise ApiError("GET /x", 403, "Forbidden", 'User "u" cannot do that')

    get = list = request = apply = delete = create = refuse


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_what_rbac_refuses_ends_with_3(command: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forja.kube.connect", lambda *_, **__: Forbidden())
    done = forja(*asking(command))
    # A proof takes it for what it is, a control that isn't proven, and ends with the same status.
    assert isinstance(done.exception, ApiError) or command == ("baseline", "assert")
    assert (done.exception.exit_code if isinstance(done.exception, ApiError) else done.exit_code) == 3


def test_tenants_that_left_are_told_beside_the_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forja.kube.connect", lambda *_, **__: None)
    monkeypatch.setattr("forja.baseline.plan.plan", lambda *_, **__: [])
    monkeypatch.setattr("forja.baseline.plan.left", lambda *_: ["! Namespace forja-old: why"])
    assert forja("baseline", "plan").stdout == "no difference\n! Namespace forja-old: why\n"
    assert forja("baseline", "plan", "--json").stdout == "[]\n", "JSON holds changes alone"
    assert "forja-old" not in forja("baseline", "plan", "--tenant", "vision").stdout
