"""Precision variants of an ONNX model, all of one float32 export, with float32 inputs and outputs whatever is inside.

TensorRT 11 takes precision from the file and from nowhere else, so these files are what every engine is built from.
"""
