"""A real Kubernetes for the tests, on one machine: built from source, started in namespaces of its own, gone without a trace after.

``python -m cluster.kit up`` is all that a test needs; README.md one folder up says what is real in it and what is simulated.
"""

from __future__ import annotations


class ClusterError(Exception):
    """The cluster can't be built, started or used: what is wrong, and what to do about it."""

    def __init__(self, what: str, do: str = "") -> None:
        super().__init__(f"{what}; to do: {do}" if do else what)
