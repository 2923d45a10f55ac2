"""The model that ComfyUI would build from a file, without memory for its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_detection
import comfy.model_management as management
import comfy.ops
import comfy.utils
import torch

from ...quant_backends.core.errors import SnugError
from ...quant_backends.formats.plain import HALVES
from ...quant_backends.inspection.header import original_tensors
from ...quant_backends.inspection.stored import FileContents, StoredWeight
from ...quant_backends.inspection.summary import Match
from ...quant_backends.readers.repairs import rename_qk_norms
from .compat import flux_qk_norm
from .core_errors import refused_as, summary

# The device of tensors without content.
META = "meta"
# Vectors of at most so many weights are zeros rather than without content: ComfyUI looks into one to tell the two kinds
# of Stable Diffusion 2 apart.
MAX_ZEROS = 1 << 16


@dataclass(frozen=True, slots=True)
class Reference:
    """model: ComfyUI's BaseModel on the device META. match: how the file's tensors fit it. dtype: what plain weights
    are kept in once they are loaded."""

    model: Any
    match: Match
    dtype: torch.dtype


def build_reference(contents: FileContents) -> Reference:
    """As ComfyUI's loader does it, with the shapes of the file alone.

    Raises SnugError when the file does not tell all shapes, or when ComfyUI builds no model of them.
    """
    tensors = original_tensors(contents)
    if tensors is None:
        raise SnugError("The file does not tell the shapes of all its weights, which their content does.")
    norms = flux_qk_norm()
    tensors = rename_qk_norms(tensors, norms) if norms else tensors
    tensors = {name: _zeros(tensor) for name, tensor in tensors.items()}
    with refused_as(lambda error: SnugError(f"ComfyUI builds no model of them ({summary(error)}).")):
        config = comfy.model_detection.model_config_from_unet(
            tensors, "", metadata=_config(contents.metadata)
        )
        if config is None:
            raise SnugError("They match none of the models that this ComfyUI knows.")
        dtype = _choose_dtype(config, tensors)
        config.custom_operations = comfy.ops.manual_cast
        model = config.get_model(tensors, "", device=META)
        found = model.diffusion_model.load_state_dict(
            config.process_unet_state_dict(dict(tensors)), strict=False, assign=True
        )
    match = Match(type(model).__name__, tuple(found.missing_keys), tuple(found.unexpected_keys))
    return Reference(model, match, dtype)


def loaded_bytes(weights: tuple[StoredWeight, ...], dtype: torch.dtype, keeps_halves: bool) -> int:
    """Bytes of a file's weights in memory: quantized ones stay as they are, plain ones become the model's dtype.

    keeps_halves: Snug leaves matrices of 16 bits in the file where the model's dtype has more.
    """
    total = 0
    for weight in weights:
        if weight.dtype is None or not weight.dtype.is_floating_point:
            total += weight.nbytes
            continue
        is_kept = keeps_halves and weight.dtype in HALVES and len(weight.shape or ()) == 2
        itemsize = min(dtype.itemsize, weight.dtype.itemsize) if is_kept else dtype.itemsize
        total += weight.weights * itemsize
    return total


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 1 and tensor.numel() <= MAX_ZEROS:
        return torch.zeros_like(tensor, device="cpu")
    return tensor


def _choose_dtype(config: Any, tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    supported = list(config.supported_inference_dtypes)
    dtype = management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(tensors),
        supported_dtypes=supported,
        weight_dtype=comfy.utils.weight_dtype(tensors),
    )
    cast = management.unet_manual_cast(dtype, management.get_torch_device(), supported)
    config.set_inference_dtype(dtype, cast)
    return dtype


def _config(metadata: Mapping[str, Any]) -> dict[str, str] | None:
    """Model settings that the file carries, as ComfyUI's detection takes them."""
    config = metadata.get("config")
    return {"config": config} if isinstance(config, str) else None
