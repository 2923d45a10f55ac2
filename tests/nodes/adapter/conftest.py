"""ComfyUI imported into the test process, and tiny models as GGUF beside their dense twins.

The twin holds the dequantized weights of the GGUF file and goes through ComfyUI's own loader, so whatever
differs between the two is Snug's doing and not the quantization's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from native_quantizer import native_quantizer
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="session", autouse=True)
def comfy(comfyui_path: Path) -> ModuleType:
    from tiny import use_comfyui

    use_comfyui(comfyui_path)
    import comfy.sd

    torch.set_grad_enabled(False)
    return comfy


@pytest.fixture(autouse=True)
def unload(comfy: ModuleType) -> Iterator[None]:
    yield
    comfy.model_management.unload_all_models()


@dataclass(frozen=True)
class Twins:
    """One tiny model: the GGUF file, and its dequantized weights as a dense safetensors file."""

    gguf: Path
    dense: Path

    def load(self) -> tuple[Any, Any]:
        """Freshly loaded (packed, dense) model patchers."""
        import comfy.sd
        from snug.nodes.adapter.loading import load_diffusion_model

        return load_diffusion_model(str(self.gguf)), comfy.sd.load_diffusion_model(str(self.dense))


@pytest.fixture(scope="session")
def twins(comfy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Twins]:
    """twins(family, format) makes both files once per session."""
    made: dict[tuple[str, str], Twins] = {}
    folder = tmp_path_factory.mktemp("twins")

    def make(family: str, format: str) -> Twins:
        if (family, format) not in made:
            made[family, format] = _make_twins(folder, family, format)
        return made[family, format]

    return make


def _make_twins(folder: Path, family: str, format: str) -> Twins:
    from snug.nodes.adapter.compat import flux_qk_norm
    from snug.quant_backends.core.packed import PackedTensor
    from snug.quant_backends.kernels.dequantize import dequantize
    from snug.quant_backends.readers import load_diffusion_gguf
    from snug.quant_backends.writers.gguf_file import write_gguf
    from tiny import make_tiny_model

    source = folder / f"{family}.safetensors"
    if not source.exists():
        make_tiny_model(family, source)
    twins = Twins(folder / f"{family}-{format}.gguf", folder / f"{family}-{format}.safetensors")
    write_gguf(twins.gguf, load_file(source), format, quantizer=native_quantizer)
    dense = {
        name: dequantize(tensor.data, tensor.format, tensor.shape)
        if isinstance(tensor, PackedTensor)
        else tensor.float().clone()
        for name, tensor in load_diffusion_gguf(twins.gguf, flux_qk_norm()).state_dict.items()
    }
    save_file(dense, twins.dense)
    return twins


@pytest.fixture
def sd3(twins: Callable[[str, str], Twins]) -> tuple[Any, Any]:
    """(packed, dense) patchers of a tiny SD3 in Q4_0: linear layers only."""
    return twins("sd3", "Q4_0").load()


@pytest.fixture
def sd15(twins: Callable[[str, str], Twins]) -> tuple[Any, Any]:
    """(packed, dense) patchers of a tiny SD1.5 in Q8_0: convolutions, and weights stored in another shape."""
    return twins("sd15", "Q8_0").load()


class ModelTools:
    """What the tests do with a model patcher (one object, as test files cannot import a conftest)."""

    @staticmethod
    def run(patcher: Any, load: bool = False) -> torch.Tensor:
        """One denoising prediction on fixed inputs; `load` loads the model whole first, as a sampler would."""
        import comfy.model_management

        if load:
            comfy.model_management.load_models_gpu([patcher])
        generator = torch.Generator().manual_seed(7)
        model = patcher.model
        is_sd3 = "SD3" in type(model).__name__
        latent = torch.randn(1, model.latent_format.latent_channels, 8, 8, generator=generator)
        context = torch.randn(1, 77, 4096 if is_sd3 else 768, generator=generator)
        extra = {"y": torch.randn(1, 2048, generator=generator)} if is_sd3 else {}
        sigma = model.model_sampling.sigma_max * torch.ones(1) * 0.5
        return model.apply_model(latent, sigma, c_crossattn=context, **extra)

    @staticmethod
    def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
        """L2 norm of the difference over the norm of the reference."""
        return (torch.linalg.vector_norm(value - reference) / torch.linalg.vector_norm(reference)).item()

    @staticmethod
    def packed_modules(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
        from snug.nodes.adapter.packed_module import packed_modules

        return packed_modules(model)

    @classmethod
    def make_lora(cls, model: torch.nn.Module, seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
        """A LoRA for every layer with a packed weight, strong enough to see."""
        generator = torch.Generator().manual_seed(seed)
        lora = {}
        for name, module in cls.packed_modules(model):
            rows, *inputs = module.weight.shape
            fan_in = torch.Size(inputs).numel()
            ones = (1,) * (len(inputs) - 1)
            lora[f"{name}.lora_down.weight"] = torch.randn(rank, *inputs, generator=generator) / fan_in**0.5
            lora[f"{name}.lora_up.weight"] = (
                torch.randn(rows, rank, *ones, generator=generator) * 0.3 / rank**0.5
            )
        return lora


@pytest.fixture
def model() -> type[ModelTools]:
    return ModelTools
