"""DeepStream: the configuration of its element nvinfer for a bundle's model.

nvinfer computes ``net-scale-factor * (x - offset)`` with one scale for all channels, which a normalisation by channel isn't. That one is in
the graph, so nvinfer is told to leave the pixels as they are. Its classifier takes the largest probability of each output layer: softmax is
in the graph too.
"""

from __future__ import annotations

from forja.edge.targets import Target
from forja.errors import BadInput
from forja.recipes.base import Images

CONFIG, LABELS = "deepstream/nvinfer.txt", "deepstream/labels.txt"
NETWORK_MODE = {"fp32": 0, "int8": 1, "fp16": 2, "bf16": 3, "mixed": 3}
"""nvinfer's number of a precision; it says how to build an engine, and this configuration has one built already."""
COLOUR = {1: 2, 3: 0}
"""nvinfer's model-color-format by channels: GRAY or RGB (1 is BGR, which the model was not trained on)."""


def files(target: Target, dataset: Images, variant: str, max_batch: int) -> dict[str, bytes]:
    """Both files, by their paths in the bundle.

    Raises:
        BadInput: a class name has a semicolon, which separates labels in DeepStream's file.
    """
    if wrong := [c for c in dataset.classes if ";" in c]:
        raise BadInput("class names for DeepStream", value=wrong, allowed="names without ;")
    return {
        CONFIG: config(target, dataset, variant, max_batch).encode(),
        # One line: the labels of one output layer (nvdsinfer's ClassifyPostprocessor reads labels[layer][class]). One label a line would
        # give each class a layer of its own, and every image the first label or none.
        LABELS: (";".join(dataset.classes) + "\n").encode(),
    }


def config(target: Target, dataset: Images, variant: str, max_batch: int) -> str:
    """nvinfer's configuration for whole frames; paths are relative to it.

    There is no onnx-file on purpose: nvinfer would build an engine of its own from it, with flags of its own, whenever the one of build.sh
    doesn't load, and nobody would have verified that.
    """
    channels, height, width = dataset.shape
    return f"""# DeepStream nvinfer for {target.title}; run build.sh first, it makes the engine.
# nvinfer scales frames without antialiasing: where frames are much larger than {width}x{height}, answers differ somewhat from verify.py's.
[property]
gpu-id=0
gie-unique-id=1
process-mode=1
network-type=1
network-mode={NETWORK_MODE[variant]}
model-engine-file=../work/engine.plan
labelfile-path=labels.txt
batch-size={max_batch}
infer-dims={channels};{height};{width}
network-input-order=0
model-color-format={COLOUR[channels]}
net-scale-factor=1.0
offsets={";".join(["0"] * channels)}
maintain-aspect-ratio=0
output-blob-names=probabilities
classifier-threshold=0.0
interval=0
"""
