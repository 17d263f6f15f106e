"""Commands for GPUs that are cut into instances (MIG): plan, diff, assert, apply, revert."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forja.cli import cluster
from forja.cli.cluster import Context, Json, Kubeconfig, connect
from forja.errors import BadInput

if TYPE_CHECKING:
    from forja.kube import Kube
    from forja.mig.change import Change
    from forja.mig.node import Node
    from forja.mig.planner import Layout

GpuName = Annotated[str, typer.Option("--gpu", help="Name of a GPU, for example h100-80.")]
NodeName = Annotated[str, typer.Option("--node", help="Name of a node of the cluster.")]
File = Annotated[Path | None, typer.Option("--layouts", help="Layouts that the cluster's mig-manager knows; k8s/mig/layouts.yaml.")]
Picture = Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw the memory slices.")]
Wanted = Annotated[list[str] | None, typer.Argument(metavar="[PROFILE=COUNT... | LAYOUT]")]
Named = Annotated[str, typer.Argument(metavar="LAYOUT", help="Name of a layout in k8s/mig/layouts.yaml.")]


def register(app: typer.Typer) -> None:
    """Put the commands on ``app``."""
    mig = typer.Typer(no_args_is_help=True, help="GPUs that are cut into instances: what fits, and the change of a node's layout.")
    mig.command("plan", help="Where instances go on a GPU, or why they don't fit; without any, what can be had.")(plan)
    mig.command("diff", help="What leads from one layout to another with the fewest instances destroyed.")(diff)
    mig.command("assert", help="Whether a layout is in force on a node; exit status 3 when not.")(assert_)
    mig.command("apply", help="Cordon, drain, change, verify, uncordon; back to the layout before when a step fails.")(apply)
    mig.command("revert", help="Take back a change that was left half done.")(revert)
    app.add_typer(mig, name="mig")


def plan(
    wanted: Wanted = None, gpu: GpuName = "", node: NodeName = "", svg: Picture = None, layouts: File = None,
    kubeconfig: Kubeconfig = None, context: Context = "", json_: Json = False,
) -> None:  # fmt: skip
    """Plan one GPU from instances, or a node from a layout."""
    bars = _bars(wanted or [], gpu, node, layouts, lambda: connect(kubeconfig, context))
    if bars is None:
        if svg:
            raise BadInput("picture of no instances", value=str(svg), allowed="--svg with PROFILE=COUNT or a layout")
        _offer(gpu, json_)
        return
    title, made = bars
    if svg:
        from forja.mig import picture

        _draw(svg, picture.svg(title, made))
    if json_:
        print(json.dumps({"title": title, "gpus": [{"name": name, **_facts(layout)} for name, layout in made]}))
        return
    _show(title, made)
    if svg:
        print(f"drawn: {svg}")


def _draw(path: Path, picture: str) -> None:
    try:
        path.write_text(picture)
    except OSError as error:
        raise BadInput("file of the picture", value=str(path), allowed=f"a file that can be written ({error.strerror})") from None


def _bars(
    words: list[str], gpu: str, node: str, file: Path | None, reach: Callable[[], Kube]
) -> tuple[str, list[tuple[str, Layout]]] | None:
    """Title and layouts to show; None when nothing is asked for but what a GPU can do. The cluster is asked about nodes alone."""
    from forja.mig import layouts, planner, tables
    from forja.mig import node as nodes

    if bool(gpu) == bool(node):
        raise BadInput("what to plan", value={"gpu": gpu, "node": node}, allowed="either --gpu or --node")
    if gpu:
        kind = tables.gpu(gpu)
        if not words:
            return None
        known = layouts.load(file) if file else layouts.load()
        if len(words) == 1 and "=" not in words[0]:
            entry = layouts.of_gpus(words[0], layouts.pick(known, words[0]), kind, 1)[0]
            return f"{gpu}: {words[0]}", [(gpu if entry.enabled else f"{gpu}, whole", planner.plan(kind, entry.instances))]
        return gpu, [(gpu, planner.plan(kind, _counts(words)))]
    found, known = nodes.look(reach(), node), layouts.load(file) if file else layouts.load()
    name = words[0] if len(words) == 1 else ""
    return f"{found.title}: {name}", nodes.bars(found, name, known)


def _counts(words: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for word in words:
        name, _, number = word.partition("=")
        if not number.isdecimal() or name in counts:
            raise BadInput("instances", value=word, allowed="PROFILE=COUNT, each profile once, for example 1g.10gb=2")
        counts[name] = int(number)
    return counts


def _facts(layout: Layout) -> dict[str, Any]:
    return {"gpu": layout.gpu.name, "pairs": layout.pairs, "counts": layout.counts, "free_slices": layout.free, "command": layout.command}


def _show(title: str, bars: list[tuple[str, Layout]]) -> None:
    from forja.mig import picture

    print("\n".join(picture.text(title, bars)))


def _offer(name: str, json_: bool) -> None:
    """What a GPU can be cut into."""
    from forja.mig import planner, tables

    gpu = tables.gpu(name)
    plain = [n for n, p in gpu.profiles.items() if not set(n) & {"+", "-"}]
    sets = sorted(
        {tuple(x.counts.items()) for x in planner.maximal(gpu, plain)}, key=lambda s: sorted((-gpu.profiles[n].size, -c) for n, c in s)
    )
    if json_:
        profiles = {
            n: {"id": p.id, "starts": p.starts, "size": p.size, "most": p.most, "engines": p.engines} for n, p in gpu.profiles.items()
        }
        print(
            json.dumps({"gpu": name, "units": gpu.units, "profiles": profiles, "full": [dict(s) for s in sets], "inferred": gpu.inferred})
        )
        return
    print(f"{name}: {gpu.units} memory slices" + (f"; inferred: {gpu.inferred}" if gpu.inferred else ""))
    for n, p in gpu.profiles.items():
        engines = ", ".join(f"{count} {engine}" for engine, count in p.engines.items() if count)
        print(
            f"  {n:<16} at most {p.most}, {planner.slices(p.size)} from {', '.join(map(str, p.starts))}"
            + (f"; {engines}" if engines else "")
        )
    print(f"full without attributes, {len(sets)} ways:")
    for one in sets:
        print("  " + " + ".join(f"{count} x {n}" for n, count in one))


def diff(
    wanted: Wanted = None,
    gpu: GpuName = "",
    current: Annotated[str, typer.Option("--from", metavar="PROFILE:START,...", help="What is on the GPU now.")] = "",
    node: NodeName = "",
    layouts: File = None,
    kubeconfig: Kubeconfig = None,
    context: Context = "",
    json_: Json = False,
) -> None:
    """Compare a GPU's instances with wanted ones, or a node with a layout."""
    from forja.mig import picture, planner, tables

    if bool(gpu) == bool(node):
        raise BadInput("what to compare", value={"gpu": gpu, "node": node}, allowed="either --gpu or --node")
    if node:
        _diff_node(connect(kubeconfig, context), node, (wanted or [""])[0], layouts, json_)
        return
    kind = tables.gpu(gpu)
    found = planner.difference(planner.placed(kind, [p for p in current.split(",") if p]), _counts(wanted or []))
    facts = {"keep": list(map(str, found.keep)), "destroy": list(map(str, found.destroy)), "create": list(map(str, found.create))}
    if json_:
        print(json.dumps({"gpu": gpu, **facts, "pairs": found.layout.pairs}))
        return
    for verb, items in facts.items():
        print(f"{verb:<8} {', '.join(items) or 'nothing'}")
    print("then:\n" + "\n".join(f"  {line}" for line in picture.lines(found.layout)))
    if found.create:
        print(f"  {planner.Layout(gpu=kind, instances=found.create).command}")


