"""The errors that Forja raises on purpose, one short tree.

ForjaError
├── BadInput      what a person or a producer gave is wrong; trying again can't help   exit 2
├── Refused       a gate or a guard said no, with its numbers                           exit 3
├── Conflict      somebody else changed it first; look again and retry                  exit 4
├── Unavailable   a service didn't answer; retry later                                  exit 5
├── Damaged       stored bytes are missing or not what their receipt says               exit 6
└── kube.ApiError  the Kubernetes API's own error, its status decides:
                  403 as Refused (3), 409 as Conflict (4), 429 and from 500 as Unavailable (5), any other as BadInput (2)

A message names the thing, the value, what is allowed and what to do. Anything else that escapes is a bug (exit 1).
"""

from __future__ import annotations


class ForjaError(Exception):
    """Base of all errors that Forja raises on purpose.

    Args:
        thing: what is wrong, as a short sentence that names it.
        value: the offending value, shown with ``repr``.
        allowed: what would have been accepted.
        do: what the reader can do about it.
    """

    exit_code: int = 1
    retry: bool = False

    def __init__(self, thing: str, *, value: object = None, allowed: str = "", do: str = "") -> None:
        self.thing, self.value, self.allowed, self.do = thing, value, allowed, do
        parts = [thing if value is None else f"{thing}: got {value!r}"]
        if allowed:
            parts.append(f"allowed: {allowed}")
        if do:
            parts.append(f"to do: {do}")
        super().__init__("; ".join(parts))


class BadInput(ForjaError):
    """What a person or a producer gave is wrong; trying again can't help."""

    exit_code = 2


class Refused(ForjaError):
    """A gate or a guard said no, with its numbers."""

    exit_code = 3


class Conflict(ForjaError):
    """Somebody else changed it first; look again and retry."""

    exit_code = 4
    retry = True


class Unavailable(ForjaError):
    """A service didn't answer; retry later."""

    exit_code = 5
    retry = True


class Damaged(ForjaError):
    """Stored bytes are missing or not what their receipt says."""

    exit_code = 6


BY_EXIT_CODE: dict[int, type[ForjaError]] = {c.exit_code: c for c in (BadInput, Refused, Conflict, Unavailable, Damaged)}
