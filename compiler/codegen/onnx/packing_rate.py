"""How fast onnxruntime packs weights on this machine: a session over one int4 product is made and let go."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort

from .cut import Extent, external

#: Rows, width and block of the product: 8 MiB of codes and 2 MiB of scales, as one of a model of 1B has.
_ROWS, _WIDTH, _BLOCK = 8192, 2048, 32
_TIMES = 15


def packing_rate(threads: int = 1) -> float:
    """Bytes of weights a second, as they lie in the file; by one thread, as in a step of few tokens.

    The middle of 15 sessions.
    """
    from onnx import TensorProto, helper

    groups = _WIDTH // _BLOCK
    arrays = {
        "codes": np.random.default_rng(0).integers(0, 256, (_ROWS, groups, _BLOCK // 2), np.uint8),
        "scales": np.ones((_ROWS, groups), np.float32),
    }
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
    kinds = {"codes": TensorProto.UINT8, "scales": TensorProto.FLOAT}
    graph = helper.make_graph(
        [node],
        "packing",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, _WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, _ROWS])],
        [external(Extent(n, 0, a.nbytes, a.shape, kinds[n]), "weights") for n, a in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    raw = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    with TemporaryDirectory(prefix="einfold-packing-") as folder:
        (Path(folder) / "weights").touch()  # onnxruntime wants it to be there, and reads the arrays
        seconds = sorted(_seconds(raw, arrays, threads, folder) for _ in range(_TIMES))
    return sum(a.nbytes for a in arrays.values()) / seconds[_TIMES // 2]


def _seconds(raw: bytes, arrays: dict[str, Any], threads: int, folder: str) -> float:
    options: Any = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    for name, value in values.items():
        options.add_initializer(name, value)
    started = time.perf_counter()
    session = ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    del session
    return time.perf_counter() - started
