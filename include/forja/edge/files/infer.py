"""Infer: ask the model of this bundle about images (.png, .jpg, .ppm, .pgm), rows (.json) or arrays (.npy).

    python3 infer.py [--etc DIR] [--var DIR] [--json] FILE...      exit status 0: answered, 2: a file is wrong, 3: refused

Images are decoded by Pillow or OpenCV, whichever is here (JetPack brings OpenCV); .ppm, .pgm, .json and .npy need neither.
Everything after decoding is done here, as preprocess.json says, and as it was in training. Python 3.6, numpy.
"""
# ruff: noqa: UP006, UP035 (the syntax of Python 3.6)

import argparse
import json
import os
import re
import sys
from typing import Any, Dict, List

HERE = os.path.dirname(os.path.abspath(__file__))
sys.dont_write_bytecode = True
sys.path.insert(0, HERE)

import trust  # type: ignore[import-not-found] # noqa: E402 - beside this file


class Wrong(Exception):
    """A file that can't be asked about; the message says why."""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Ask the model of this bundle.")
    trust.options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--simulated", action="store_true", help="on ONNX Runtime, whatever the target is")
    parser.add_argument("files", nargs="+", metavar="FILE")
    given = parser.parse_args()
    try:
        manifest = trust.check(HERE, given.etc, given.var)
        answers = ask(manifest, given.files, given.simulated)
    except (trust.Refused, Wrong) as error:
        sys.stderr.write(f"refused: {error}\n")
        return 3 if isinstance(error, trust.Refused) else 2
    if given.json:
        print(json.dumps(answers))
    else:
        for a in answers:
            print(f"{a['sample']}: {a['answer']} (probability {a['probability']:.3f})")
    return 0


def ask(manifest: Dict[str, Any], files: List[str], simulated: bool) -> List[Dict[str, Any]]:
    """Answers to all samples of the files, in order."""
    import numpy as np
    import runtime  # type: ignore[import-not-found]

    with open(os.path.join(HERE, "preprocess.json"), encoding="utf-8") as file:
        rules = json.load(file)
    samples = [pair for path in files for pair in read(path, rules)]
    try:
        engine = runtime.load(HERE, manifest, simulated)
        step = manifest["batch"]["max"]
        found = [engine.run(np.stack([s for _, s in samples[i : i + step]])) for i in range(0, len(samples), step)]
    except (runtime.Unusable, RuntimeError) as error:
        raise trust.Refused("runtime", str(error)) from error
    answers = []
    for (name, _), row in zip(samples, np.concatenate(found)):  # noqa: B905 - Python 3.6 has no strict
        best = int(row.argmax())
        answers.append({"sample": name, "answer": manifest["classes"][best], "probability": float(row[best])})
    return answers


def read(path: str, rules: Dict[str, Any]) -> List[Any]:
    """Samples of one file: pairs of a name and a float32 array of the model's input shape."""
    import numpy as np

    shape = tuple(rules["shape"])
    try:
        if path.endswith(".npy"):
            array = np.load(path, allow_pickle=False).astype(np.float32)
            array = array[None] if array.shape == shape else array
            if array.shape[1:] != shape:
                raise Wrong(f"{path} has shape {array.shape}, allowed: {shape} or [N, {', '.join(map(str, shape))}]")
            return [(f"{path}:{i}" if len(array) > 1 else path, a) for i, a in enumerate(array)]
        if rules["kind"] == "table":
            with open(path, encoding="utf-8") as file:
                rows = json.load(file)
            rows = rows if isinstance(rows, list) else [rows]
            return [(f"{path}:{i}" if len(rows) > 1 else path, row(r, rules["features"], path)) for i, r in enumerate(rows)]
        return [(path, prepared(decoded(path, shape[0] == 1), rules["height"], rules["width"]))]
    except (OSError, ValueError) as error:
        raise Wrong(f"{path} can't be read: {error}") from error


