"""What commands that ask a cluster have in common: which cluster, which site, how they answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from forja.kube import Kube
    from forja.sites import Site

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
Kubeconfig = Annotated[Path | None, typer.Option("--kubeconfig", help="Instead of KUBECONFIG or ~/.kube/config.")]
Context = Annotated[str, typer.Option("--context", help="Of the kubeconfig, instead of its current one.")]


def connect(kubeconfig: Path | None, context: str) -> Kube:
    """The cluster that the options name.

    Raises:
        BadInput: there is no such file or context.
    """
    from forja import kube

    return kube.connect(kubeconfig, context)


def site() -> Site:
    """The site of FORJA_SITE."""
    from forja.settings import Settings
    from forja.sites import load_site

    return load_site(Settings.from_env().site)
