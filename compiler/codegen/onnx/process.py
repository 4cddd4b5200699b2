"""What a process that runs an ONNX artifact takes before a weight is read."""

from __future__ import annotations

#: Bytes of Python, NumPy and onnxruntime 1.31: 80 to 100 MB were measured.
PROCESS = 120_000_000
