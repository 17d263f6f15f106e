"""What is asked of a Triton server over HTTP: is the model ready, what does it answer, is that what it should answer."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forja.errors import BadInput, Refused, Unavailable
from forja.serving.repository import INPUT, OUTPUT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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


def infer(address: str, model: str, inputs: NDArray[np.float32], version: str = "") -> NDArray[np.float32]:
    """Probabilities float32 [N, classes] of raw inputs float32 [N, *shape], from Triton or from a router before it.

    Args:
        address: host:port.
        model: its name.
        inputs: N must not be above the model's largest batch.
        version: a version, or the one that is served.

    Raises:
        BadInput: the server refuses the request itself (shape, type, name).
        Unavailable: no answer, or the server is out of order.
    """
    import numpy
    from tritonclient import http as tritonhttp
    from tritonclient.utils import InferenceServerException

    client = tritonhttp.InferenceServerClient(address, connection_timeout=2.0, network_timeout=ANSWER_S)
    try:
        tensor = tritonhttp.InferInput(INPUT, list(inputs.shape), "FP32")
        tensor.set_data_from_numpy(numpy.ascontiguousarray(inputs, dtype=numpy.float32))
        answer = client.infer(model, [tensor], model_version=version, outputs=[tritonhttp.InferRequestedOutput(OUTPUT)])
        found: NDArray[np.float32] = answer.as_numpy(OUTPUT)
        return found
    except InferenceServerException as error:
        if str(error.status()) in ("400", "404"):
            raise BadInput(f"request to {model} at {address}", value=error.message()) from error
        raise Unavailable(f"{model} at {address}", value=error.message(), do="./forja status") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unavailable(f"{model} at {address} doesn't answer", value=str(error) or type(error).__name__, do="./forja status") from error
    finally:
        client.close()


def smoke(address: str, model: str, golden: Golden, *, tolerance: float, max_batch: int, version: str = "") -> float:
    """Ask for every golden sample.

    Returns:
        Largest difference of a probability from its golden answer.

    Raises:
        Refused: the answers have another shape, aren't finite, or differ by more than ``tolerance``.
        BadInput, Unavailable: see ``infer``.
    """
    import numpy

    worst = 0.0
    for start in range(0, len(golden.inputs), max_batch):
        wanted = golden.probabilities[start : start + max_batch]
        found = infer(address, model, golden.inputs[start : start + max_batch], version)
        if found is None or found.shape != wanted.shape:
            shape = None if found is None else list(found.shape)
            raise Refused(f"smoke test of {model} at {address}: shape of the answers", value=shape, allowed=str(list(wanted.shape)))
        worst = max(worst, float(numpy.abs(found - wanted).max()))
        # Written so that NaN is refused.
        if not worst <= tolerance or not numpy.isfinite(found).all():
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
