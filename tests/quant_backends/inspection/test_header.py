"""What a header tells: the same as loading the file, and nothing but it is read."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_files import KINDS, quantize_tensors
from safetensors.torch import save_file
from snug.quant_backends.core.errors import FileFormatError
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.inspection.header import original_tensors, read_header
from snug.quant_backends.inspection.stored import CHECKPOINT, DIFFUSION_MODEL
from snug.quant_backends.quantization import LayerInfo, make_recipe, product_targets
from snug.quant_backends.quantization.calibration import LayerStatistics
from snug.quant_backends.readers.conventions import open_quantized_safetensors
from snug.quant_backends.writers import write_safetensors
from sparse_files import flux_shapes, resident_bytes, sparse_gguf, sparse_safetensors

MEGABYTE = 2**20
# The header has a tenth of a megabyte; where it is not in the page cache, the system reads ahead.
MOST_READ = 32 * MEGABYTE
FLUX_WEIGHTS = 11_901_408_320


def small_model() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "blocks.0.up.weight": (512, 256),
        "blocks.0.up.bias": (512,),
        "blocks.1.down.weight": (256, 512),
        "blocks.1.down.bias": (256,),
        "blocks.1.query.weight": (256, 256),
        "norm.weight": (256,),
        "pos_embed": (1, 16, 256),
    }
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_tells_what_loading_finds(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors, metadata = quantize_tensors(small_model(), kind)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    check_header(path)


@pytest.mark.parametrize("target", ["INT8 per row rotated", "FP8 e4m3fn per tensor", *product_targets()])
def test_the_header_of_snugs_own_files(target: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors: dict[str, Any] = small_model()
    layers = [LayerInfo(n.removesuffix(".weight"), (*t.shape,)) for n, t in tensors.items() if t.dim() == 2]
    seen = {
        layer.name: LayerStatistics(
            torch.ones(layer.shape[1]), torch.ones(layer.shape[1]), torch.tensor([-1.0, 2.0]), 9
        )
        for layer in layers[1:]
    }
    recipe = make_recipe(target, layers, skip="", statistics=seen)
    for layer in layers:
        tensors[f"{layer.name}.weight"] = recipe.quantize(layer, tensors[f"{layer.name}.weight"])
    write_safetensors(path, tensors)
    check_header(path)


def check_header(path: Path) -> None:
    loaded = open_quantized_safetensors(path)
    contents = read_header(path)
    assert contents.convention == loaded.convention.name
    found = {weight.name: weight for weight in contents.weights}
    assert found.keys() == loaded.state_dict.keys()
    for name, value in loaded.state_dict.items():
        weight = found[name]
        assert weight.weights == math.prod(value.shape), name
        assert weight.shape in (tuple(value.shape), None), name
        assert abs(weight.nbytes - value.nbytes) <= 4, name  # bitsandbytes' nested offset lies in JSON
        if isinstance(value, PackedTensor):
            assert weight.format == value.format.name, name
            assert weight.dtype is None
        else:
            assert weight.dtype == value.dtype
    assert any(weight.dtype is None for weight in contents.weights)


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages of the page cache by mincore")
@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path, shapes: sparse_gguf(path, shapes, "Q8_0"), id="gguf"),
        pytest.param(lambda path, shapes: sparse_safetensors(path, shapes, "F8_E4M3"), id="safetensors"),
    ],
)
def test_of_12_gb_only_the_header_is_read(write: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "flux.model"
    write(path, flux_shapes())
    assert path.stat().st_size > 11.5e9
    before = resident_bytes(path)
    start = time.perf_counter()
    contents = read_header(path)
    seconds = time.perf_counter() - start
    read = resident_bytes(path) - before
    assert sum(weight.weights for weight in contents.weights) == FLUX_WEIGHTS
    assert contents.header_bytes is not None and contents.header_bytes < MEGABYTE / 4
    assert contents.file_bytes == path.stat().st_size
    assert read <= MOST_READ, f"{read} bytes were read"
    assert seconds < 1, f"{seconds:.3f} s"  # 0.02 s where no other programs run beside the tests
    # The measure sees what is read: a tensor in the middle of the file.
    touched = 2 * MOST_READ
    with path.open("rb") as file:
        file.seek(path.stat().st_size // 2)
        file.read(touched)
    assert resident_bytes(path) - before >= touched


def test_kinds_and_companions(tmp_path: Path) -> None:
    def kind(*names: str) -> str:
        path = tmp_path / "file.safetensors"
        save_file({name: torch.zeros(2) for name in names}, path)
        return read_header(path).kind

    assert kind("blocks.0.attn.weight") == DIFFUSION_MODEL
    assert kind("transformer.blocks.0.attn.lora_A.weight") == "LoRA"
    assert kind("encoder.block.0.layer.0.SelfAttention.q.weight") == "text encoder"
    assert kind("decoder.conv_in.weight", "decoder.conv_out.weight") == "VAE"
    assert kind("model.diffusion_model.a.weight", "first_stage_model.decoder.conv_in.weight") == CHECKPOINT
    contents = read_header(tmp_path / "file.safetensors")
    assert [weight.name for weight in contents.weights] == ["a.weight"]
    assert [weight.name for weight in contents.companions] == ["first_stage_model.decoder.conv_in.weight"]


def test_shapes_that_only_contents_tell_are_left_open(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors, _ = quantize_tensors(small_model(), "nf4")
    save_file(tensors, path)
    contents = read_header(path)
    shapes = {weight.name: weight.shape for weight in contents.weights}
    assert shapes["blocks.0.up.weight"] == (512, 256)  # its bias counts the rows
    assert shapes["blocks.1.query.weight"] is None
    assert original_tensors(contents) is None


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(small_model(), path)
    content = path.read_bytes()
    for damaged in (content[:40], content[:-7], b"", b"GGUF" + bytes(30)):
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError):
            read_header(path)
    with pytest.raises(FileFormatError):
        read_header(tmp_path / "missing.gguf")
