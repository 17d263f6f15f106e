"""Runs a whole change and kills itself right after its Nth write to the API: ``python -m cluster.mig_killed CONFIG NODE LAYOUT N``.

Prints how many writes there were when N is more than that.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from cluster.mig import quick

from forja import kube as k8s
from forja.mig import whole


class Mortal(k8s.Kube):
    """A connection whose process ends with its Nth write."""

    last, writes = 0, 0

    def request(self, method: str, path: str, *arguments: Any, **options: Any) -> Any:
        """The same as any other, and then the end."""
        answer = super().request(method, path, *arguments, **options)
        if method != "GET":
            self.writes += 1
            if self.writes == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
        return answer


def main(config: str, node: str, layout: str, last: str) -> None:
    """Change the node."""
    plain = k8s.connect(Path(config))
    kube = Mortal(plain._client)
    kube.last = int(last)
    with whole.holder(node) as holder:
        whole.make(kube, quick(node, layout, holder), lambda line: print(line, file=sys.stderr))
    print(kube.writes)


if __name__ == "__main__":
    main(*sys.argv[1:])
