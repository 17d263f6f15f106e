"""What is asked of a Triton server over HTTP: is the model ready, what does it answer, is that what it should answer."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from forja.errors import BadInput, Refused, Unavailable
from forja.serving.repository import INPUT, OUTPUT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONNECT_S = 5.0
"""Seconds that a connection may take."""
ANSWER_S = 40.0
"""Seconds that an answer may take: more than the router's own time-out, so that its verdict is seen."""


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Samples with the answers that the variant gave when it was measured."""

    inputs: NDArray[np.float32]
    """float32 [G, *shape], raw."""
    probabilities: NDArray[np.float32]
    """float32 [G, classes]."""


def ready(address: str, model: str, version: str) -> bool:
    """Whether ``http://address`` serves this version of the model."""
    return _call(f"http://{address}/v2/models/{model}/versions/{version}/ready")[0] == 200


def live(address: str) -> bool:
    """Whether a Triton server answers at ``http://address``, whatever it serves."""
    return _call(f"http://{address}/v2/health/live")[0] == 200


def wait_ready(address: str, model: str, version: str, seconds: float, check: Callable[[], None] = lambda: None) -> None:
    """Wait until a server that was just started serves a version.

    Raises:
        Refused: it could not load it; the reason is Triton's.
        Unavailable: it doesn't answer in time.
    """
    deadline = time.monotonic() + seconds
    while not ready(address, model, version):
        check()
        if reason := load_error(address, model, version):
            raise Refused(f"Triton could not load version {version} of {model}", value=reason, do="see the reason and ./forja logs triton")
        if time.monotonic() > deadline:
            what = f"Triton at {address} does not serve version {version} of {model} after {seconds:g} s"
            raise Unavailable(what, do="./forja logs triton")
        time.sleep(0.05)


def load_error(address: str, model: str, version: str) -> str:
    """Why a version isn't loaded, from the repository index; empty when it is, or is being loaded."""
    status, body = _call(f"http://{address}/v2/repository/index", b"{}")
    if status != 200:
        return ""
    for entry in json.loads(body):
        if entry.get("name") == model and entry.get("version", version) == version and entry.get("state") == "UNAVAILABLE":
            return str(entry.get("reason") or "")
    return ""


class Endpoint:
    """A model at Triton, or at a router before it, over one connection (KServe v2 protocol).

    Args:
        address: host:port.
        model: its name.
        max_batch: larger inputs are asked for in parts of this size; 0 for all at once.
    """

    def __init__(self, address: str, model: str, max_batch: int = 0) -> None:
        from tritonclient import http as tritonhttp

        self.address, self.model, self.max_batch, self._http = address, model, max_batch, tritonhttp
        self._client = tritonhttp.InferenceServerClient(address, connection_timeout=CONNECT_S, network_timeout=ANSWER_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, inputs: NDArray[np.float32], version: str = "") -> tuple[NDArray[np.float32], str]:
        """Probabilities float32 [N, classes] of raw inputs float32 [N, *shape], and the version that answered last.

        Args:
            inputs: one sample or more.
            version: a version, or the one that is served.

        Raises:
            BadInput: the server refuses the input itself (its shape or its type).
            Unavailable: no answer, no release under this name, or the server is out of order.
        """
        import numpy

        step = self.max_batch or len(inputs)
        answers = [self._ask(inputs[i : i + step], version) for i in range(0, len(inputs), step)]
        return numpy.concatenate([probabilities for probabilities, _ in answers]), answers[-1][1]

    def _ask(self, inputs: NDArray[np.float32], version: str) -> tuple[NDArray[np.float32], str]:
        import numpy
        from tritonclient.utils import InferenceServerException

        tensor = self._http.InferInput(INPUT, list(inputs.shape), "FP32")
        tensor.set_data_from_numpy(numpy.ascontiguousarray(inputs, dtype=numpy.float32))
        wanted = [self._http.InferRequestedOutput(OUTPUT)]
        try:
            answer = self._client.infer(self.model, [tensor], model_version=version, outputs=wanted)
            found = answer.as_numpy(OUTPUT)
        except InferenceServerException as error:
            if str(error.status()) == "400":
                what = f"model {self.model} at {self.address} refuses the input"
                raise BadInput(what, value=error.message(), allowed=f"float32 {list(inputs.shape)}") from error
            raise self._away(error.message()) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._away(str(error) or type(error).__name__) from error
        if found is None:
            raise self._away(f"an answer without {OUTPUT}")
        return found, str(answer.get_response()["model_version"])

    def _away(self, why: str) -> Unavailable:
        do = f"./forja status; if there is no release yet, make run RECIPE={self.model}"
        return Unavailable(f"model {self.model} at {self.address} doesn't answer", value=why, do=do)


def infer(address: str, model: str, inputs: NDArray[np.float32], version: str = "") -> NDArray[np.float32]:
    """One request over a connection of its own: see ``Endpoint.ask``."""
    with Endpoint(address, model) as endpoint:
        return endpoint.ask(inputs, version)[0]


def smoke(address: str, model: str, golden: Golden, *, tolerance: float, max_batch: int, version: str = "") -> float:
    """Ask for every golden sample.

    Returns:
        Largest difference of a probability from its golden answer.

    Raises:
        Refused: the answers have another shape, aren't finite, or differ by more than ``tolerance``.
        BadInput, Unavailable: see ``Endpoint.ask``.
    """
    import numpy

    wanted = golden.probabilities
    with Endpoint(address, model, max_batch) as endpoint:
        found, _ = endpoint.ask(golden.inputs, version)
    if found.shape != wanted.shape:
        what = f"smoke test of {model} at {address}: shape of the answers"
        raise Refused(what, value=list(found.shape), allowed=str(list(wanted.shape)))
    worst = float(numpy.abs(found - wanted).max())
    # Written so that NaN is refused.
    if not worst <= tolerance:
        what = f"smoke test of {model} at {address}: difference from the golden answers"
        raise Refused(what, value=worst, allowed=f"finite answers, up to {tolerance}")
    return worst


def _call(url: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of a GET, or of a POST with ``body``; 0 when nothing answers. Never through a proxy."""
    opener: Any = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, data=body, timeout=5.0) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""
    except (OSError, ValueError):
        return 0, b""