def row(values: Any, features: List[str], path: str) -> Any:
    """One row of a table: a number for each feature; a category may be named by itself (``Type: L`` for the feature ``Type=L``)."""
    import numpy as np

    if not isinstance(values, dict):
        raise Wrong(f"{path} holds {type(values).__name__}, allowed: an object with {', '.join(features)}")
    filled = []
    for name in features:
        column, equals, category = name.partition("=")
        if name in values:
            filled.append(values[name])
        elif equals and isinstance(values.get(column), str):
            filled.append(float(values[column] == category))
        else:
            raise Wrong(f"{path} lacks {name}; derived features are not computed here, give them as numbers")
    if not all(isinstance(v, (int, float)) and np.isfinite(v) for v in filled):
        raise Wrong(f"{path} has a value that is no finite number")
    return np.array(filled, np.float32)


def decoded(path: str, grey: bool) -> Any:
    """An image as uint8 [H, W, C], RGB or grey."""
    import numpy as np

    if path.endswith((".ppm", ".pgm")):
        return netpbm(path, grey)
    try:
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
        return pixels[:, :, None] if grey else pixels
    except ImportError:
        pass
    try:
        import cv2  # type: ignore[import-not-found]
    except ImportError as error:
        raise Wrong(f"{path} needs Pillow or OpenCV; install one, or give a .ppm, .pgm or .npy file") from error
    pixels = cv2.imread(path, cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR)
    if pixels is None:
        raise Wrong(f"{path} is no image")
    # OpenCV's own order is blue, green, red: the model was trained on red, green, blue.
    return pixels[:, :, None] if grey else pixels[:, :, ::-1]


def netpbm(path: str, grey: bool) -> Any:
    """A binary .ppm (P6) or .pgm (P5) of 8 bits a value as uint8 [H, W, C]."""
    import numpy as np

    with open(path, "rb") as file:
        data = file.read()
    match = re.match(rb"(P[56])(?:\s+|#[^\n]*\n)+(\d+)(?:\s+|#[^\n]*\n)+(\d+)(?:\s+|#[^\n]*\n)+255\s", data)
    if not match or match.group(1) != (b"P5" if grey else b"P6"):
        raise Wrong(f"{path} is no {'grey .pgm (P5)' if grey else 'colour .ppm (P6)'} of 8 bits")
    width, height, channels = int(match.group(2)), int(match.group(3)), 1 if grey else 3
    pixels = np.frombuffer(data[match.end() :], np.uint8)
    if pixels.size != width * height * channels:
        raise Wrong(f"{path} has {pixels.size} bytes of pixels, its header says {width} x {height}")
    return pixels.reshape(height, width, channels)


def prepared(pixels: Any, height: int, width: int) -> Any:
    """uint8 [H, W, C] to the model's input, float32 [C, height, width] of values 0 to 255.

    Linear interpolation with antialiasing, as DALI's ``fn.resize(antialias=True)`` did in training: a triangle as wide as a pixel of the
    smaller image. Normalisation is inside the model.
    """
    import numpy as np

    rows, columns = spread(pixels.shape[0], height), spread(pixels.shape[1], width)
    resized = np.einsum("ih,hwc,jw->cij", rows, pixels.astype(np.float64), columns, optimize=True)
    return np.clip(np.floor(resized + 0.5), 0, 255).astype(np.float32)


def spread(before: int, after: int) -> Any:
    """Weights [after, before] of the pixels of one dimension; beyond the border its last pixel goes on, as in DALI."""
    import numpy as np

    scale = before / after
    wide = max(scale, 1.0)
    reach = int(np.ceil(wide)) + 1
    centre = (np.arange(after) + 0.5) * scale
    pixels = np.floor(centre)[:, None].astype(int) + np.arange(-reach, reach + 1)[None, :]
    distance = np.abs(pixels + 0.5 - centre[:, None]) / wide
    weights = np.zeros((after, before))
    rows = np.repeat(np.arange(after)[:, None], pixels.shape[1], axis=1)
    np.add.at(weights, (rows, np.clip(pixels, 0, before - 1)), np.clip(1 - distance, 0, None))
    return weights / weights.sum(axis=1, keepdims=True)


if __name__ == "__main__":
    sys.exit(main())
