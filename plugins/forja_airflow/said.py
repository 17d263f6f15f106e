"""What a stage's output says of its failure, whether a process of this machine or a pod wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from forja import errors

ERROR = re.compile(
    rf"(?:[\w.]+\.)?(?:\w*Error|\w*Exception|KeyboardInterrupt|{'|'.join(kind.__name__ for kind in errors.BY_EXIT_CODE.values())})(?:: |$)"
)
"""Beginning of a line that tells what went wrong, as Python and forja.stages print it."""


def why(reason: str, line: str) -> str:
    """What a stage's failure is put down to after one more line: its last error, or its last line while it has told none."""
    return line if ERROR.match(line) or not ERROR.match(reason) else reason


def of(lines: Iterable[str]) -> str:
    """The same of all lines; empty when there is none.

    An error need not come last: a pod's standard output and standard error are two pipes, and nothing keeps their lines in order.
    """
    reason = ""
    for line in lines:
        reason = why(reason, line)
    return reason
