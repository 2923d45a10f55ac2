"""Which tensor is stored how: the conventions of the usual converters."""

from __future__ import annotations

import pytest
import torch
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.writers.architecture import detect_architecture
from snug.quant_backends.writers.plan import PlannedTensor, plan_tensors
from snug.quant_backends.writers.precision import RULES, PrecisionRules


def plan_one(
    name: str, *shape: int, fmt: str = "Q8_0", arch: str | None = None, dtype: torch.dtype = torch.float16
) -> PlannedTensor:
    rules = RULES[arch] if arch else PrecisionRules()
    (planned,) = plan_tensors({name: torch.zeros(shape, dtype=dtype)}, FORMATS[fmt], rules)
    return planned


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 64), "Q8_0"),
        ((4096,), "F32"),  # a vector
        ((), "F32"),
        ((32, 32), "F32"),  # 1024 weights
        ((33, 32), "Q8_0"),
        ((64, 33), "F16"),  # no whole number of blocks
        ((64, 8, 3, 3), "F16"),  # a kernel
    ],
)
def test_format_follows_the_shape(shape: tuple[int, ...], expected: str) -> None:
    assert plan_one("layer.weight", *shape).format.name == expected


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, "BF16"), (torch.float32, "F16")])
def test_unquantized_tensors_stay_in_half_precision(dtype: torch.dtype, kept: str) -> None:
    assert plan_one("final_layer.weight", 64, 64, arch="flux", dtype=dtype).format.name == kept
    assert plan_one("layer.weight", 64, 33, dtype=dtype).format.name == kept


@pytest.mark.parametrize(
    ("arch", "name", "expected"),
    [
        ("flux", "double_blocks.0.img_attn.qkv.weight", "Q4_0"),
        ("flux", "guidance_in.in_layer.weight", "F16"),
        ("sd1", "time_embed.0.weight", "F16"),
        ("wan", "blocks.0.modulation", "F32"),
        ("wan", "head.modulation", "F32"),
        ("wan", "head.head.weight", "F16"),
        ("ltxv", "transformer_blocks.0.scale_shift_table", "F32"),
        ("lumina2", "noise_refiner.0.attention.qkv.weight", "F16"),
        ("lumina2", "layers.0.attention.qkv.weight", "Q4_0"),
        ("qwen_image", "transformer_blocks.0.attn.to_q.weight", "Q4_0"),
        ("qwen_image", "proj_out.weight", "F16"),
    ],
)
def test_delicate_layers_keep_their_precision(arch: str, name: str, expected: str) -> None:
    assert plan_one(name, 64, 256, fmt="Q4_0", arch=arch).format.name == expected


def test_cosmos_bookkeeping_is_dropped() -> None:
    tensors = {"blocks.0._extra_state": torch.zeros(4), "accum_steps": torch.zeros(4), "x": torch.zeros(4)}
    assert [planned.name for planned in plan_tensors(tensors, FORMATS["Q8_0"], RULES["cosmos"])] == ["x"]


@pytest.mark.parametrize(
    ("shape", "stored"),
    [
        ((320, 320), (400, 256)),
        ((320, 320, 3, 3), (3600, 256)),
        ((320, 768), (320, 768)),  # fits as it is
        ((10, 33), (10, 33)),  # 330 weights are no multiple of 256
        ((2, 128), (2, 128)),  # too small
    ],
)
def test_unets_are_folded_to_rows_of_256(shape: tuple[int, ...], stored: tuple[int, ...]) -> None:
    planned = plan_one("input_blocks.1.0.weight", *shape, fmt="Q4_0", arch="sd1")
    assert planned.shape == stored
    assert planned.original_shape == (shape if stored != shape else None)
    assert plan_one("layer.weight", *shape, arch="flux").shape == shape


def test_five_dimensions_are_stored_as_four() -> None:
    planned = plan_one("patch_embedding.weight", 256, 16, 1, 2, 2, arch="wan", dtype=torch.bfloat16)
    assert (planned.shape, planned.original_shape) == ((4096, 1, 2, 2), (256, 16, 1, 2, 2))
    assert planned.format.name == "F32"


def test_name_limit_counts_bytes() -> None:
    assert plan_one("a" * 127, 4).name == "a" * 127
    with pytest.raises(SnugError, match="128 bytes, but ggml allows at most 127"):
        plan_one("ä" * 64, 4)


def test_integer_tensors_are_refused() -> None:
    with pytest.raises(SnugError, match="is torch.uint8.*dequantize the model first"):
        plan_one("layer.weight", 64, 64, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["double_blocks.0.img_attn.proj.weight", "img_in.weight"], "flux"),
        (["input_blocks.0.0.weight", "time_embed.0.weight"], "sd1"),
        (["input_blocks.0.0.weight", "time_embed.0.weight", "label_emb.0.0.weight"], "sdxl"),
        (["model.diffusion_model.input_blocks.0.0.weight"], None),
        ([], None),
    ],
)
def test_architecture_from_names(names: list[str], expected: str | None) -> None:
    assert detect_architecture(names) == expected
