"""Stands in for an environment's Python: the harness, keys, claims and receipts are real, only a stage's ``run`` does no work.

FAKE_STAGE, as ``verb=behaviour``, makes one verb behave otherwise: exit:N, refuse, or sleep.
"""

from __future__ import annotations

import os
import sys
import time

from deltalake import DeltaTable

from forja import stages
from forja.stages import __main__
from forja.stages.base import Outcome, Plan, Work

VERB = sys.argv[3]  # python -m forja.stages VERB


def run(plan: Plan[object], work: Work) -> Outcome:
    """Leave what the next stages name."""
    verb, _, behaviour = os.environ.get("FAKE_STAGE", "").partition("=")
    work.say(f"{plan.stage} works for {plan.recipe}")
    if verb == plan.stage and behaviour.startswith("exit:"):
        print("Unavailable: the service is down; to do: wait", file=sys.stderr)
        sys.exit(int(behaviour.removeprefix("exit:")))
    if verb == plan.stage and behaviour == "sleep":
        time.sleep(600)
    facts: dict[str, object] = {"mlflow_run": "abc123" if plan.stage == "train" else None}
    if plan.stage == "ingest":
        table = f"{plan.team}/{plan.recipe}/raw"
        facts["raw"] = f"{table}@{DeltaTable(work.lake.uri(table)).version()}"
    outputs = {"out.txt": work.save("out.txt", f"{plan.stage} {plan.variant}".encode())}
    refused = "int8: accuracy is 0.5, least 0.9" if (verb, behaviour) == (plan.stage, "refuse") else ""
    return Outcome(outputs=outputs, metrics={"rows": 3.0}, facts=facts, report=[f"{plan.stage} is done"], refused=refused)


stages.load(VERB).run = run
sys.exit(__main__.main(sys.argv[3:]))
