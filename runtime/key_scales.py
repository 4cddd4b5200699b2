"""What codes of keys stand for, where the runtime must tell how like keys are (`alike.py`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from ..compiler.ir.kv.layout import cache_name
from ..compiler.ir.manifest import WEIGHTS
from ..errors import ArtifactError, pass_on
from .artifact import Artifact

Floats = npt.NDArray[np.float32]


def key_scales(artifact: Artifact) -> dict[str, Floats]:
    """What the codes of keys stand for, [K, D] by the first part of a group's buffers' names: of those groups
    whose tokens change their slots. Raises ArtifactError where the weights lack one, or hold another's."""
    wanted = {
        cache_name(layer.layer, index): (len(group.heads), layer.key_size)
        for layer, index, group in artifact.manifest.layout().reordered
        if group.storage.slot_dtype == "i8"
    }
    if not wanted:
        return {}
    path = artifact.file(WEIGHTS)
    try:
        with safe_open(str(path), framework="np") as weights:
            found = {name: weights.get_tensor(f"{name}.key_scale") for name in wanted}
    except (SafetensorError, OSError, TypeError) as error:  # NumPy has no bfloat16
        pass_on(error)
        raise ArtifactError(
            f"{path} has no scales of keys by which the cache could be read: {error}"
        ) from error
    for name, scale_KD in found.items():
        if scale_KD.shape != wanted[name] or scale_KD.dtype != np.float32:
            raise ArtifactError(
                f"{path} holds {name}.key_scale as {scale_KD.dtype} {scale_KD.shape}, and the cache has "
                f"float32 {wanted[name]}"
            )
    return found
