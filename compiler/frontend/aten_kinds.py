"""What ATen operators do to dimensions, by their names: all that finding a region asks of them."""

from __future__ import annotations

import torch
from torch import fx

from .cascade.elementwise import RULES

CONTRACTIONS = {"matmul", "bmm", "mm", "einsum", "baddbmm"}
#: An operator that is an attention by itself.
WHOLE = {"scaled_dot_product_attention"}
VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias", "view_as"}
VIEWS |= {"permute", "transpose", "t", "mT", "movedim", "unsqueeze", "squeeze", "expand", "alias"}
VIEWS |= {"expand_as", "broadcast_to", "slice", "narrow", "select", "contiguous", "clone", "detach"}
VIEWS |= {"repeat", "repeat_interleave", "swapaxes", "swapdims", "adjoint", "mH"}
VIEWS |= {"numpy_T"}
#: Views that show elements more than once, which a product would copy.
REPEATS = {"expand", "repeat", "repeat_interleave"}
#: Operators with several results, each a view.
SPLITS = {"split", "split_with_sizes", "chunk", "unbind", "tensor_split"}
REDUCTIONS = {"softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "logsumexp"}
REDUCTIONS |= {"amax", "amin", "max", "min", "sum", "mean", "var", "std", "var_mean", "std_mean"}
REDUCTIONS |= {"linalg_vector_norm", "norm", "any"}
#: What reduces and is no reduction by itself: its result has the dimensions of what it is given.
NORMS = {"layer_norm", "native_layer_norm", "rms_norm", "cross_entropy_loss"}
POINTWISE = set(RULES) | {"_to_copy", "to", "type_as", "float", "half", "bfloat16", "double"}
POINTWISE |= {"dropout", "tril", "triu"}
CREATION = {"arange", "full", "zeros", "ones", "scalar_tensor"}
MADE = {
    "full_like",
    "zeros_like",
    "ones_like",
    "new_full",
    "new_zeros",
    "new_ones",
    "cat",
    "concat",
    "pad",
    "constant_pad_nd",
}


def name_of(node: fx.Node) -> str:
    """The ATen name of what a node calls, or "" where it is none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return target._schema.name.split("::")[1]
