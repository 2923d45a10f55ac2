"""Files in ComfyUI's own convention: its layers find the weights that Snug wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

TARGETS = ("INT8 per row", "INT8 per row rotated", "FP8 e4m3fn per tensor", "FP8 e5m2 per tensor")
PRODUCTS = ("INT8 dynamic", "FP8 dynamic", "FP8 static")


def write(target: str, path: Path, convention: str = "") -> tuple[Any, torch.Tensor]:
    """A file with one layer, its packed weight and the weight before."""
    from snug.quant_backends.quantization import LayerInfo, make_recipe
    from snug.quant_backends.quantization.calibration import LayerStatistics
    from snug.quant_backends.writers import write_safetensors

    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(2)) / 20
    found = LayerStatistics(torch.ones(256), 4 * torch.ones(256), torch.tensor([-4.0, 3.0]), 10)
    packed = make_recipe(target, [], skip="", statistics={"proj": found}).quantize(
        LayerInfo("proj", (96, 256)), weight
    )
    assert packed is not None
    write_safetensors(path, {"proj.weight": packed, "proj.bias": torch.ones(96)}, convention)
    return packed, weight


def core_layer(path: Path) -> Any:
    """ComfyUI's layer with what is in the file."""
    import comfy.ops
    import comfy.utils

    if not hasattr(comfy.utils, "convert_old_quants"):
        pytest.skip("this ComfyUI reads none of it outside of a model")
    stored, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    stored, _ = comfy.utils.convert_old_quants(stored, "", metadata)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            operations = comfy.ops.mixed_precision_ops({}, torch.float32)
            self.proj = operations.Linear(256, 96, device="cpu", dtype=torch.float32)

    network = Network()
    missing, unexpected = network.load_state_dict(stored, strict=False)
    assert not missing and not unexpected
    return network.proj


@pytest.mark.parametrize("target", [*TARGETS, *PRODUCTS])
def test_core_reads_the_same_weights(target: str, comfy: Any, tmp_path: Path) -> None:
    from snug.quant_backends.kernels.dequantize import dequantize_packed

    path = tmp_path / "model.safetensors"
    packed, weight = write(target, path, "comfy_quant")
    layer = core_layer(path)
    found = layer.weight.dequantize()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dequantize_packed(packed), rtol=0, atol=1e-6)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(3))
    wanted = torch.nn.functional.linear(x, weight, torch.ones(96))
    assert (layer(x) - wanted).norm() < 0.05 * wanted.norm()
    if target == "FP8 static":
        assert torch.equal(layer.input_scale.view(1), packed.parts["step"])


def test_core_refuses_what_it_would_misread(comfy: Any, tmp_path: Path) -> None:
    """Static INT8, whose input channels are scaled and shifted."""
    path = tmp_path / "model.safetensors"
    write("INT8 static", path)
    with pytest.raises(KeyError, match="snug_int8"):
        core_layer(path)
