"""Stands in for a stage's work in a pod: harness, keys, claims and receipts are real, only ``run`` does what the lake tells it.

It is given to ``python -c`` in the image of the control environment. The object ``tests/<raw version>/does`` says what to do as words:
``wait`` (until ``tests/<raw version>/go`` is there), ``exit=N``, ``eat=MIB``. Each start leaves an object below
``tests/<raw version>/starts``. The image may be of another commit than Airflow: its code's digest is taken to be the wanted one.
"""

from __future__ import annotations

import os
import sys
import time
import uuid

from forja import keys, stages
from forja.stages import __main__
from forja.stages.base import Outcome, Plan, Work

WORDS = sys.argv[1:]
VERSION = next(word for word in WORDS if word.startswith("raw=")).rpartition("@")[2]
CODE = WORDS[WORDS.index("--code") + 1]
LONGEST_S = 240


def run(plan: Plan[object], work: Work) -> Outcome:
    """Do what the lake says, and leave what the next stage would name."""
    place = f"tests/{VERSION}"
    work.lake.create(f"{place}/starts/{uuid.uuid4().hex}", os.environ.get("HOSTNAME", "").encode())
    does = work.lake.get(f"{place}/does").decode().split()
    work.say(f"works on version {VERSION}: {' '.join(does)}")
    deadline = time.monotonic() + LONGEST_S
    while "wait" in does and work.lake.size(f"{place}/go") is None:
        assert time.monotonic() < deadline, "nobody said go"
        work.check()
        time.sleep(0.3)
    kept = []
    for word in does:
        verb, _, number = word.partition("=")
        if verb == "exit":
            print("Unavailable: the service is down; to do: wait", file=sys.stderr)
            sys.exit(int(number))
        if verb == "eat":
            kept.append(b"x" * (int(number) << 20))
    work.say("is done")
    return Outcome(outputs={"out.txt": work.save("out.txt", VERSION.encode())}, metrics={"rows": 3.0}, facts={}, report=["three rows"])


keys.code_digest = lambda *_: CODE
stages.load(WORDS[0]).run = run
sys.exit(__main__.main(WORDS))
