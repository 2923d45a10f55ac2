"""For every format that loads: the bytes of weights that a header tells are those of the loaded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_folders import FOLDER_KINDS, save_folder
from diffusers_models import CONFIGS
from quantized_files import KINDS, quantize_tensors
from safetensors.torch import load_file, save_file
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.writers.gguf_file import write_gguf
from tiny import make_tiny_model

# Those that weights are in; indices and the like are not.
GGUF_TYPES = [
    name for name, fmt in FORMATS.items() if fmt.dtype in (None, torch.float32, torch.float16, torch.bfloat16)
]
DENSE = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.fixture(scope="module")
def tensors(comfy: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    path = tmp_path_factory.mktemp("source") / "sd3.safetensors"
    make_tiny_model("sd3", path)
    return load_file(path)


@pytest.fixture
def check() -> Callable[[Path], None]:
    def check(path: Path) -> None:
        from snug.nodes.adapter.computing import ImageSize
        from snug.nodes.adapter.loading import load_diffusion_model
        from snug.nodes.adapter.model_inspector import file_weight_bytes, inspect_file

        fit = inspect_file(str(path), ImageSize(64, 64, 1)).fit
        loaded = load_diffusion_model(str(path)).model_size()
        assert fit is not None
        assert fit.demand.weights == pytest.approx(loaded, rel=0.01)
        assert file_weight_bytes(str(path)) == pytest.approx(loaded, rel=0.01)

    return check


def zero_blocks(values: torch.Tensor, name: str) -> torch.Tensor:
    """In place of a quantizer: as many bytes."""
    rows, columns = values.shape
    return torch.zeros(rows, FORMATS[name].nbytes((columns,)), dtype=torch.uint8)


@pytest.mark.parametrize("format", GGUF_TYPES)
def test_gguf(format: str, tensors: dict[str, torch.Tensor], check: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tensors, format, quantizer=zero_blocks)
    check(tmp_path / "model.gguf")


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors(kind: str, tensors: dict[str, torch.Tensor], check: Any, tmp_path: Path) -> None:
    quantized, metadata = quantize_tensors(tensors, kind)
    path = tmp_path / "model.safetensors"
    save_file({name: value.contiguous() for name, value in quantized.items()}, path, metadata=metadata)
    check(path)


@pytest.mark.parametrize("dtype", DENSE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_plain(dtype: torch.dtype, tensors: dict[str, torch.Tensor], check: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: value.to(dtype) for name, value in tensors.items()}, path)
    check(path)


@pytest.mark.parametrize("kind", [None, *FOLDER_KINDS])
def test_folders(kind: str | None, check: Any, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    name, arguments = CONFIGS["sd3"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(diffusers, name)(**arguments).to(torch.bfloat16)
    save_folder(model, tmp_path / "folder", kind)
    check(tmp_path / "folder")
