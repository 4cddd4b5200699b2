"""Running artifacts: sessions, caches, sampling. Running an ONNX artifact needs no torch."""
