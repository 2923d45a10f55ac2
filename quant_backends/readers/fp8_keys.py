"""float8 weights with scales beside them: ComfyUI's first "scaled fp8", the newer key alone, and block-scaled files.

`L.weight` float8, `L.scale_weight` (or `L.weight_scale`) float, one element, one a row, or one for each block in a grid
of two dimensions; `L.weight_scale_inv` is the same by the name that DeepSeek and transformers' fine-grained FP8 use
(w = data * scale, in spite of it). `L.scale_input` (`L.input_scale`, `L.activation_scale`) scales activations and is
kept as an extra, as is the marker `[prefix]scaled_fp8`, whose dtype only repeats the weights'.
"""

from __future__ import annotations

import torch

from .gguf_values import shown
from .key_groups import KeyGroups
from .mapped_file import writable
from .safetensors_file import SafetensorsFile

KEYS = (
    (".scale_weight", ".scale_input"),
    (".weight_scale", ".input_scale"),
    (".weight_scale_inv", ".activation_scale"),
)
MARKER = "scaled_fp8"
FLOAT8 = {
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
    torch.float8_e4m3fnuz: "float8_e4m3fnuz",
    torch.float8_e5m2fnuz: "float8_e5m2fnuz",
}
Shape = tuple[int, ...]


def has_scaled_fp8(file: SafetensorsFile) -> bool:
    if any(name == MARKER or name.endswith("." + MARKER) for name in file.tensors):
        return True
    for name, info in file.tensors.items():
        if info.dtype in FLOAT8 and name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            if any(layer + scale in file.tensors for scale, _ in KEYS):
                return True
    return False


def load_scaled_fp8(groups: KeyGroups) -> None:
    groups.keep([name for name in groups.file.tensors if name == MARKER or name.endswith("." + MARKER)])
    block_of_file = _block_of_file(groups)
    for scale_key, input_key in KEYS:
        for layer in groups.ending(scale_key):
            name = f"{layer}.weight"
            info = groups.file.tensors.get(name)
            if info is None or name not in groups.left:
                continue
            groups.keep([layer + input_key])
            weight, scale = groups.take(name), groups.take(layer + scale_key)
            if info.dtype in FLOAT8:
                block = _block_name(groups, name, tuple(scale.shape), block_of_file)
                groups.pack(name, weight, f"{FLOAT8[info.dtype]}-{block}", info.shape, {"scale": scale})
            elif scale.numel() == 1 and info.dtype.is_floating_point and scale.dtype.is_floating_point:
                # Converters write a scale, mostly 1, beside layers that they left as they were.
                groups.state_dict[name] = _scaled(weight, scale.float().item())
            else:
                groups.file.fail(f"the weight {shown(name)} is {info.dtype_name} with {scale.numel()} scales")


def _scaled(weight: torch.Tensor, scale: float) -> torch.Tensor:
    """A plain weight times its scale; times 1, which is mostly the case, it stays in the mapped file."""
    return writable(weight) if scale == 1 else (weight.float() * scale).to(weight.dtype)


def _block_name(groups: KeyGroups, name: str, grid: Shape, block_of_file: Shape | None) -> str:
    """How a format's name calls the blocks that share a scale."""
    shape = groups.file.tensors[name].shape
    if not _is_grid(shape, grid):
        return "tensor" if set(grid) <= {1} else "rows"
    block = _even_block(shape, grid)
    if block is None and block_of_file is not None:
        fits = all(-(-n // b) == k for n, b, k in zip(shape, block_of_file, grid, strict=True))
        block = block_of_file if fits else None
    if block is None:
        groups.file.fail(
            f"the blocks of {shown(name)} are not certain: {grid[0]} x {grid[1]} scales for {shape[0]} x {shape[1]} "
            f"weights, expected blocks of a power of two that fit evenly",
            "load a version of the model with one scale per tensor, or a GGUF",
        )
    return f"{block[0]}x{block[1]}"


def _block_of_file(groups: KeyGroups) -> Shape | None:
    """The block of all weights that leave no doubt, when they agree: edges of other weights may cut theirs."""
    found = set()
    for scale_key, _ in KEYS:
        for layer in groups.ending(scale_key):
            weight = groups.file.tensors.get(f"{layer}.weight")
            grid = groups.file.tensors[layer + scale_key].shape
            if weight is not None and weight.dtype in FLOAT8 and _is_grid(weight.shape, grid):
                found.add(_even_block(weight.shape, grid))
    found.discard(None)
    return found.pop() if len(found) == 1 else None


def _is_grid(shape: Shape, grid: Shape) -> bool:
    """Whether scales of this shape mean blocks of a matrix, rather than the tensor or its rows."""
    return len(shape) == len(grid) == 2 and grid[0] * grid[1] > 1 and grid != (shape[0], 1)


def _even_block(shape: Shape, grid: Shape) -> Shape | None:
    """The block (rows, columns) where sizes fit evenly and are what somebody would choose; else None."""
    block = []
    for size, count in zip(shape, grid, strict=True):
        if not count or size % count:
            return None
        step = size // count
        if count > 1 and step & (step - 1):
            return None
        block.append(step)
    return tuple(block)
