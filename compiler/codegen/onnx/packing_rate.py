"""How fast onnxruntime packs weights on this machine: a session over one int4 product is made and let go."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnxruntime as ort

#: Rows, width and block of the product: 8 MiB of codes and 2 MiB of scales, as a layer of a small model has.
_ROWS, _WIDTH, _BLOCK = 8192, 2048, 32
_TIMES = 9


def packing_rate(threads: int) -> float:
    """Bytes of weights a second, as they lie in the file. The middle of nine sessions."""
    from onnx import TensorProto, helper

    groups = _WIDTH // _BLOCK
    codes = np.random.default_rng(0).integers(0, 256, (_ROWS, groups, _BLOCK // 2), np.uint8)
    scales = np.ones((_ROWS, groups), np.float32)
    sizes: dict[str, Any] = {
        "K": _WIDTH,
        "N": _ROWS,
        "bits": 4,
        "block_size": _BLOCK,
        "accuracy_level": 4,
    }
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **sizes
    )
    kinds = {"codes": (TensorProto.UINT8, codes), "scales": (TensorProto.FLOAT, scales)}
    graph = helper.make_graph(
        [node],
        "packing",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, _WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, _ROWS])],
        [
            helper.make_tensor(n, kind, a.shape, a.tobytes(), raw=True)
            for n, (kind, a) in kinds.items()
        ],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    raw = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    seconds = sorted(_seconds(raw, threads) for _ in range(_TIMES))
    return (codes.nbytes + scales.nbytes) / seconds[_TIMES // 2]


def _seconds(raw: bytes, threads: int) -> float:
    options: Any = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.prepack.enable_parallel", "1")
    started = time.perf_counter()
    session = ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    del session
    return time.perf_counter() - started
