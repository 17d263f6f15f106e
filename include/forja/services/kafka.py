"""Apache Kafka: one node in KRaft mode that is broker and controller, on this machine's Java."""

from __future__ import annotations

import base64
import shutil
import subprocess
import uuid
from pathlib import Path

from forja import envs
from forja.errors import BadInput, Unavailable
from forja.services import probes
from forja.services.folders import private, secret, write_if_new
from forja.services.program import Port, Program
from forja.settings import Settings

MEMORY = ("-Xms64m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:MaxDirectMemorySize=128m", "-XX:ReservedCodeCacheSize=64m", "-Xshare:auto")
"""Enough for 60,000 records of 1 kB a second on two cores, at about 200 MB."""


def programs(settings: Settings) -> list[Program]:
    """The one program, ready when it answers a metadata request."""
    folder = settings.state / "kafka"
    server = f"127.0.0.1:{settings.ports['kafka']}"
    log = f"-Dlog4j2.configurationFile={envs.FILES / 'log4j2.properties'}"
    return [
        Program(
            name="kafka",
            service="kafka",
            command=(_java(), *MEMORY, log, "-cp", _class_path(settings), "kafka.Kafka", str(folder / "server.properties")),
            cwd=folder,
            ports=tuple(Port(number=settings.ports[s], setting=s) for s in ("kafka", "kafka_controller")),
            ready=lambda started: probes.kafka_ok(server),
            stop_seconds=20,
        )
    ]


def prepare(settings: Settings) -> None:
    """Write the configuration, and format the storage if it is new."""
    folder = private(settings.state / "kafka")
    write_if_new(folder / "server.properties", properties(settings))
    if not (folder / "data" / "meta.properties").is_file():
        cluster = secret(settings, "kafka-cluster-id", _cluster_id)
        tool = [_java(), "-cp", _class_path(settings), "kafka.tools.StorageTool", "format"]
        done = subprocess.run(
            [*tool, "-t", cluster, "-c", str(folder / "server.properties"), "--ignore-formatted"],
            capture_output=True, text=True, check=False, cwd=folder, umask=0o077,
        )  # fmt: skip
        if done.returncode:
            raise Unavailable("Kafka's storage can't be formatted", value=(done.stdout + done.stderr)[-500:])


def properties(settings: Settings) -> str:
    """server.properties of a single node that starts fast and stays small."""
    broker, controller = settings.ports["kafka"], settings.ports["kafka_controller"]
    return "\n".join(
        (
            "process.roles=broker,controller",
            "node.id=1",
            f"controller.quorum.voters=1@127.0.0.1:{controller}",
            f"listeners=PLAINTEXT://127.0.0.1:{broker},CONTROLLER://127.0.0.1:{controller}",
            f"advertised.listeners=PLAINTEXT://127.0.0.1:{broker}",
            "controller.listener.names=CONTROLLER",
            "inter.broker.listener.name=PLAINTEXT",
            "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            f"log.dirs={_escaped(settings.state / 'kafka' / 'data')}",
            "auto.create.topics.enable=false",
            "message.max.bytes=16777216",
            # One node: nothing to replicate to, and few partitions for the books that Kafka keeps itself.
            "offsets.topic.replication.factor=1",
            "offsets.topic.num.partitions=4",
            "transaction.state.log.replication.factor=1",
            "transaction.state.log.min.isr=1",
            "transaction.state.log.num.partitions=4",
            "share.coordinator.state.topic.replication.factor=1",
            "share.coordinator.state.topic.min.isr=1",
            "share.coordinator.state.topic.num.partitions=1",
            # Back 5.5 s after kill -9 instead of 13.3 s.
            "group.initial.rebalance.delay.ms=0",
            "broker.session.timeout.ms=3000",
            "broker.heartbeat.interval.ms=500",
            # Memory: the cleaner's buffer is 128 MiB by default, and threads are meant for many disks and clients.
            "log.cleaner.dedupe.buffer.size=8388608",
            "num.network.threads=2",
            "num.io.threads=4",
            "",
        )
    )


def _java() -> str:
    java = shutil.which("java")
    if java is None:
        raise BadInput("Java", allowed="17 or newer on the PATH", do="apt-get install openjdk-17-jre-headless")
    return java


def _class_path(settings: Settings) -> str:
    return f"{envs.kafka_jars(settings)}/*"


def _cluster_id() -> str:
    """A random id as Kafka's own ``Uuid.randomUuid`` makes them: one that begins with a dash would be read as an option."""
    while (made := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        continue
    return made


def _escaped(path: Path) -> str:
    """A path as a value of a Java properties file."""
    return str(path).replace("\\", "\\\\")
