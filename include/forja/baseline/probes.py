"""What a proof is: a call that must succeed, its twin that must be refused, and what their answers say together.

A refusal counts only when it comes from the control itself and when the twin, which differs in one thing, got through. Whatever else
happens, a probe that errs, a target that is down, a refusal for another reason, proves nothing and is never taken for a pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

CONTROLS = ("pod-security", "network", "gpu-quota")
"""What the baseline is made of."""


class Verdict(StrEnum):
    """What is known about a control."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    NOT_PROVEN = "not proven"


class Outcome(StrEnum):
    """What came back from one call."""

    SUCCEEDED = "succeeded"
    REFUSED = "refused"
    """The API server said no, or a connection got no answer within its time or was rejected."""
    ERRED = "erred"
    """Anything else: the call says nothing about the control."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One call, and what must come of it."""

    team: str
    control: str
    name: str
    """What is tried, in words; with team and control it is unique."""
    refused: bool
    """Whether it must be refused, or must succeed."""
    reason: str = ""
    """Pattern of a refusal by this very control."""
    witnesses: tuple[str, ...] = ()
    """Names of calls of which one at least must have succeeded, or a refusal says nothing: the twin, or whoever shows that the target
    is up and the path works."""
    also: tuple[str, ...] = ()
    """When there are any, of these too one must have succeeded: they show that the path works where the witnesses show only the target."""
    wrong: str = ""
    """Of a probe that only looks: what it means when it doesn't pass, for people."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back."""

    outcome: Outcome
    said: str
    """The evidence: what was called and what was answered."""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A probe with its answer and what follows."""

    probe: Probe
    answer: Answer
    verdict: Verdict
    why: str
    """One sentence for people."""


MISSING = Answer(outcome=Outcome.ERRED, said="not called")


def judge(probe: Probe, answers: Mapping[str, Answer]) -> Finding:
    """The verdict over one probe.

    Args:
        answers: of all calls, by name; one that isn't there was not called.
    """
    answer = answers.get(probe.name, MISSING)
    seen, path = ([w for w in names if answers.get(w, MISSING).outcome is Outcome.SUCCEEDED] for names in (probe.witnesses, probe.also))
    by_control = answer.outcome is Outcome.REFUSED and bool(re.search(probe.reason, answer.said))

    def found(verdict: Verdict, why: str) -> Finding:
        return Finding(probe=probe, answer=answer, verdict=verdict, why=why)

    if answer.outcome is Outcome.ERRED:
        return found(Verdict.NOT_PROVEN, "the probe itself failed")
    if answer.outcome is Outcome.SUCCEEDED:
        through = "it is as it must be" if probe.wrong else "it got through, as it must"
        return found(Verdict.FAIL, "it got through") if probe.refused else found(Verdict.PASS, through)
    if not by_control:
        return found(Verdict.NOT_PROVEN, "it was refused for another reason")
    for names, ok in ((probe.witnesses, seen), (probe.also, path)):
        if names and not ok:
            return found(Verdict.NOT_PROVEN, f"it was refused, but so was, or failed, all that should get through: {'; '.join(names)}")
    if probe.refused:
        return found(Verdict.PASS, f"refused, while this got through: {seen[0]}" if seen else "refused")
    return found(Verdict.FAIL, probe.wrong or "the control refuses what it must let through")


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of several together; of none it is ``not proven``."""
    found = set(verdicts)
    if Verdict.FAIL in found:
        return Verdict.FAIL
    return Verdict.PASS if found == {Verdict.PASS} else Verdict.NOT_PROVEN
