"""``python -m forja.stages VERB --recipe NAME --in NAME=REF``: what an Airflow task and a pod run.

It prints the command that reproduces it first, progress while it works, and the receipt's path last. The exit status
tells what kind of error ended it (see ``forja.errors``).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from forja import recipes
from forja.errors import BadInput, ForjaError
from forja.recipes.base import STAGES
from forja.settings import Settings
from forja.stages import harness
from forja.training import launch


def main(argv: list[str] | None = None) -> int:
    """Run one stage; the exit status."""
    parser = argparse.ArgumentParser(prog="forja stage", description="Run one stage of a recipe.")
    parser.add_argument("verb", choices=STAGES)
    parser.add_argument("--recipe", required=True)
    parser.add_argument(
        "--in", dest="inputs", action="append", default=[], metavar="NAME=REF", help="an input; a receipt's path, or TABLE@VERSION"
    )
    parser.add_argument("--variant", default="")
    parser.add_argument("--code", default="", help="refuse unless the code has this digest")
    arguments = parser.parse_args(argv)
    # Airflow and Kubernetes end a stage with SIGTERM: leave by an exception, so that the claim is released.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        settings, recipe, refs = Settings.from_env(), recipes.load(arguments.recipe), parse_refs(arguments.inputs)
        if launch.member().index:
            from forja.training import member

            member.follow(settings, arguments.verb, recipe, refs, code=arguments.code)
            return 0
        receipt, written = harness.execute(settings, arguments.verb, recipe, refs, variant=arguments.variant, code=arguments.code)
    except ForjaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    for line in receipt.report:
        print(f"  {line}")
    print("written" if written else "adopted")
    print(f"receipt {receipt.path}", flush=True)
    if file := os.environ.get("FORJA_RECEIPT_FILE"):
        Path(file).write_text(receipt.path)  # a pod's termination message, which its operator reads
    return 0


def parse_refs(items: list[str]) -> dict[str, list[str]]:
    """``["a=x", "b=y", "b=z"]`` as ``{"a": ["x"], "b": ["y", "z"]}``."""
    refs: dict[str, list[str]] = {}
    for item in items:
        name, equals, ref = item.partition("=")
        if not (name and equals and ref):
            raise BadInput("--in", value=item, allowed="NAME=REF")
        refs.setdefault(name, []).append(ref)
    return refs


if __name__ == "__main__":
    sys.exit(main())
