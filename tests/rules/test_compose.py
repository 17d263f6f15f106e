"""docker-compose.yaml says what the code reads: it can't be started without Docker, so it is compared with the code itself.

``problems`` finds what is wrong with a Compose file; what is right comes from settings.py, lake.py and services/, not from a list
kept here. Every variable of the file is also changed and removed, and that must be found.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from forja import envs, recipes
from forja.lake import S3_OPTIONS
from forja.recipes.base import STAGES
from forja.services import airflow, compose_env, container, kafka, mlflow, stack, triton
from forja.settings import PORTS, ROOT, Settings
from forja.sites import load_site

FILE = ROOT / "docker-compose.yaml"
DOCKERFILE = (ROOT / "k8s" / "images" / "Dockerfile").read_text()
SERVICES: dict[str, Any] = yaml.safe_load(FILE.read_text())["services"]
STATE, PROJECT, CACHE = "/var/lib/forja", "/opt/forja", "/opt/forja-cache"

OTHERWISE = {
    "AIRFLOW__API__HOST": "0.0.0.0",  # noqa: S104 - of the container
    "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://airflow-api:{PORTS['airflow']}/execution/",
    "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "see addresses()",
    "FORJA_CACHE": CACHE,
    "FORJA_KAFKA": "see addresses()",
    "FORJA_LAKE": "see addresses()",
    "MLFLOW_TRACKING_URI": "see addresses()",
    "NO_PROXY": "see addresses()",
}
"""What Airflow's containers must have otherwise than one machine."""


class Recorder(dict[str, str]):
    """An environment that remembers what was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return default


@dataclass(frozen=True, kw_only=True)
class Code:
    """What the code wants, its folders named as in the containers."""

    settings: set[str]
    """Variables that Settings reads, apart from ports and the home folder."""
    airflow: Mapping[str, str]
    generated: set[str]
    """Airflow's variables that are secrets: two state folders have different ones."""
    kafka: Mapping[str, str]
    mlflow_command: list[str]
    mlflow_env: Mapping[str, str]
    programs: set[str]
    slots: set[str]
    options: set[str]
    """AIRFLOW__ variables that this version of Airflow knows."""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Code:
    reads = Recorder()
    Settings.from_env(reads)
    plain = Settings.from_env({"FORJA_CACHE": str(Settings.from_env().cache)})
    one, two = (replace(plain, state=tmp_path_factory.mktemp("state")) for _ in range(2))

    def named(text: object, settings: Settings = one) -> str:
        return str(text).replace(str(settings.state), STATE).replace(str(ROOT), PROJECT)

    wanted = {k: named(v) for k, v in airflow.environment(one).items() if not k.startswith(("AIRFLOW_CONN_", "FORJA_PORT_"))}
    again = {k: named(v, two) for k, v in airflow.environment(two).items()}
    properties = dict(line.split("=", 1) for line in kafka.properties(one).splitlines() if line)
    (server,) = mlflow.programs(one)
    spec = find_spec("airflow")
    assert spec is not None
    assert spec.origin is not None
    known = yaml.safe_load((Path(spec.origin).parent / "config_templates" / "config.yml").read_text())
    options = {f"AIRFLOW__{section}__{option}".upper() for section, body in known.items() for option in body["options"]}
    wanted = {k: v for k, v in wanted.items() if not k.startswith("AIRFLOW__") or k in options}
    return Code(
        settings={k for k in reads.asked if not k.startswith("FORJA_PORT_")} - {"HOME", "XDG_CACHE_HOME"},
        airflow=wanted,
        generated={k for k, v in wanted.items() if again[k] != v},
        kafka={f"KAFKA_{k.upper().replace('.', '_')}": named(v) for k, v in properties.items()},
        mlflow_command=["mlflow", *map(named, server.command[2:])],
        mlflow_env=server.env,
        programs={p.name for p in stack.programs(one) if p.service != "triton"},
        slots={p.name for p in triton.programs(one)},
        options=options,
    )


