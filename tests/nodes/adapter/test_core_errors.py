"""What ComfyUI trips over in a file becomes one sentence about it; what is no fault of the file passes as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from controlnet_files import Tensors, sd3_controlnet
from quantized_files import quantize_tensors
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model

Damage = Callable[[Tensors, str], None]
SENTENCE = r"^[^\n]+\.safetensors: [^\n]+; [^\n]+\.$"


def dropped(tensors: Tensors, name: str) -> None:
    del tensors[name]


def flat(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].flatten()


def halved(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name][: len(tensors[name]) // 2].clone()


def empty(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name][:0].clone()


def write(path: Path, tensors: Tensors, kind: str) -> str:
    stored, metadata = quantize_tensors(tensors, kind) if kind != "plain" else (tensors, {})
    save_file({name: value.contiguous() for name, value in stored.items()}, path, metadata=metadata)
    return str(path)


@pytest.mark.parametrize("kind", ["nf4", "plain"])
@pytest.mark.parametrize(
    "damage,name", [(dropped, "head.head.weight"), (flat, "patch_embedding.weight")], ids=["missing", "flat"]
)
def test_models_that_detection_cannot_look_at(
    damage: Damage, name: str, kind: str, comfy: Any, tmp_path: Path
) -> None:
    from snug.nodes.adapter.loading import load_diffusion_model
    from snug.quant_backends.core.errors import FileFormatError

    make_tiny_model("wan", tmp_path / "whole.safetensors")
    tensors = load_file(tmp_path / "whole.safetensors")
    damage(tensors, name)
    with pytest.raises(FileFormatError, match=SENTENCE):
        load_diffusion_model(write(tmp_path / "damaged.safetensors", tensors, kind))


@pytest.mark.parametrize("kind", ["nf4", "plain"])
@pytest.mark.parametrize(
    "damage,name",
    [
        (flat, "pos_embed.proj.weight"),
        (halved, "transformer_blocks.0.attn.to_k.bias"),
        (empty, "transformer_blocks.0.attn.to_k.bias"),
        (flat, "transformer_blocks.0.attn.to_out.0.weight"),
    ],
)
def test_controlnets(damage: Damage, name: str, kind: str, comfy: Any, tmp_path: Path) -> None:
    from snug.nodes.adapter.controlnets import load_controlnet
    from snug.quant_backends.core.errors import FileFormatError

    tensors = sd3_controlnet()
    damage(tensors, name)
    with pytest.raises(FileFormatError, match=SENTENCE):
        load_controlnet(write(tmp_path / "control.safetensors", tensors, kind))


@pytest.mark.parametrize(
    "damage,end",
    [(dropped, "lora_down.weight"), (flat, "lora_up.weight"), (empty, "lora_down.weight"), (empty, "alpha")],
)
def test_loras(damage: Damage, end: str, sd3: Any, comfy: Any, tmp_path: Path) -> None:
    from snug.nodes.adapter.loras import apply_lora
    from snug.quant_backends.core.errors import FileFormatError

    layer = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    lora = {
        f"{layer}.lora_down.weight": torch.randn(4, 256),
        f"{layer}.lora_up.weight": torch.randn(768, 4),
        f"{layer}.alpha": torch.ones(1),
    }
    damage(lora, f"{layer}.{end}")
    with pytest.raises(FileFormatError, match=SENTENCE) as caught:
        apply_lora(sd3[0], None, write(tmp_path / "lora.safetensors", lora, "plain"), 1.0, 0.0)
    assert layer in str(caught.value) or end == "alpha"


@pytest.mark.parametrize("error", [AttributeError, KeyError, RuntimeError, ValueError])
def test_errors_of_snug_are_not_blamed_on_the_file(
    error: type[Exception], twins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised where ComfyUI calls Snug's own code: somebody has to see it to mend it."""
    import snug.nodes.adapter.packed_module as packed_module
    from snug.nodes.adapter.loading import load_diffusion_model

    def broken(_weight: Any) -> int:
        raise error("a mistake")

    monkeypatch.setattr(packed_module, "stored_nbytes", broken)
    with pytest.raises(error, match="a mistake"):
        load_diffusion_model(str(twins("sd3", "Q4_0").gguf))


@pytest.mark.parametrize(
    "text,about_the_file",
    [
        ("Sizes of tensors must match", True),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_what_comfyui_handles_itself(text: str, about_the_file: bool, comfy: Any) -> None:
    import comfy.utils
    from snug.nodes.adapter.core_errors import refused_as
    from snug.quant_backends.core.errors import SnugError

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError(text)

    bar = comfy.utils.ProgressBar(2)
    bar.hook = broken
    with pytest.raises(SnugError if about_the_file else RuntimeError), refused_as(lambda _: SnugError("")):
        bar.update(1)
