"""ONNX: a program as an ONNX graph, in two flavours.

`ort` uses onnxruntime's contrib operators where they are fast; `portable` uses standard operators only.
"""
