"""ComfyUI's own quantized files: its loader takes those that this version knows, Snug decodes its float8 elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_files import dense_tensors, quantize_tensors
from safetensors.torch import load_file, save_file
from simulated_transfers import simulate_transfers
from tiny import make_tiny_model


@pytest.fixture(params=["beside the weights", "in the metadata"])
def files(request: pytest.FixtureRequest, comfy: Any, tmp_path: Path) -> tuple[Path, Path]:
    """(scaled float8 of a tiny SD3 as ComfyUI writes it, its dense twin)."""
    make_tiny_model("sd3", tmp_path / "source.safetensors")
    tensors, _ = quantize_tensors(load_file(tmp_path / "source.safetensors"), "fp8")
    tensors.pop("scaled_fp8")
    scales = [name for name in tensors if name.endswith(".scale_weight")]
    layers = [name.removesuffix(".scale_weight") for name in scales]
    for layer, scale in zip(layers, scales, strict=True):
        tensors[f"{layer}.weight_scale"] = tensors.pop(scale)
    description = {"format": "float8_e4m3fn"}
    metadata = None
    if request.param == "in the metadata":
        found = {"format_version": "1.0", "layers": dict.fromkeys(layers, description)}
        metadata = {"_quantization_metadata": json.dumps(found)}
    else:
        text = list(json.dumps(description).encode())
        for layer in layers:
            tensors[f"{layer}.comfy_quant"] = torch.tensor(text, dtype=torch.uint8)
    path, twin = tmp_path / "model.safetensors", tmp_path / "dense.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    save_file(dense_tensors(path), twin)
    return path, twin


def test_prediction_equals_the_dense_model(files: tuple[Path, Path], model: Any) -> None:
    import comfy.sd
    from snug.nodes.adapter.loading import load_diffusion_model

    quantized, dense = load_diffusion_model(str(files[0])), comfy.sd.load_diffusion_model(str(files[1]))
    kinds = {type(value).__name__ for value in quantized.model.parameters()}
    assert any("Quantized" in kind for kind in kinds) or list(model.packed_modules(quantized.model))
    wanted = model.run(dense, load=True)
    assert model.relative_error(model.run(quantized, load=True), wanted) < 1e-3


def test_the_inspector_tells_what_loading_takes(files: tuple[Path, Path]) -> None:
    from snug.nodes.adapter.loading import load_diffusion_model
    from snug.nodes.adapter.model_inspector import file_weight_bytes

    loaded = load_diffusion_model(str(files[0])).model_size()
    assert file_weight_bytes(str(files[0])) == pytest.approx(loaded, rel=0.01)


def test_a_format_that_no_one_here_knows(comfy: Any, tmp_path: Path) -> None:
    from snug.nodes.adapter.loading import load_diffusion_model
    from snug.quant_backends.core.errors import FileFormatError

    found = {"format_version": "1.0", "layers": {"joint_blocks.0": {"format": "int1_of_2031"}}}
    path = tmp_path / "model.safetensors"
    metadata = {"_quantization_metadata": json.dumps(found)}
    save_file({"joint_blocks.0.weight": torch.zeros(4, 4, dtype=torch.int8)}, path, metadata=metadata)
    with pytest.raises(FileFormatError, match="int1_of_2031.* does not know yet; update ComfyUI"):
        load_diffusion_model(str(path))


def test_blocks_are_streamed_quantized(
    files: tuple[Path, Path], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from snug.nodes.adapter.group_offload import OffloadSettings, offload_model
    from snug.nodes.adapter.loading import load_diffusion_model

    transfers = simulate_transfers(monkeypatch)
    plain = load_diffusion_model(str(files[0]))
    wanted = model.run(plain, load=True)
    streamed, _ = offload_model(plain, OffloadSettings())
    assert torch.equal(model.run(streamed, load=True), wanted)
    units = streamed.offloading.units(streamed.model)
    plan = streamed.offloading.plan(streamed.model, units)
    inside = sum(
        weight.nbytes
        for unit in units
        for name, weight in unit.module.state_dict().items()
        if "weight" in name
    )
    assert 0.9 * inside < plan.slab_bytes < 1.5 * inside
    assert sum(event.kind == "copy" for event in transfers[-1].clock.events) >= len(units)
    assert torch.equal(model.run(plain, load=True), wanted)
