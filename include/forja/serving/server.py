"""Triton in a pod: ``python -m forja.serving.server REPOSITORY`` in the serving image becomes the server of that repository.

It listens for HTTP on every interface of the pod: network policies decide who reaches it. Only the standard library is imported.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from forja.errors import BadInput, ForjaError
from forja.services import triton
from forja.settings import Settings

PORTS = (8000, 8001, 8002)
"""Ports of HTTP, gRPC and the metrics: Triton's own defaults."""
SHM_PREFIX = "forja_"


def become(settings: Settings, repository: Path) -> None:
    """Replace this process by the server."""
    # A container that is started again keeps the pod's /dev/shm, and what its predecessor left there.
    for file in Path("/dev/shm").glob(f"{SHM_PREFIX}*"):  # noqa: S108 (where shm_open puts them)
        file.unlink(missing_ok=True)
    python = Path(sys.executable)
    triton.make_backends(settings, python)
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = triton.STACK_MIB << 20
    resource.setrlimit(resource.RLIMIT_STACK, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    command = triton.command(settings, python, repository, address="0.0.0.0", ports=PORTS, shm_prefix=SHM_PREFIX)  # noqa: S104
    os.execve(command[0], command, {**os.environ, **triton.environment(python)})  # noqa: S606 (no shell is wanted)


def main(arguments: list[str]) -> int:
    """Command line; the exit status, if there is no server to become."""
    try:
        if len(arguments) != 1 or not Path(arguments[0]).is_dir():
            raise BadInput("arguments", value=" ".join(arguments), allowed="one folder, Triton's model repository")
        become(Settings.from_env(), Path(arguments[0]))
    except (ForjaError, OSError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code if isinstance(error, ForjaError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
