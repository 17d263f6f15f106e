"""The commands of the security baseline: baseline assert, plan, apply and remove."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forja.cli import cluster
from forja.cli.cluster import Context, Json, Kubeconfig, connect

if TYPE_CHECKING:
    from forja.sites import Site

Team = Annotated[str, typer.Option("--tenant", help="Of this team only; of all when left out.")]
Adopt = Annotated[bool, typer.Option("--adopt", help="Take over objects of the same names that somebody else made.")]


def register(app: typer.Typer) -> None:
    """Put baseline on ``app``."""
    commands = typer.Typer(no_args_is_help=True, help="Pod Security, network policies and GPU quotas of the tenants of a cluster.")
    commands.command("assert", help="Prove each control: calls that must succeed, and twins that must be refused.")(prove)
    commands.command("plan", help="Show what apply would change.")(plan)
    commands.command("apply", help="Install what is missing, mend what differs, delete what is no longer wanted.")(apply)
    commands.command("remove", help="Take off what apply installed.")(remove)
    app.add_typer(commands, name="baseline")


def prove(
    tenant: Team = "",
    image: Annotated[str, typer.Option("--probe-image", help="Image of the probes' pods, with python3.")] = "",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the probes that passed too.")] = False,
    kubeconfig: Kubeconfig = None,
    context: Context = "",
    json_: Json = False,
) -> None:
    """Exit status 0 only when every control passes; 3 otherwise."""
    from forja.baseline import report
    from forja.baseline.probes import Verdict
    from forja.errors import Refused

    site = _site()
    found = report.prove(connect(kubeconfig, context), site, tenant, image=image)
    if json_:
        print(json.dumps(found.facts()))
    else:
        print("\n".join(found.lines(all_probes=verbose)))
        print(f"{found.verdict.upper()} in {found.seconds:.0f} s")
    if found.verdict is not Verdict.PASS:
        raise typer.Exit(Refused.exit_code)


def plan(
    tenant: Team = "",
    adopt: Adopt = False,
    yaml: Annotated[bool, typer.Option("--yaml", help="Print the objects as they would be applied; asks no cluster.")] = False,
    kubeconfig: Kubeconfig = None,
    context: Context = "",
    json_: Json = False,
) -> None:
    """Print the difference between the baseline and the cluster."""
    from forja.baseline import manifests
    from forja.baseline import plan as plans

    site = _site()
    if yaml:
        from yaml import safe_dump_all

        objects = [o for t in manifests.tenants(site, tenant) for o in manifests.render(site, t)]
        print(safe_dump_all(objects, sort_keys=False), end="")
        return
    kube = connect(kubeconfig, context)
    _show(plans.plan(kube, site, tenant, adopt=adopt), json_)
    # Beside the changes, not among the changes: nothing here does anything about them.
    for line in [] if tenant else plans.left(kube, site):
        print(line, file=sys.stderr if json_ else sys.stdout)


def apply(tenant: Team = "", adopt: Adopt = False, kubeconfig: Kubeconfig = None, context: Context = "", json_: Json = False) -> None:
    """Apply the plan, and print it."""
    from forja.baseline import plan as plans

    site, kube = _site(), connect(kubeconfig, context)
    changes = plans.plan(kube, site, tenant, adopt=adopt)
    plans.apply(kube, changes)
    _show(changes, json_)


def remove(
    tenant: Team = "",
    namespaces: Annotated[bool, typer.Option("--namespaces", help="Delete the tenants' namespaces too, with all that is in them.")] = False,
    kubeconfig: Kubeconfig = None,
    context: Context = "",
    json_: Json = False,
) -> None:
    """Remove, and print what was removed."""
    from forja.baseline import plan as plans

    site = _site()
    gone = plans.remove(connect(kubeconfig, context), site, tenant, namespaces=namespaces)
    if json_:
        print(json.dumps({"removed": gone}))
    else:
        print("\n".join(f"- {name}" for name in gone) or "nothing of the baseline is there")


def _site() -> Site:
    """The site of FORJA_SITE; BadInput when it has nothing to secure."""
    from forja.baseline import manifests

    site = cluster.site()
    manifests.parts(site)
    return site


def _show(changes: list[Any], json_: bool) -> None:
    if json_:
        print(json.dumps([{"verb": c.verb, "object": c.name, "fields": list(c.fields)} for c in changes]))
    else:
        print("\n".join(line for c in changes for line in c.lines()) or "no difference")
