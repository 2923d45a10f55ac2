"""All-in-one checkpoints, GGUF or safetensors: diffusion model, text encoders and VAE of one file.

The diffusion model is repaired as when it is alone; text encoders stay packed; the VAE is decoded, as no operation of
Snug's stands in its model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core.packed import PackedTensor
from ..kernels.dequantize import dequantize_packed
from .checkpoint_names import (
    DIFFUSION_PREFIX,
    UNUSED_PREFIXES,
    VAE_PREFIXES,
    encoder_groups,
    encoder_kind,
    encoder_places,
    placed_name,
)
from .clip_names import hugging_face_names, split_attention
from .conventions import load_quantized
from .diffusion_gguf import LoadedTensors, load_diffusion_gguf
from .diffusion_safetensors import QKNorm, load_diffusion_safetensors
from .gguf_file import GGUFFile
from .repairs import diffusion_names
from .safetensors_file import SafetensorsFile
from .text_encoder_gguf import as_stored
from .text_encoder_safetensors import as_needed

Value = PackedTensor | torch.Tensor

# Attention of the VAE as linear layers, where ComfyUI's has 1x1 convolutions.
VAE_ATTENTION = re.compile(r"(encoder|decoder)\.mid\.attn_1\.(q|k|v|proj_out)\.weight$")


@dataclass(frozen=True, slots=True)
class CheckpointParts:
    """A checkpoint under the names of ComfyUI's own.

    diffusion: without prefix. encoders: with theirs, matrices packed. vae: without prefix, dense. rest: whatever
    else lies beside them, such as marks of v-prediction. source: kind, metadata and formats of the diffusion model.
    """

    diffusion: Mapping[str, Value]
    encoders: Mapping[str, Value]
    vae: Mapping[str, torch.Tensor]
    rest: Mapping[str, torch.Tensor]
    source: LoadedTensors

    def state_dict(self) -> dict[str, Value]:
        """All parts together. The VAE is there under both prefixes that ComfyUI's configurations look for."""
        vae = {prefix + name: value for prefix in VAE_PREFIXES for name, value in self.vae.items()}
        diffusion = {DIFFUSION_PREFIX + name: value for name, value in self.diffusion.items()}
        return {**diffusion, **self.encoders, **vae, **self.rest}


def open_checkpoint_gguf(
    file: GGUFFile,
    qk_norm: QKNorm = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckpointParts:
    """The parts of a GGUF file, as stable-diffusion.cpp writes it.

    qk_norm, progress, errors: as for `load_diffusion_gguf`.
    """
    source = load_diffusion_gguf(file.path, qk_norm, progress)
    used = set(diffusion_names(file.tensors).values())
    others = {name: info for name, info in file.tensors.items() if name not in used}
    # Without their names: what has to be decoded for its name's sake is seen to when all have their final ones.
    return _parts(source, {name: as_stored("", info, file.read(name)) for name, info in others.items()})


def open_checkpoint_safetensors(
    file: SafetensorsFile,
    qk_norm: QKNorm = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckpointParts:
    """The parts of a quantized safetensors file of any convention.

    qk_norm, progress, errors: as for `load_diffusion_safetensors`.
    """
    source = load_diffusion_safetensors(file, qk_norm, progress)
    stored = load_quantized(file).state_dict  # again, but nearly all of it are views of the file
    used = set(diffusion_names(stored).values())
    return _parts(source, {name: value for name, value in stored.items() if name not in used})


def _parts(source: LoadedTensors, others: Mapping[str, Value]) -> CheckpointParts:
    others = {name: value for name, value in others.items() if not name.startswith(UNUSED_PREFIXES)}
    groups = encoder_groups(others)
    in_encoders = {stored for group in groups.values() for stored in group.values()}
    vae, rest = {}, {}
    for name, value in others.items():
        prefix = next((prefix for prefix in VAE_PREFIXES if name.startswith(prefix)), None)
        if prefix is not None:
            vae[name.removeprefix(prefix)] = _vae_weight(name.removeprefix(prefix), value)
        elif name not in in_encoders:
            rest[name] = _dense(value)
    return CheckpointParts(
        diffusion=source.state_dict,
        encoders=dict(_encoders(groups, others, source.state_dict)),
        vae=vae,
        rest=rest,
        source=source,
    )


def _encoders(
    groups: Mapping[str, Mapping[str, str]], stored: Mapping[str, Value], diffusion: Mapping[str, Any]
) -> Iterator[tuple[str, Value]]:
    inside = {
        prefix: hugging_face_names({inner: stored[name] for inner, name in group.items()})
        for prefix, group in groups.items()
    }
    kinds = {
        prefix: encoder_kind({name: tuple(value.shape) for name, value in group.items()})
        for prefix, group in inside.items()
    }
    places = encoder_places(kinds, diffusion.keys())
    for prefix, group in inside.items():
        for name, value in group.items():
            if name == "text_projection":  # multiplies from the right
                yield placed_name(places[prefix], "text_projection.weight"), _dense(value).T.contiguous()
                continue
            for part, tensor in split_attention(name, value):
                yield placed_name(places[prefix], part), as_needed(part, tensor)


def _dense(value: Value) -> torch.Tensor:
    return dequantize_packed(value) if isinstance(value, PackedTensor) else value


def _vae_weight(name: str, value: Value) -> torch.Tensor:
    weight = _dense(value)
    return weight[:, :, None, None] if weight.dim() == 2 and VAE_ATTENTION.match(name) else weight
