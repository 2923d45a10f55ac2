"""Targets and recipes: what becomes of which layer."""

from __future__ import annotations

import json

import pytest
import torch
from snug.quant_backends.core.backend import BACKENDS
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.formats.scaled import format_called
from snug.quant_backends.kernels.dequantize import dequantize_packed, quantize
from snug.quant_backends.quantization import LayerInfo, find_target, make_recipe, targets
from snug.quant_backends.registry import BACKENDS as REGISTERED

AVAILABLE = [target for target in targets().values() if not target.unavailable]

# Names that tell Stable Diffusion 1.
SD1 = ("input_blocks.0.0.weight", "time_embed.0.weight")
FLUX = [
    LayerInfo("img_in", (256, 64)),
    *(LayerInfo(f"double_blocks.{number}.img_attn.proj", (256, 256)) for number in range(3)),
    LayerInfo("double_blocks.1.img_mlp.0", (256, 256)),
    LayerInfo("single_blocks.4.linear1", (256, 256)),
    LayerInfo("final_layer.linear", (64, 256)),
]


def test_targets_are_of_known_backends_and_called_by_their_names() -> None:
    assert REGISTERED is BACKENDS
    for name, target in targets().items():
        assert target.name == name and target.backend in BACKENDS
        assert not target.unavailable or target.unavailable.endswith(".")


@pytest.mark.parametrize("target", AVAILABLE, ids=lambda target: target.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_target_quantizes(target, dtype: torch.dtype) -> None:
    layer = LayerInfo("blocks.0.linear", (96, 1024), dtype=dtype)
    weight = (torch.randn(layer.shape, generator=torch.Generator().manual_seed(1)) / 30).to(dtype)
    weight[2] = 0
    before = weight.clone()
    packed = make_recipe(target.name, [layer], skip="").quantize(layer, weight)
    assert packed is not None and packed.shape == layer.shape
    assert torch.equal(weight, before), "the weight must stay as it is"
    assert packed.format == format_called(packed.format.name)
    found = dequantize_packed(packed)
    assert torch.equal(found[2], torch.zeros(1024))
    error = (found - weight.float()).norm() / weight.float().norm()
    # Floats have their bound, integers that of a uniform quantizer; TQ1_0 and TQ2_0 hold -1, 0 and 1.
    bound = 0.9 if target.bits < 2.2 else 2.0 ** (2.2 - min(target.bits, 8))
    assert error < (0.06 if "float8" in packed.format.name else bound)
    if dtype != torch.float32:  # quanto's scales have the weight's own dtype
        assert packed.nbytes * 8 / weight.numel() == pytest.approx(target.bits, rel=0.04)


def test_skipped_layers_by_architecture_by_pattern_and_by_kind() -> None:
    recipe = make_recipe("GGUF Q8_0", FLUX)
    kept = [layer.name for layer in FLUX if recipe.format_for(layer) is None]
    assert kept == ["img_in", "final_layer.linear"]
    recipe = make_recipe("GGUF Q8_0", FLUX, skip="default, ^single")
    assert recipe.format_for(FLUX[5]) is None
    conv = LayerInfo("double_blocks.0.conv", (256, 64, 3, 32), kind="conv")
    assert recipe.format_for(conv) is None
    assert make_recipe("GGUF Q8_0", FLUX, kinds=("linear", "conv")).format_for(conv) is not None


def test_overrides_win() -> None:
    overrides = {"img_in": "Q4_0", "double_blocks.0.img_attn.proj": "", "double_blocks.1.img_mlp.0": "Q5_0"}
    recipe = make_recipe("GGUF Q8_0", FLUX, overrides=overrides)
    names = {layer.name: getattr(recipe.format_for(layer), "name", None) for layer in FLUX}
    assert {name: names[name] or "" for name in overrides} == overrides
    assert names["double_blocks.2.img_attn.proj"] == "Q8_0"


def test_rows_that_are_no_whole_blocks_are_kept() -> None:
    narrow = LayerInfo("double_blocks.0.x", (64, 40))
    assert make_recipe("GGUF Q8_0", [narrow], skip="").format_for(narrow) is None
    assert make_recipe("FP8 e4m3fn per row", [narrow], skip="").format_for(narrow) is not None


def test_kernels_of_stable_diffusion_are_folded_with_their_importance() -> None:
    """As GGUF files hold them; of other architectures, and in other formats, they stay."""
    kernel = LayerInfo("input_blocks.1.0.in_layers.2", (64, 32, 3, 3), "conv", torch.float32)
    weight = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(1))
    mean_square = torch.rand(32, generator=torch.Generator().manual_seed(2))
    recipe = make_recipe("GGUF Q4_K", [kernel], SD1, importance={kernel.name: mean_square})
    packed = recipe.quantize(kernel, weight)
    expected = quantize(weight.view(-1, 256), FORMATS["Q4_K"], mean_square.repeat_interleave(9))
    assert packed is not None and packed.shape == kernel.shape
    assert torch.equal(packed.data, expected.view(-1))
    assert not torch.equal(packed.data, quantize(weight.view(-1, 256), FORMATS["Q4_K"]).view(-1))
    odd = LayerInfo("input_blocks.1.0.x", (5, 3, 3, 3), "conv")
    assert recipe.format_for(odd) is None
    assert make_recipe("GGUF Q4_K", [kernel], skip="").format_for(kernel) is None
    assert make_recipe("INT8 per row", [kernel], SD1).format_for(kernel) is None


def test_wrong_names_and_calibrations_are_explained() -> None:
    with pytest.raises(SnugError, match="no quantization called 'Q9'; choose one of .*GGUF Q8_0"):
        find_target("Q9")
    layer = FLUX[1]
    recipe = make_recipe("GGUF Q8_0", FLUX, importance={layer.name: torch.ones(3)})
    with pytest.raises(SnugError, match=r"shape \(3,\).*made with another model"):
        recipe.quantize(layer, torch.zeros(layer.shape))


def test_a_recipe_describes_itself() -> None:
    recipe = make_recipe("GGUF Q8_0", FLUX, overrides={"img_in": ""}, skip="default, abc")
    described = recipe.describe()
    assert json.loads(json.dumps(described)) == described
    assert (
        described["target"] == "GGUF Q8_0"
        and "abc" in described["skip"]
        and "final_layer" in described["skip"]
    )
