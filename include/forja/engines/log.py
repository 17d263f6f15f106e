"""The logger of TensorRT, which keeps what messages and engine.json need instead of printing it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

REPORT = "Layers:"
"""How the message begins in which the builder lists the layers of the engine that it made."""
LAST = 5
"""Messages that an error repeats."""


def keeper(trt: ModuleType) -> Any:
    """A logger of the module ``tensorrt`` or ``tensorrt_rtx``: errors and warnings in ``kept``, the builder's report in ``report``.

    The report comes at the level VERBOSE and only with detailed profiling; it is empty when there was none. Keep the logger alive
    for as long as anything that was made with it.
    """

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps messages."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.kept: list[str] = []
            self.report = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                self.kept.append(message)
            elif message.startswith(REPORT):
                self.report = message

    return Logger()


def last(logger: Any) -> list[str]:
    """The logger's last messages."""
    return list(logger.kept[-LAST:])