def _diff_node(kube: Kube, name: str, layout: str, file: Path | None, json_: bool) -> None:
    from forja.mig import drain, layouts
    from forja.mig import node as nodes

    known, found = layouts.load(file) if file else layouts.load(), nodes.look(kube, name)
    pods = [drain.name(p) for p in drain.victims(nodes.pods_on(kube, name))]
    why, offer = nodes.differs(found, layout, known), nodes.wanted(found, layout, known)
    if json_:
        print(json.dumps({**_about(found), "layout": layout, "offers": dict(found.offers), "wanted": offer, "differs": why, "pods": pods}))
        return
    print(found.title)
    for resource in sorted({*found.offers, *offer}):
        now, then = found.offers.get(resource, 0), offer.get(resource, 0)
        print(f"  {'  ' if now == then else '! '}{resource:<28} {now:>4} -> {then}")
    print("\n".join(f"  {line}" for line in why) or f"  layout {layout} is in force")
    if why:
        print(f"  pods that must go: {', '.join(pods) or 'none'}")


def assert_(
    layout: Named, node: NodeName, layouts: File = None, kubeconfig: Kubeconfig = None, context: Context = "", json_: Json = False
) -> None:
    """Say whether a layout is in force."""
    from forja.mig import layouts as files
    from forja.mig import node as nodes

    found = nodes.look(connect(kubeconfig, context), node)
    why = nodes.differs(found, layout, files.load(layouts) if layouts else files.load())
    if json_:
        print(json.dumps({**_about(found), "layout": layout, "in_force": not why, "differs": why}))
    else:
        print(f"{found.title}: layout {layout} is {'not ' if why else ''}in force" + "".join(f"\n  {line}" for line in why))
    raise typer.Exit(3 if why else 0)


def apply(
    layout: Named, node: NodeName, layouts: File = None, kubeconfig: Kubeconfig = None, context: Context = "",
    everything: Annotated[bool, typer.Option("--everything", help="Drain all pods: for nodes that mig-manager may reboot.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Drain pods that nothing starts again, too.")] = False,
    json_: Json = False,
) -> None:  # fmt: skip
    """Change a node's layout."""
    from forja.mig import node as nodes
    from forja.mig import whole

    kube = connect(kubeconfig, context)
    with whole.holder(node) as holder:
        change = _change(node, layout, holder, layouts, everything=everything, force=force)
        outcome = whole.make(kube, change, _say)
    found = nodes.look(kube, node)
    print(json.dumps({**_about(found), "layout": layout, "outcome": outcome}) if json_ else f"{found.title}: {layout}: {outcome}")


def revert(node: NodeName, layouts: File = None, kubeconfig: Kubeconfig = None, context: Context = "", json_: Json = False) -> None:
    """Take back a change whose process died."""
    from forja.mig import node as nodes
    from forja.mig import revert as back
    from forja.mig import whole

    kube = connect(kubeconfig, context)
    with whole.holder(node) as holder:
        done = back.revert(kube, _change(node, "", holder, layouts), _say, adopt=True)
    outcome = "reverted" if done else "nothing to take back"
    print(json.dumps({**_about(nodes.look(kube, node)), "outcome": outcome}) if json_ else outcome)


def _change(node: str, layout: str, holder: str, file: Path | None, **options: bool) -> Change:
    from forja.mig import layouts, probe
    from forja.mig.change import Change, Times

    known, pod = layouts.load(file) if file else layouts.load(), probe.Probe.of_site(cluster.site())
    return Change(node=node, layout=layout, holder=holder, known=known, times=Times.from_env(), probe=pod, **options)


def _about(node: Node) -> dict[str, Any]:
    return {"node": node.name, "gpu": node.gpu.name, "count": node.count, "simulated": node.simulated}


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
