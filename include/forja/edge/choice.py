"""Which variant a target gets: the best of those that it runs and that the gate passed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forja.edge.targets import Target
from forja.errors import Refused


def passing(verdict: Mapping[str, Any]) -> list[str]:
    """Variants that passed every rule of a gate, from its verdict.json; one without a rule has passed nothing."""
    judged: dict[str, list[bool]] = {}
    for item in verdict["verdicts"]:
        judged.setdefault(item["variant"], []).append(bool(item["passed"]))
    return [variant for variant, results in judged.items() if all(results) and variant in verdict["models"]]


def candidates(target: Target, verdict: Mapping[str, Any], gate: str) -> list[str]:
    """Variants for a target, best first.

    Raises:
        Refused: the gate refused the model, or passed no variant that the target runs.
    """
    if not verdict.get("chosen"):
        raise Refused("gate chose no variant", value=verdict.get("reason"), do=f"see ./forja show {gate}")
    good = passing(verdict)
    found = [v for v in target.precisions if v in good]
    if not found:
        raise Refused(
            f"no variant for {target.name}: it runs {', '.join(target.precisions)}", value=explained(target.precisions, verdict),
            allowed="one of them, passed by the gate", do="choose another target, or make the variant pass; see ./forja show " + gate,
        )  # fmt: skip
    return found


def explained(variants: Sequence[str], verdict: Mapping[str, Any]) -> str:
    """What the gate said of each variant."""
    said = []
    for variant in variants:
        failed = [i for i in verdict["verdicts"] if i["variant"] == variant and not i["passed"]]
        if variant not in verdict["models"]:
            said.append(f"{variant} was not made")
        elif failed:
            said.append(f"{variant} failed {failed[0]['metric'] or failed[0]['rule']}")
        else:
            said.append(f"{variant} passed")
    return "; ".join(said)
