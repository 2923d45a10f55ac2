"""One linear layer in every format, plain and with a LoRA, as loading makes it, to watch what its forward does."""

from __future__ import annotations

from typing import Any

import torch
from random_packed import random_packed
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.formats.eight_bit_products import EightBitProducts
from snug.quant_backends.formats.outlier_products import OutlierProducts
from snug.quant_backends.formats.scaled import format_called
from snug.quant_backends.kernels.dequantize import quantize_packed
from snug.quant_backends.registry import BACKENDS

ROWS, COLUMNS, TOKENS, RANK = 32, 256, 32, 4
PRODUCTS = [EightBitProducts("int8").name, EightBitProducts("float8_e4m3fn").name, OutlierProducts().name]
SCALED = {name for backend in BACKENDS.values() for family in backend.families for name in family.examples}
EVERY = [name for name, fmt in FORMATS.items() if fmt.dtype is None]
EVERY += ["BF16", "F16", *sorted(SCALED - set(FORMATS) - set(PRODUCTS)), *PRODUCTS]
PLAIN, MERGED, BRANCH = "plain", "LoRA merged", "LoRA as a branch"


def _packed(format: str) -> Any:
    if format in PRODUCTS:
        return quantize_packed(torch.randn(ROWS, COLUMNS), format_called(format))
    return random_packed(format, (ROWS, COLUMNS))


def make_layer(format: str, device: str, lora: str) -> Any:
    """ComfyUI must have been imported."""
    from comfy.weight_adapter import LoRAAdapter
    from snug.nodes.adapter.layout import moved, pack
    from snug.nodes.adapter.lora_settings import BRANCH as AS_BRANCH
    from snug.nodes.adapter.lora_settings import MERGE, LoraSettings
    from snug.nodes.adapter.operations import build_operations
    from snug.nodes.adapter.packed_module import LoadSettings
    from snug.nodes.adapter.patches import WeightPatches
    from snug.nodes.adapter.side_branch import side_branch

    there = torch.device(device)
    layer = build_operations(LoadSettings(on_weight=lambda _: None)).Linear(COLUMNS, ROWS)
    weight = pack(moved(_packed(format), there), torch.bfloat16)
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(ROWS, dtype=torch.bfloat16, device=there)})
    if lora != PLAIN:
        factors = (torch.randn(ROWS, RANK), torch.randn(RANK, COLUMNS), float(RANK), None, None, None)
        patches = [(0.5, LoRAAdapter(set(), factors), 1.0, None, None)]
        mode = LoraSettings(AS_BRANCH if lora == BRANCH else MERGE)
        branch = side_branch(layer, patches, there, torch.bfloat16, mode)
        assert (branch is not None) is (lora == BRANCH)
        layer.weight_patches = WeightPatches("weight", patches, there, branch)
    return layer
