"""Ties the life of a python backend's process to its server's. Lies beside model.py and runs in the serving environment, alone."""

import os
import signal


def die_together() -> int:
    """Make the server die when this process does; writing to the returned descriptor calls that off.

    Triton doesn't start another python process when one was killed (out of memory, say): it answers 500 for good, and
    looks alive to its supervisor. A dead server is started again within seconds, and Envoy bridges them.
    """
    server = os.pidfd_open(os.getppid())  # not the number, which may be another process by then
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(write)
        if os.read(read, 1) == b"":
            signal.pidfd_send_signal(server, signal.SIGKILL)
        os._exit(0)
    os.close(read)
    os.close(server)
    return write
