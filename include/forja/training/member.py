"""A member of a gang other than 0: it starts its ranks beside those of member 0, and keeps nothing.

It takes no claim and writes no receipt. It brings the dataset, which its arguments name and whose digests are checked; the network,
the epoch to go on from and all else come from member 0's rank when the ranks have met.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from forja.errors import BadInput
from forja.lake import Lake
from forja.recipes.base import Recipe
from forja.settings import Settings
from forja.stages import harness, train
from forja.stages.base import Work
from forja.training import launch

LOOK_S = 2.0
"""Seconds between two looks for a receipt that makes this member needless."""


def follow(settings: Settings, verb: str, recipe: Recipe, refs: harness.Refs, *, code: str = "") -> None:
    """Train with the others until member 0 needs no more help: the ranks have ended, or the receipt is there.

    Raises:
        BadInput: another stage than train, or another code than member 0's.
        ForjaError: a rank failed here, or another did so that this one could not go on.
    """
    me = launch.member()
    if verb != "train":
        raise BadInput("stage of a gang", value=verb, allowed="train")
    lake = Lake(settings.lake)
    prepared = harness.prepare(lake, verb, recipe, refs)
    if code and code != prepared.code:
        raise BadInput(f"code of stage {verb}", value=prepared.code, allowed=code, do="build the image from the commit that Airflow runs")
    if prepared.receipt is not None:
        print(f"member {me.index}: the receipt is there, nothing to do", flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="forja-member-") as folder:
        work = Work(
            settings=settings, lake=lake, folder=prepared.folder, key=prepared.key, scratch=Path(folder), check=lambda: None
        )  # fmt: skip
        handout = train.hand_out(work, work.receipt(prepared.plan.input("dataset")), me, None)
        count = launch.ranks(recipe.training, me)
        work.say(f"member {me.index} of {me.nodes}: torchrun with {count} ranks of {launch.threads(count)} threads")
        launch.run(handout, me, count, prepared.key, _needless(lake, prepared.folder))
        work.say(f"member {me.index} of {me.nodes}: done")


def _needless(lake: Lake, folder: str) -> launch.Look:
    """Tells whether the receipt is there, asking the lake now and then."""
    asked = time.monotonic()

    def look() -> bool:
        nonlocal asked
        if time.monotonic() - asked < LOOK_S:
            return False
        asked = time.monotonic()
        return harness.existing(lake, folder) is not None

    return look
