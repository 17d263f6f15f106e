"""Triton's python backend: encoded images to a model's input. Runs in the serving environment, alone, as a version's model.py.

It gives what DALI gives when it decodes and resizes for training (forja.loading, on a CPU). Only pixels that lie halfway between two
grey levels may round to the other one: none in an image of the model's own size, about one in a thousand in one that is made smaller,
up to two in a hundred in one that is made larger by a simple fraction.
"""

import io
import json
import os
import pathlib

import lifeline  # type: ignore[import-not-found]
import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]
from PIL import Image, ImageOps

MAX_PIXELS = 1 << 26
"""Largest image that is decoded: a file of a few kilobytes can claim to be one of gigabytes."""
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Weights of red, green and blue (ITU-R BT.601)."""


class TritonPythonModel:
    """The interface that the backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the size of the model's input; an error here leaves the version unavailable."""
        self.leave = lifeline.die_together()
        try:
            folder = pathlib.Path(args["model_repository"], args["model_version"])
            described = json.loads((folder / "preprocess.json").read_text())
            self.shape = described["channels"], described["height"], described["width"]
        except BaseException:
            os.write(self.leave, b".")
            raise

    def finalize(self) -> None:
        """An orderly end, of which the watcher must not make a kill."""
        os.write(self.leave, b".")

    def execute(self, requests: list) -> list:  # type: ignore[type-arg]
        """Answer each request, PNG or JPEG files [n, 1], by float32 [n, C, H, W] of grey levels 0 to 255."""
        return [self._answer(pb_utils.get_input_tensor_by_name(request, "image").as_numpy()) for request in requests]

    def _answer(self, images: np.ndarray):  # type: ignore[no-untyped-def]
        pixels = []
        for number, payload in enumerate(images.reshape(-1)):
            try:
                pixels.append(decode(payload, self.shape))
            except Exception as error:  # its parsers raise whatever a broken file leads them to
                return _refusal(f"image {number}: {error}; allowed: a whole PNG or JPEG file")
        if not pixels:
            return _refusal("image: got an empty batch; allowed: one image or more")
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("input", np.stack(pixels))])


def _refusal(why: str):  # type: ignore[no-untyped-def]
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(why, pb_utils.TritonError.INVALID_ARG))


def decode(payload: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Float32 of ``shape`` (channels, height, width) from the bytes of a PNG or JPEG; any exception when they are none."""
    whole = payload.endswith(b"IEND\xaeB`\x82") or (payload.startswith(b"\xff\xd8\xff") and payload.rstrip(b"\0").endswith(b"\xff\xd9"))
    if not whole:
        raise ValueError("got no whole file")
    image: Image.Image = Image.open(io.BytesIO(payload), formats=("PNG", "JPEG"))
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"got {image.width}x{image.height} pixels, more than {MAX_PIXELS}")
    jpeg, channels = image.format == "JPEG" and image.mode != "CMYK", shape[0]
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if channels == 1 and not jpeg and image.mode not in ("L", "LA"):
        # DALI's decoders of PNG cut the fraction off, that of JPEG rounds.
        pixels = np.floor(np.asarray(image.convert("RGB"), dtype=np.float32) @ GREY)
    else:
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    pixels = pixels.reshape(*pixels.shape[:2], channels)
    if pixels.shape[:2] != shape[1:]:
        narrow = _resize(_resize(pixels, shape[1]).transpose(1, 0, 2), shape[2]).transpose(1, 0, 2)
        pixels = np.clip(np.rint(narrow), 0, 255)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)


def _resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """The first dimension resized to ``size``: linear, and a triangle as wide as the scale where it shrinks.

    Pixels beyond the edge are the edge's, as in DALI (Pillow leaves them out, which differs by up to 8 grey levels).
    """
    scale = np.float32(len(pixels)) / np.float32(size)
    radius = max(scale, np.float32(1))
    rows = []
    for i in range(size):
        centre = (i + 0.5) * scale - 0.5
        taps = np.arange(int(np.ceil(centre - radius)), int(np.floor(centre + radius)) + 1)
        weights = np.maximum(0, 1 - np.abs(taps - centre) / radius)
        inside = np.clip(taps, 0, len(pixels) - 1)
        first = int(inside[0])
        summed = np.bincount(inside - first, weights / weights.sum()).astype(np.float32)
        rows.append(np.tensordot(summed, pixels[first : first + len(summed)].astype(np.float32), axes=1))
    return np.stack(rows)