def environment(service: Mapping[str, Any]) -> dict[str, str]:
    return {k: str(v) for k, v in service.get("environment", {}).items()}


def ours(services: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return {n: s for n, s in services.items() if s["image"].startswith("forja/") and n.startswith(prefix)}


def images(services: Mapping[str, Any], code: Code) -> Iterator[str]:
    for name, service in services.items():
        image = str(service["image"])
        if not re.fullmatch(r"[a-z0-9]+(/[a-z0-9-]+)?:v?\d+(\.\d+)+", image):
            yield f"{name}: image {image} is no plain name with a version tag"
        if name in ours(services):
            target = image.partition("/")[2].partition(":")[0]
            if service.get("build", {}).get("target") != target or f" AS {target}\n" not in DOCKERFILE:
                yield f"{name}: its image's target is not built"
            if service.get("cap_drop") != ["ALL"] or "no-new-privileges:true" not in service.get("security_opt", []):
                yield f"{name}: keeps privileges"
    if services["kafka"]["image"] != f"apache/kafka:{envs.KAFKA}":
        yield "kafka: another version than make setup fetches"


def published(services: Mapping[str, Any], code: Code) -> Iterator[str]:
    owners = {"airflow-api": PORTS["airflow"], "mlflow": PORTS["mlflow"], "serving": PORTS["envoy"]}
    for name, service in services.items():
        wanted = [f"127.0.0.1:{owners[name]}:{owners[name]}"] if name in owners else []
        if service.get("ports", []) != wanted:
            yield f"{name}: ports {service.get('ports')}, not {wanted}"


def secret(services: Mapping[str, Any], code: Code) -> Iterator[str]:
    for name, service in services.items():
        for key, value in environment(service).items():
            for part in re.findall(r"\$\{[^}]*\}?", value):
                if not re.fullmatch(r"\$\{FORJA_[A-Z0-9_]+:\?run \S.*\}", part):
                    yield f"{name}: {key}: {part} may be empty, or says not what to do"
            hidden = key in code.generated or re.search(r"(SECRET|PASSWORD|PASSWORDS|JWT|FERNET)(_|$)", key)
            if hidden and not key.endswith("_FILE") and not re.fullmatch(r"\$\{FORJA_\w+:\?[^}]+\}", value):
                yield f"{name}: {key} is a secret in the file"


def variables(services: Mapping[str, Any], code: Code) -> Iterator[str]:
    """Airflow's containers: all that the code reads, nothing that it doesn't, each value as on one machine or as it must be."""
    required = code.settings | (set(S3_OPTIONS) - {"AWS_SESSION_TOKEN"}) | set(code.airflow)
    prepare = set(re.findall(r'_need\(env, "(\w+)"\)', Path(container.__file__).read_text()))
    first = environment(services["airflow-api"])
    for name, service in ours(services, "airflow-").items():
        env = environment(service)
        extra = {"FORJA_AIRFLOW_PASSWORD"} if name == "airflow-init" else set()
        yield from (f"{name}: {key} is missing" for key in sorted((required | extra) - env.keys()))
        yield from (f"{name}: nothing reads {key}" for key in sorted(env.keys() - required - extra - prepare))
        unknown = {k for k in env if k.startswith("AIRFLOW__")} - code.options
        yield from (f"{name}: Airflow knows no {key}" for key in sorted(unknown))
        for key in sorted(env.keys() & code.airflow.keys() - code.generated):
            wanted = OTHERWISE.get(key, code.airflow[key])
            if not wanted.startswith("see") and env[key] != wanted:
                yield f"{name}: {key} is {env[key]}, not {wanted}"
        yield from (f"{name}: {key} is not that of airflow-api" for key in sorted(env.keys() - extra) if env[key] != first.get(key))
    secrets = [first[k] for k in sorted(code.generated) if k in first]
    if len({s.partition(":?")[0] for s in secrets}) != len(secrets):
        yield "two secrets are one"
    for name in (n for n in ours(services) if services[n].get("network_mode") and not n.startswith("airflow-")):
        env = environment(services[name])
        yield from (f"{name}: {key} is not that of airflow-api" for key in ("FORJA_STATE", "FORJA_CACHE") if env.get(key) != first.get(key))
        yield from (f"{name}: nothing reads {key}" for key in sorted(env.keys() - code.settings))
    site = load_site(first["FORJA_SITE"]) if (ROOT / "include" / "sites" / f"{first.get('FORJA_SITE')}.toml").is_file() else None
    for recipe, verb in ((recipes.load(r), v) for r in recipes.names() for v in STAGES):
        if site is None or site.profile(getattr(recipe.profiles, verb)).runner != "local":
            yield f"FORJA_SITE: no local profile for {verb} of {recipe.name}"


def listening(services: Mapping[str, Any]) -> dict[str, str]:
    """Host and port of each server that others ask."""

    def option(name: str) -> str:
        command = services[name].get("command", [])
        return str(command[command.index("--port") + 1]).lstrip(":") if "--port" in command else ""

    broker = re.match(r"PLAINTEXT://:(\d+),", environment(services["kafka"]).get("KAFKA_LISTENERS", ""))
    return {
        "postgres": "postgres:5432", "kafka": f"kafka:{broker[1] if broker else ''}", "mlflow": f"mlflow:{option('mlflow')}",
        "s3": f"s3:{option('s3')}", "airflow-api": f"airflow-api:{environment(services['airflow-api']).get('AIRFLOW__API__PORT')}",
    }  # fmt: skip


def addresses(services: Mapping[str, Any], code: Code) -> Iterator[str]:
    env, there = environment(services["airflow-api"]), listening(services)
    conn = re.sub(r"\$\{(\w+):\?[^}]*\}", r"\1", env.get("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", ""))
    store, database = environment(services["s3"]), environment(services["postgres"])
    user, name = database.get("POSTGRES_USER"), database.get("POSTGRES_DB")
    pairs = {
        "FORJA_KAFKA": (env.get("FORJA_KAFKA"), there["kafka"]),
        "MLFLOW_TRACKING_URI": (env.get("MLFLOW_TRACKING_URI"), f"http://{there['mlflow']}"),
        "AWS_ENDPOINT_URL": (env.get("AWS_ENDPOINT_URL"), f"http://{there['s3']}"),
        "AWS_ALLOW_HTTP": (env.get("AWS_ALLOW_HTTP"), "true"),
        "AWS_REGION": (env.get("AWS_REGION"), store.get("VGW_REGION")),
        "AWS_ACCESS_KEY_ID": (env.get("AWS_ACCESS_KEY_ID"), store.get("ROOT_ACCESS_KEY")),
        "AWS_SECRET_ACCESS_KEY": (env.get("AWS_SECRET_ACCESS_KEY"), store.get("ROOT_SECRET_KEY")),
        "FORJA_LAKE": (bool(re.fullmatch(r"s3://[a-z]+/[a-z]+", env.get("FORJA_LAKE", ""))), True),
        "FORJA_ENDPOINT": (env.get("FORJA_ENDPOINT"), f"http://127.0.0.1:{PORTS['envoy']}"),
        "execution API": (env.get("AIRFLOW__CORE__EXECUTION_API_SERVER_URL"), f"http://{there['airflow-api']}/execution/"),
        "database": (conn, f"postgresql+psycopg2://{user}:FORJA_POSTGRES_PASSWORD@{there['postgres']}/{name}"),
        "POSTGRES_PASSWORD": (database.get("POSTGRES_PASSWORD", "").partition(":?")[0], "${FORJA_POSTGRES_PASSWORD"),
        "NO_PROXY": (set(env.get("NO_PROXY", "").split(",")), {"127.0.0.1", "localhost", *there}),
        "s3": (sorted(store), ["ROOT_ACCESS_KEY", "ROOT_SECRET_KEY", "VGW_REGION"]),
        "postgres": (sorted(database), ["POSTGRES_DB", "POSTGRES_PASSWORD", "POSTGRES_USER"]),
    }
    yield from (f"{what}: {found}, not {wanted}" for what, (found, wanted) in pairs.items() if found != wanted)
    yield from (f"{n} has no address of its own" for n in there if "network_mode" in services[n])


def foreign(services: Mapping[str, Any], code: Code) -> Iterator[str]:
    """Kafka and MLflow are set up as on one machine, apart from addresses and folders."""
    broker, controller = PORTS["kafka"], PORTS["kafka_controller"]
    wanted = {
        **code.kafka,
        "KAFKA_LISTENERS": f"PLAINTEXT://:{broker},CONTROLLER://:{controller}",
        "KAFKA_ADVERTISED_LISTENERS": f"PLAINTEXT://kafka:{broker}",
        "KAFKA_CONTROLLER_QUORUM_VOTERS": f"1@kafka:{controller}",
        "KAFKA_LOG_DIRS": services["kafka"]["volumes"][0].partition(":")[2],
        "KAFKA_HEAP_OPTS": " ".join(kafka.MEMORY[:2]),
    }
    found = environment(services["kafka"])
    yield from (f"kafka: {k} is {found.get(k)}, not {wanted.get(k)}" for k in sorted(wanted | found) if found.get(k) != wanted.get(k))
    command = [str(word) for word in services["mlflow"]["command"]]
    same = [*code.mlflow_command]
    same[same.index("--host") + 1] = "0.0.0.0"  # noqa: S104 - of the container
    hosts = ",".join(f"{h}:{PORTS['mlflow']}" for h in ("mlflow", "127.0.0.1", "localhost"))
    if command != [*same, "--allowed-hosts", hosts]:
        yield f"mlflow: command {command}"
    if environment(services["mlflow"]) != code.mlflow_env:
        yield "mlflow: environment"


def programs(services: Mapping[str, Any], code: Code) -> Iterator[str]:
    """Each program of one machine is a service of that name, runs what it runs there, is watched and comes back."""
    module = ["python", "-m", "forja.services.container"]
    commands = {n: [*module, "slot", n] for n in code.slots} | {"envoy": [*module, "envoy"], "airflow-init": [*module, "prepare"]}
    commands |= {name: ["airflow", *arguments] for name, arguments in airflow.PARTS.items()}
    others = {"postgres", "s3", "airflow-init", "serving"}
    if wrong := set(services) ^ (code.programs | code.slots | others):
        yield f"services: {sorted(wrong)}"
    for name, service in services.items():
        if name in commands and service.get("command") != commands[name]:
            yield f"{name}: command {service.get('command')}"
        inside = name in {*code.slots, "envoy", "airflow-scheduler"}
        if service.get("network_mode") != ("service:serving" if inside else None):
            yield f"{name}: network {service.get('network_mode')}"
        if name in {*code.slots, "envoy", *ours(services, "airflow-")} and f"state:{STATE}" not in service.get("volumes", []):
            yield f"{name}: not the shared state"
        if service.get("restart") != ("no" if name == "airflow-init" else "unless-stopped"):
            yield f"{name}: restart {service.get('restart')}"
        check = service.get("healthcheck", {}).get("test", [])
        if name not in ("serving", "airflow-init") and not check:
            yield f"{name}: no health check"
        if name in commands and name != "airflow-init" and check[-2:] != ["healthy", name]:
            yield f"{name}: health check of another"
        for other, how in service.get("depends_on", {}).items():
            if other not in services or (how["condition"] == "service_healthy" and "healthcheck" not in services[other]):
                yield f"{name}: waits for {other}, which can't be {how['condition']}"


CHECKS = (images, published, secret, variables, addresses, foreign, programs)


def problems(services: Mapping[str, Any], code: Code) -> list[str]:
    return [f"{check.__name__}: {text}" for check in CHECKS for text in check(services, code)]


def test_the_file_is_what_the_code_reads(code: Code) -> None:
    assert "\n".join(problems(SERVICES, code)) == ""


def test_the_file_is_valid_compose() -> None:
    tool = Path(sys.executable).with_name("check-jsonschema")
    done = subprocess.run([tool, "--builtin-schema", "vendor.compose-spec", FILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    services: dict[str, Any] = json.loads(json.dumps(SERVICES))  # no part is shared between services, as anchors would have it
    change(services)
    return services


VARIABLES = [(name, key) for name, service in SERVICES.items() for key in environment(service)]


@pytest.mark.parametrize(("name", "key"), VARIABLES, ids=[f"{n}-{k}" for n, k in VARIABLES])
def test_a_variable_that_is_changed_or_removed_is_found(name: str, key: str, code: Code) -> None:
    assert problems(changed(lambda s: s[name]["environment"].update({key: s[name]["environment"][key] + "0"})), code)
    assert problems(changed(lambda s: s[name]["environment"].pop(key)), code)


def test_a_variable_changed_everywhere_is_found(code: Code) -> None:
    """As an edit of the shared block would: then no two services disagree."""
    free = {"FORJA_LAKE"}  # any bucket and prefix will do
    for key in environment(SERVICES["airflow-api"]).keys() - free:

        def everywhere(services: dict[str, Any], key: str = key) -> None:
            for service in services.values():
                if key in service.get("environment", {}):
                    service["environment"][key] += "0"

        assert problems(changed(everywhere), code), key


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "latest": lambda s: s["postgres"].update(image="postgres:latest"),
    "no tag": lambda s: s["s3"].update(image="versity/versitygw"),
    "a registry's host": lambda s: s["s3"].update(image="registry.example.org/versity/versitygw:v1.8.0"),
    "an invented digest": lambda s: s["kafka"].update(image="apache/kafka:4.2.0@sha256:" + "0" * 64),
    "another Kafka": lambda s: s["kafka"].update(image="apache/kafka:4.1.0"),
    "no such target": lambda s: s["mlflow"].update(image="forja/mlflow:0.1.0"),
    "published to all": lambda s: s["mlflow"].update(ports=["15000:15000"]),
    "published on another port": lambda s: s["airflow-api"].update(ports=["127.0.0.1:8080:18080"]),
    "Kafka published": lambda s: s["kafka"].update(ports=["127.0.0.1:19092:19092"]),
    "a password in the file": lambda s: s["postgres"]["environment"].update({"POSTGRES_PASSWORD": "airflow"}),
    "a default password": lambda s: s["s3"]["environment"].update({"ROOT_SECRET_KEY": "${FORJA_S3_SECRET:-forja}"}),
    "an option that Airflow hasn't": lambda s: s["airflow-api"]["environment"].update(AIRFLOW__CORE__DAG_FOLDER="/x"),
    "a variable that nothing reads": lambda s: s["airflow-api"]["environment"].update(FORJA_LAKES="x"),
    "MLflow on another port": lambda s: s["mlflow"]["command"].__setitem__(5, "5000"),
    "MLflow refuses its own name": lambda s: s["mlflow"]["command"].__setitem__(-1, "localhost"),
    "the lake on another port": lambda s: s["s3"]["command"].__setitem__(1, ":7071"),
    "a slot is missing": lambda s: s.pop("triton-ai4i-green"),
    "a slot serves another": lambda s: s["triton-ai4i-green"]["command"].__setitem__(-1, "triton-ai4i-blue"),
    "a slot is watched as another": lambda s: s["triton-ai4i-green"]["healthcheck"]["test"].__setitem__(-1, "triton-ai4i-blue"),
    "Triton elsewhere": lambda s: s["triton-digits-blue"].pop("network_mode"),
    "the scheduler elsewhere": lambda s: s["airflow-scheduler"].pop("network_mode"),
    "a scheduler without its flag": lambda s: s["airflow-scheduler"]["command"].pop(),
    "no shared state": lambda s: s["envoy"].pop("volumes"),
    "does not come back": lambda s: s["envoy"].pop("restart"),
    "not watched": lambda s: s["kafka"].pop("healthcheck"),
    "waits for nobody": lambda s: s["airflow-api"]["depends_on"].update(redis={"condition": "service_started"}),
    "privileges": lambda s: s["mlflow"].pop("cap_drop"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found(name: str, code: Code) -> None:
    assert problems(changed(BROKEN[name]), code), name


def test_the_images_hold_what_the_locks_name(code: Code) -> None:
    found = dict(re.findall(r"(FORJA_\w+)=(\S+)", DOCKERFILE))
    assert found == {"FORJA_STATE": STATE, "FORJA_CACHE": CACHE}
    assert f"WORKDIR {PROJECT}\n" in DOCKERFILE
    assert re.findall(r"environment\.py (\w+) (\S+)", DOCKERFILE) == [
        ("control", "requirements.txt"), ("ml", "${LOCK}"), ("serving", "k8s/images/serving.txt"),
    ]  # fmt: skip
    assert "--require-hashes" in (ROOT / "k8s" / "images" / "environment.py").read_text()
    assert re.search(r"^ARG BASE=python:3\.1[123]\.\d+-slim-bookworm$", DOCKERFILE, re.MULTILINE)
    finals = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    for target in ("control", "ml", "serving"):
        (stage,) = (s for s in finals if s.split("\n")[0].endswith(f" AS {target}"))
        assert stage.rstrip().endswith("USER 10001:10001"), target


def test_the_locks_hold_what_only_containers_need() -> None:
    control, serving = ((ROOT / p).read_text() for p in ("requirements.txt", "k8s/images/serving.txt"))
    assert re.search(r"^apache-airflow-providers-postgres==", control, re.MULTILINE), "Airflow's database"
    assert re.search(r"^psycopg2-binary==", control, re.MULTILINE), "the driver in AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"
    assert re.search(r"^asyncpg==", control, re.MULTILINE), "Airflow's second engine"
    assert re.search(r"^supervisor==", serving, re.MULTILINE), "each slot's supervisord"


def test_the_context_of_a_build_holds_no_state() -> None:
    lines = [x for x in (ROOT / "k8s/images/Dockerfile.dockerignore").read_text().splitlines() if x and not x.startswith("#")]
    assert lines[0] == "*"
    let_in = {x[1:] for x in lines if x.startswith("!")}
    assert not {x for x in let_in if x.startswith((".", "*"))}
    copies = re.findall(r"^COPY ((?!--).+) \S+$", DOCKERFILE, re.MULTILINE)
    copied = {word for line in copies for word in line.split() if not word.startswith(("$", "."))}
    assert all(any(c == x or c.startswith(f"{x}/") or Path(c).match(x) for x in let_in) for c in copied)
    assert all(list(ROOT.glob(x)) for x in let_in)


def test_generated_passwords_are_kept_and_complete(tmp_path: Path) -> None:
    (tmp_path / "docker-compose.yaml").write_text(FILE.read_text())
    (tmp_path / ".env").write_text("MINE=1\nFORJA_S3_SECRET=kept\nFORJA_JWT_SECRET=\n")
    assert compose_env.main(tmp_path) == 0
    first = (tmp_path / ".env").read_text()
    values = dict(line.split("=", 1) for line in first.splitlines())
    assert (values["MINE"], values["FORJA_S3_SECRET"]) == ("1", "kept")
    assert set(re.findall(r"\$\{(\w+)", FILE.read_text())) == set(values) - {"MINE"}
    assert len(set(values.values())) == len(values)
    assert all(len(v) == (44 if k == "FORJA_FERNET_KEY" else 64) for k, v in values.items() if k not in ("MINE", "FORJA_S3_SECRET"))
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    compose_env.main(tmp_path)
    assert (tmp_path / ".env").read_text() == first
