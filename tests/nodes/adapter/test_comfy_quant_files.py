"""Files in ComfyUI's own convention: its layers find the weights that Snug wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.mark.parametrize(
    "target", ["INT8 per row", "INT8 per row rotated", "FP8 e4m3fn per tensor", "FP8 e5m2 per tensor"]
)
def test_core_reads_the_same_weights(target: str, comfy: Any, tmp_path: Path) -> None:
    import comfy.ops
    import comfy.utils
    from snug.quant_backends.kernels.dequantize import dequantize_packed
    from snug.quant_backends.quantization import LayerInfo, make_recipe
    from snug.quant_backends.writers import write_safetensors

    if not hasattr(comfy.utils, "convert_old_quants"):
        pytest.skip("this ComfyUI reads none of it outside of a model")
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(2)) / 20
    packed = make_recipe(target, [], skip="").quantize(LayerInfo("proj", (96, 256)), weight)
    assert packed is not None
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"proj.weight": packed, "proj.bias": torch.ones(96)}, "comfy_quant")
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
    found = network.proj.weight.dequantize()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dequantize_packed(packed), rtol=0, atol=1e-6)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(3))
    wanted = torch.nn.functional.linear(x, weight, torch.ones(96))
    assert (network.proj(x) - wanted).norm() < 0.05 * wanted.norm()
