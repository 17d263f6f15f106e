"""A process that decodes images: a broken image can crash DALI's parser, and must not take the stage with it.

``python -m forja.decoder CHANNELS HEIGHT WIDTH`` answers requests on its standard input until that ends, which is also
how it learns that its parent died. Numbers are uint64, little-endian.

* request: number of payloads, the length of each, the payloads
* answer: one byte for each payload (1: decoded), then float32 [C, H, W] for each decoded one
"""

from __future__ import annotations

import io
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from forja.errors import Unavailable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHUNK = 64
"""Images in one request at most."""
CRASHES = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL})
"""Ends of the process that its input can be blamed for."""


class Decoder:
    """The process, started when it is first asked and again after a crash.

    Args:
        shape: channels (1 or 3), height and width of the images that it answers, in pixels.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def ask(self, payloads: Sequence[bytes]) -> list[NDArray[np.float32] | None] | None:
        """float32 [C, H, W] for each image, None for one that doesn't decode; None alone when they crashed the process.

        Raises:
            Unavailable: the process ended for a reason that isn't in the images, for example lack of memory.
        """
        if self._process is None:
            self._process = _start(self.shape)
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: S101, PT018 - both are pipes
        try:
            _send(self._process.stdin, payloads)
            return _answer(self._process.stdout, len(payloads), self.shape)
        except (BrokenPipeError, EOFError):
            status = self._end(wait=10)
        if -status in CRASHES:
            return None
        raise Unavailable("the process that decodes images ended", value=f"status {status}", do="see its last lines; give it more memory")

    def _end(self, wait: float = 0) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        try:
            return process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
        finally:
            for pipe in (process.stdin, process.stdout):
                _close(pipe)


def _close(pipe: IO[bytes] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except BrokenPipeError:
        return  # the rest of a request that nobody reads any more


def _start(shape: tuple[int, ...]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "forja.decoder", *map(str, shape)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _send(pipe: IO[bytes], payloads: Sequence[bytes]) -> None:
    pipe.write(struct.pack(f"<{len(payloads) + 1}Q", len(payloads), *map(len, payloads)))
    pipe.writelines(payloads)
    pipe.flush()


def _answer(pipe: IO[bytes], count: int, shape: tuple[int, ...]) -> list[NDArray[np.float32] | None]:
    import numpy as np

    flags = _exactly(pipe, count)
    size = 4 * shape[0] * shape[1] * shape[2]
    pixels = np.frombuffer(_exactly(pipe, size * sum(flags)), "<f4").reshape(-1, *shape)
    found = iter(pixels)
    return [next(found) if flag else None for flag in flags]


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


def readable(payload: bytes) -> bool:
    """Whether Pillow decodes the bytes as a PNG or a JPEG."""
    from PIL import Image

    try:
        Image.open(io.BytesIO(payload), formats=("PNG", "JPEG")).load()
    except Exception:  # its parsers raise whatever a broken file leads them to
        return False
    return True


def complete(payload: bytes) -> bool:
    """Whether the bytes end as a PNG (IEND chunk) or a JPEG (EOI marker) must; trailing zeros are padding."""
    data = payload.rstrip(b"\0")
    return payload.endswith(b"IEND\xaeB`\x82") or (payload.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9"))


class _Batches:
    """One DALI pipeline for all requests, built again after an error: it is of no use then."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        from forja.loading import Pipelines

        self._shape, self._pipelines = shape, Pipelines()
        self._pipe: Any = None

    def decode(self, payloads: Sequence[bytes]) -> list[NDArray[np.float32] | None]:
        """DALI fails a whole batch for one bad image: it only gets what Pillow reads, and a batch that fails goes one by one."""
        fine = [complete(p) and readable(p) for p in payloads]
        good = [p for p, ok in zip(payloads, fine, strict=True) if ok]
        together = self._run(good) if good else []
        found: Any = iter(together if together is not None else [(self._run([p]) or [None])[0] for p in good])
        return [next(found) if ok else None for ok in fine]

    def _run(self, payloads: Sequence[bytes]) -> list[Any] | None:
        import numpy as np

        if self._pipe is None:
            self._pipe = self._pipelines.memory(self._shape, CHUNK)
        try:
            (images,) = self._pipe.run(raw=[np.frombuffer(p, np.uint8) for p in payloads])
            return list(images.as_array())
        except RuntimeError:
            self._pipe = None
            return None


def main(argv: Sequence[str]) -> None:
    """Answer until the input ends."""
    import numpy as np

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get into the answers
    batches = _Batches(tuple(int(a) for a in argv))
    while head := source.read(8):
        (count,) = struct.unpack("<Q", head)
        sizes = struct.unpack(f"<{count}Q", _exactly(source, 8 * count))
        images = batches.decode([_exactly(source, size) for size in sizes])
        sink.write(bytes(image is not None for image in images))
        sink.writelines(np.ascontiguousarray(image, "<f4").tobytes() for image in images if image is not None)
        sink.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
