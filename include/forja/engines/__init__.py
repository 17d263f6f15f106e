"""Engines: built by one function behind two libraries with one interface, described, inspected, judged, timed.

TensorRT-RTX builds ahead of time on a host without a GPU; that proves that NVIDIA's parser accepts the graph and that a strongly
typed engine comes out, and no more. TensorRT builds for the GPU at hand, so it needs one.

    host      where an engine is built or loaded: library, GPU, driver
    build     ONNX to a plan
    describe  engine.json beside the plan, and the refusal to load a plan where it doesn't belong
    inspect   precision of each layer, from the inspector or from the builder's own report
    verdict   whether the engine came out in the precision that was asked for
    latency   how fast it is on the GPU at hand
"""

from __future__ import annotations

from forja.engines.build import Engine as Engine
from forja.engines.build import make as make
from forja.engines.host import Host as Host
from forja.engines.host import here as here
from forja.engines.host import signature as signature
from forja.engines.host import timing_key as timing_key
from forja.engines.verdict import precision_verdict as precision_verdict
