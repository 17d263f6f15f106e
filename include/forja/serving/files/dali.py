"""Triton's DALI backend: encoded images to a model's input, decoded and resized as for training (forja.loading). Runs in NVIDIA's image.

It lies beside pipeline.json in a version's folder; the backend serialises the pipeline when it loads.
"""

import json
import pathlib

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.triton import autoserialize

SAID = json.loads(pathlib.Path(__file__).with_name("pipeline.json").read_text())
CHANNELS, HEIGHT, WIDTH = SAID["shape"]
GPU = SAID["device"] == "gpu"


@autoserialize
@pipeline_def(batch_size=SAID["max_batch"], num_threads=SAID["threads"], device_id=0 if GPU else None)
def preprocess():  # type: ignore[no-untyped-def]
    """Encoded bytes to float32 [C, H, W] of grey levels 0 to 255."""
    raw = fn.external_source(name="image", device="cpu", dtype=types.UINT8, ndim=1)
    pixels = fn.decoders.image(raw, device="mixed" if GPU else "cpu", output_type=types.GRAY if CHANNELS == 1 else types.RGB)
    pixels = fn.resize(pixels, size=[HEIGHT, WIDTH], antialias=True)
    return fn.crop_mirror_normalize(pixels, dtype=types.FLOAT, output_layout="CHW", name="input")
