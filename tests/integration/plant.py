"""A plant's client: asks the live model twenty times a second and keeps what failed."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any, Self

from forja.serving import triton


@dataclass(kw_only=True)
class Client:
    """Each request has a thread of its own, so that a slow answer holds no other back."""

    endpoint: str
    """host:port of the router."""
    model: str
    sample: Any
    """float32 [1, *shape]."""
    failed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._asking: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for thread in self._asking:
            thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            thread = threading.Thread(target=self._ask)
            thread.start()
            self._asking.append(thread)
            due += 0.05
            self._stop.wait(max(0.0, due - time.monotonic()))

    def _ask(self) -> None:
        began = time.monotonic()
        try:
            answer = triton.infer(self.endpoint, self.model, self.sample)
            if abs(float(answer.sum()) - 1) > 1e-3:
                self.failed.append(f"answer {answer}")
        except Exception as error:
            self.failed.append(repr(error))
        self.seconds.append(time.monotonic() - began)
