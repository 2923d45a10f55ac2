"""ComfyUI imported into the test process, and tiny models as GGUF beside their dense twins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from quantized_files import KINDS, quantized_twins
from tiny import make_tiny_model, use_comfyui
from twins import Twins, make_twins


@pytest.fixture(scope="session", autouse=True)
def comfy(comfyui_path: Path) -> ModuleType:
    use_comfyui(comfyui_path)
    import comfy.sd

    torch.set_grad_enabled(False)
    return comfy


@pytest.fixture(autouse=True)
def unload(comfy: ModuleType) -> Iterator[None]:
    yield
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="session")
def twins(comfy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Twins]:
    """twins(family, format) makes both files once per session; format: a ggml type, or a kind of quantized_files."""
    made: dict[tuple[str, str], Twins] = {}
    folder = tmp_path_factory.mktemp("twins")

    def make(family: str, format: str) -> Twins:
        if (family, format) not in made:
            source = folder / f"{family}.safetensors"
            if not source.exists():
                make_tiny_model(family, source)
            write = quantized_twins if format in KINDS else make_twins
            made[family, format] = write(source, folder, format)
        return made[family, format]

    return make


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

    @staticmethod
    def with_lora(patcher: Any, lora: dict[str, torch.Tensor], strength: float = 0.7) -> Any:
        """A clone with the LoRA applied, as the LoRA loader nodes make it."""
        import comfy.sd

        patched, _ = comfy.sd.load_lora_for_models(patcher, None, dict(lora), strength, 0)
        assert len(patched.patches) >= len(lora) // 2
        return patched

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
