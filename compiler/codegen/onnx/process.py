"""What a process that runs an ONNX artifact takes before a weight is read, and in a step."""

from __future__ import annotations

#: Bytes of Python, NumPy and onnxruntime 1.31: 80 to 100 MB were measured.
PROCESS = 120_000_000

#: Pairs of a new and a packed token in a step, at most: a layer's logits of all of them are there at once.
PAIRS = 1 << 18
