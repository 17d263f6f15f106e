"""``python -m cluster.kit``: build, up, down, status, exec, kubectl, logs, restart, reset-nodes, images."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from typing import Any

import yaml
from cluster.kit import ClusterError, build, down, netns, simulated, up
from cluster.kit.api import Api, Refusal
from cluster.kit.node import Node
from cluster.kit.places import Places, places
from cluster.kit.versions import NODE, NODE_IP

PASS_ON = ("exec", "kubectl", "images")
IN_NETWORK = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'


def main(arguments: list[str]) -> int:
    """One command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.kit", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, meaning in (
        ("missing", "say what this machine lacks for a cluster; status 1 if anything"),
        ("build", "build programs, manifests and small images that aren't there"),
        ("up", "bring the cluster up; nothing when it is"),
        ("down", "stop it and delete its state; images stay"),
        ("reset-nodes", "bring the simulated nodes back to their first labels and resources"),
    ):
        commands.add_parser(name, help=meaning)
    commands.add_parser("status", help="what runs").add_argument("--json", action="store_true")
    for name, meaning in (
        ("exec", "run a command in the cluster's network, asking the cluster's DNS"),
        ("kubectl", "kubectl as administrator"),
    ):
        commands.add_parser(name, help=meaning)
    commands.add_parser("images", help="build the images of Forja and import them")
    for name, meaning in (("logs", "what a process printed"), ("restart", "stop a process and start it again")):
        commands.add_parser(name, help=meaning).add_argument("name")
    # argparse takes options for its own wherever they stand: what follows these three names is for other programs.
    passed_on = arguments[1:] if arguments[:1] and arguments[0] in PASS_ON else []
    given = parser.parse_args(arguments[:1] if passed_on else arguments)
    given.argv = passed_on[1:] if passed_on[:1] == ["--"] else passed_on
    try:
        return _run(given, places())
    except (ClusterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(given: argparse.Namespace, where: Places) -> int:
    command = given.command
    if command == "missing":
        lacking = build.missing()
        print("; ".join(lacking))
        return bool(lacking)
    if command == "build":
        up.prepare(where)
    elif command == "up":
        print(up.up(where))
    elif command == "down":
        print(down.down(where))
    elif command == "status":
        return _status(where, as_json=given.json)
    elif command in ("exec", "kubectl"):
        _exec(where, given.argv if command == "exec" else _kubectl(where, given.argv))
    elif command == "images":
        return int(importlib.import_module("cluster.kit.images").main(given.argv) or 0)
    elif command == "logs":
        sys.stdout.write((where.logs / f"{given.name}.log").read_text(errors="replace"))
    elif command == "restart":
        Node(where).restart(given.name)
    elif command == "reset-nodes":
        netns.enter()
        simulated.reset(Api(where.kubeconfig))
    return 0


def _kubectl(where: Places, argv: list[str]) -> list[str]:
    return [str(build.binary(where, "kubectl")), f"--kubeconfig={where.kubeconfig}", *argv]


def _exec(where: Places, argv: list[str]) -> None:
    """Become the command, in the cluster's network, with a private /etc/resolv.conf."""
    if not argv:
        raise ClusterError("exec needs a command", "exec -- COMMAND ARGUMENTS")
    if not Node(where).first():
        raise ClusterError("the cluster isn't up", "make cluster-up")
    sys.stdout.flush()
    private = ["unshare", "--mount", "--propagation", "private", "sh", "-c", IN_NETWORK, str(where.resolv), *argv]
    os.execvp("nsenter", ["nsenter", f"--net={netns.PATH}", "--", *private])  # noqa: S606 (no shell is wanted)


def _status(where: Places, *, as_json: bool) -> int:
    down.only_mine(where)
    node = Node(where)
    first = node.first()
    processes = {name: node.pid(name) for name in node.names()} if first else {}
    found: dict[str, Any] = {
        "up": bool(first), "kubeconfig": str(where.kubeconfig), "state": str(where.state), "netns": str(netns.PATH),
        "node": NODE, "address": NODE_IP, "processes": processes, "nodes": {}, "versions": _versions(),
    }  # fmt: skip
    if first:
        netns.enter()
        found["nodes"] = _nodes(where)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print(yaml.safe_dump(found, sort_keys=False), end="")
    return 0 if first and all(processes.values()) and all(found["nodes"].values()) else 3


def _nodes(where: Places) -> dict[str, bool]:
    try:
        listed = Api(where.kubeconfig).request("GET", "/api/v1/nodes")["items"]
    except (Refusal, OSError) as error:
        return {f"no answer ({error})": False}
    return {item["metadata"]["name"]: up.ready(item) for item in listed}


def _versions() -> dict[str, str]:
    from cluster.kit import versions

    return {k.lower(): v for k, v in vars(versions).items() if k.isupper() and isinstance(v, str) and v[:1].isdigit() and v.count(".") == 2}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
