"""What a `model.onnx` may hold: nodes that compute, and weights that lie in the artifact's own file.

The model is read before onnxruntime sees it, and never evaluated here. Needs onnx and no torch.
"""

from __future__ import annotations

import math
from typing import Any

from ....errors import ArtifactError, first_line, pass_on
from .divisors import undivided

#: Operators of ONNX that code generation emits, or torch's exporter for what it has no lowering of. Left out
#: are those that draw random numbers, loop as long as they like, or work on strings or sequences.
_STANDARD = (
    "Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention BitCast BitShift "
    "BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Concat Constant "
    "ConstantOfShape Cos Cosh CumSum DequantizeLinear Div Einsum Elu Equal Erf Exp Expand Flatten "
    "Floor Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual HardSigmoid HardSwish "
    "Identity If IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul "
    "MatMulInteger Max Mean Min Mish Mod Mul Neg NonZero Not OneHot Or Pad Pow PRelu QuantizeLinear "
    "DynamicQuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum "
    "ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu "
    "Reshape RotaryEmbedding Round ScatterElements ScatterND Selu Shape Sigmoid Sign "
    "SimplifiedLayerNormalization Sin Sinh Size Slice Softmax Softplus Softsign Split Sqrt Squeeze "
    "Sub Sum Swish Tan Tanh TensorScatter ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where "
    "Xor"
)

#: onnxruntime's own, of which code generation emits these.
_CONTRIB = (
    "BiasGelu FastGelu FusedMatMul GatherBlockQuantized GroupQueryAttention MatMulIntegerToFloat "
    "MatMulNBits MultiHeadAttention QuickGelu SimplifiedLayerNormalization SkipLayerNormalization "
    "SkipSimplifiedLayerNormalization"
)
_DOMAINS = {
    "": frozenset(_STANDARD.split()),
    "ai.onnx": frozenset(_STANDARD.split()),
    "com.microsoft": frozenset(_CONTRIB.split()),
}

#: The most nodes in all graphs of a model, graphs in graphs, and dims of a tensor.
NODES, DEPTH, RANK = 200_000, 2, 8

#: Bytes of an element by ONNX's number of its type; one of 4 bits is half.
_ITEM = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 16: 2, 21: 0.5, 22: 0.5}


def check_onnx(raw: bytes, weights: str, size: int) -> None:
    """Raises ArtifactError for a model that holds more than a graph that computes.

    `weights` is the one file, of `size` bytes, that its tensors may lie in beside the model's own bytes.
    """
    from onnx import ModelProto

    try:
        model = ModelProto.FromString(raw)
    except Exception as error:  # protobuf's own
        pass_on(error)
        raise ArtifactError(f"it is no ONNX model: {first_line(error)}") from None
    if model.functions or model.training_info or getattr(model, "configuration", ()):
        raise ArtifactError("it brings functions of its own, which no model here has")
    for opset in model.opset_import:
        if opset.domain not in _DOMAINS:
            raise ArtifactError(f"it uses operators of the domain {opset.domain!r}")
    _Check(weights, size).graph(model.graph, 0)
    for name in undivided(model.graph):
        raise ArtifactError(
            f"{name} of whole numbers by what is no constant above 0 may end the process"
        )


class _Check:
    def __init__(self, weights: str, size: int) -> None:
        self.weights = weights
        self.size = size
        self.nodes = 0

    def graph(self, graph: Any, depth: int) -> None:
        if depth > DEPTH:
            raise ArtifactError(f"it has graphs in graphs, {DEPTH} deep and more")
        if graph.sparse_initializer:
            raise ArtifactError("it has sparse tensors, which no model here has")
        for tensor in graph.initializer:
            self.tensor(tensor)
        self.nodes += len(graph.node)
        if self.nodes > NODES:
            raise ArtifactError(f"it has more than {NODES:,} nodes")
        for node in graph.node:
            if node.op_type not in _DOMAINS.get(node.domain, ()):
                name = f"{node.domain or 'ai.onnx'}.{node.op_type}"
                raise ArtifactError(f"{name} is not among the operators that an artifact may use")
            for attribute in node.attribute:
                self.attribute(node, attribute, depth)

    def attribute(self, node: Any, attribute: Any, depth: int) -> None:
        if attribute.HasField("g") and node.op_type == "If":
            self.graph(attribute.g, depth + 1)
        elif (
            attribute.HasField("g")
            or attribute.graphs
            or attribute.HasField("sparse_tensor")
            or attribute.sparse_tensors
            or attribute.HasField("tp")
            or attribute.type_protos
            or attribute.ref_attr_name
        ):
            raise ArtifactError(
                f"{node.op_type} has the attribute {attribute.name!r} of a kind that no model here has"
            )
        for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
            if tensor.external_data:
                raise ArtifactError(f"an attribute of {node.op_type} lies outside of the model")
            self.tensor(tensor)

    def tensor(self, tensor: Any) -> None:
        """A tensor whose bytes are all there, in the model or in the weights file."""
        dims = list(tensor.dims)
        if tensor.data_type not in _ITEM or len(dims) > RANK or any(dim < 0 for dim in dims):
            raise ArtifactError(
                f"the tensor {tensor.name!r} has a type or sizes that no model here has"
            )
        needed = math.ceil(math.prod(dims) * _ITEM[tensor.data_type])
        if tensor.HasField("segment"):
            raise ArtifactError(f"the tensor {tensor.name!r} is one piece of many")
        if not tensor.external_data and not tensor.data_location:
            typed = max(
                len(tensor.float_data),
                len(tensor.int32_data),
                len(tensor.int64_data),
                len(tensor.double_data),
                len(tensor.uint64_data),
            )
            has = len(tensor.raw_data) == needed if tensor.raw_data else typed == math.prod(dims)
            if not has or (tensor.raw_data and typed):
                raise ArtifactError(f"the tensor {tensor.name!r} has not the numbers of its sizes")
            return
        self.external(tensor, needed)

    def external(self, tensor: Any, needed: int) -> None:
        found = {entry.key: entry.value for entry in tensor.external_data}
        if found.get("location") != self.weights or len(found) != len(tensor.external_data):
            raise ArtifactError(
                f"the tensor {tensor.name!r} lies in {found.get('location')!r}, not in {self.weights}"
            )
        offset, length = found.get("offset", "0"), found.get("length", str(needed))
        for text in (offset, length):
            if not (text.isascii() and text.isdecimal() and len(text) < 19):
                raise ArtifactError(f"the tensor {tensor.name!r} lies at {text[:40]!r}")
        if int(length) != needed or int(offset) + needed > self.size:
            raise ArtifactError(
                f"the tensor {tensor.name!r} takes {needed:,} bytes at {int(offset):,}, which are not "
                f"all in a file of {self.size:,}"
            )
