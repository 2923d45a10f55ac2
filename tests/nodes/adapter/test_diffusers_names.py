"""What diffusers saves becomes what ComfyUI's own models are built from: the same names, shapes and results."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers_models import tiny_diffusers_model
from snug.quant_backends.readers.diffusers_names import to_original_names
from snug.quant_backends.readers.repairs import rename_qk_norms

State = dict[str, torch.Tensor]

# The class of the model that ComfyUI detects.
DETECTED = {
    "sd3": "SD3",
    "pixart": "PixArt",
    "pixart-alpha": "PixArt",
    "wan": "WAN21",
    "wan-i2v": "WAN21",
    "wan-vace": "WAN21_Vace",
    "sdxl": "SDXL",
    "sd15": "BaseModel",
}
# Of these ComfyUI fixes the number of heads, so that its class is built with theirs.
FIXED_HEADS = {
    "flux": ("comfy.ldm.flux.model", "Flux", "FluxParams", {"num_heads": 2}),
    "qwen_image": (
        "comfy.ldm.qwen_image.model",
        "QwenImageTransformer2DModel",
        None,
        {"num_attention_heads": 2},
    ),
}
# PixArt's embedding of the empty prompt, which only training uses and diffusers does not save.
UNUSED = {"y_embedder.y_embedding"}


def converted(model: Any) -> State:
    from snug.nodes.adapter.compat import flux_qk_norm

    names: Any = to_original_names(model.state_dict())
    return rename_qk_norms(names, flux_qk_norm() or "scale")


def build_fixed_heads(family: str, state: State) -> Any:
    """ComfyUI's model for the weights, as its detection describes it except for the number of heads."""
    import comfy.model_detection
    import comfy.ops

    module_name, class_name, params, heads = FIXED_HEADS[family]
    config = comfy.model_detection.detect_unet_config(state, "")
    assert config is not None and config.pop("image_model") == family
    assert comfy.model_detection.model_config_from_unet(dict(state), "") is not None
    module = importlib.import_module(module_name)
    config.update(heads)
    if params is not None:
        known = {field.name for field in dataclasses.fields(getattr(module, params))}
        config = {name: value for name, value in config.items() if name in known}
    model = getattr(module, class_name)(
        **config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
    )
    return model


def build(family: str, state: State) -> Any:
    """ComfyUI's denoiser with the weights in it, loaded the way that it loads a file of its own."""
    import comfy.sd

    if family in FIXED_HEADS:
        model = build_fixed_heads(family, state)
    else:
        patcher = comfy.sd.load_diffusion_model_state_dict(dict(state))
        assert patcher is not None and type(patcher.model).__name__ == DETECTED[family]
        model = patcher.model.diffusion_model
    expected = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in UNUSED
    }
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    if family in FIXED_HEADS:
        model.load_state_dict(state)
    return model


@pytest.mark.parametrize("family", [*DETECTED, *FIXED_HEADS])
def test_comfyui_knows_every_name(family: str) -> None:
    model = build(family, converted(tiny_diffusers_model(family)))
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("family", ["flux", "sd3", "pixart", "pixart-alpha"])
def test_the_same_as_comfyuis_own_conversion(family: str) -> None:
    import comfy.model_detection

    state = tiny_diffusers_model(family).state_dict()
    own = comfy.model_detection.convert_diffusers_mmdit(
        {name: value.clone() for name, value in state.items()}, ""
    )
    own = rename_qk_norms(own, "scale")
    mine = to_original_names(state)
    assert mine.keys() == own.keys()
    for name, value in own.items():
        found = mine[name]
        assert isinstance(found, torch.Tensor) and torch.equal(found, value), name


Call = Callable[[Any, Any, torch.Generator], tuple[torch.Tensor, torch.Tensor]]


def noise(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def call_sd3(theirs: Any, ours: Any, dice: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    latent, text, pooled = noise(dice, 1, 16, 8, 12), noise(dice, 1, 7, 4096), noise(dice, 1, 2048)
    time = torch.tensor([437.0])
    expected = theirs(latent, encoder_hidden_states=text, pooled_projections=pooled, timestep=time).sample
    return expected, ours(latent, timesteps=time, context=text, y=pooled)


def call_flux(theirs: Any, ours: Any, dice: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = 4, 6  # in patches of 2 x 2
    latent, text, pooled = noise(dice, 1, 16, 8, 12), noise(dice, 1, 7, 512), noise(dice, 1, 768)
    time, guidance = torch.tensor([0.437]), torch.tensor([3.5])
    patches = latent.view(1, 16, height, 2, width, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, height * width, 64)
    places = torch.zeros(height, width, 3)
    places[..., 1], places[..., 2] = torch.arange(height)[:, None], torch.arange(width)[None]
    found = theirs(
        patches,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=time,
        guidance=guidance,
        img_ids=places.view(-1, 3),
        txt_ids=torch.zeros(7, 3),
    ).sample
    expected = found.view(1, height, width, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(latent.shape)
    return expected, ours(latent, time, text, pooled, guidance)


def call_wan(theirs: Any, ours: Any, dice: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    latent, text = noise(dice, 1, 16, 3, 8, 12), noise(dice, 1, 7, 4096)
    time = torch.tensor([437.0])
    return theirs(latent, encoder_hidden_states=text, timestep=time).sample, ours(latent, time, text)


def call_wan_i2v(theirs: Any, ours: Any, dice: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last frame: two images of 257 tokens, whose places have an embedding of their own."""
    latent, text, images = noise(dice, 1, 36, 3, 8, 12), noise(dice, 1, 512, 4096), noise(dice, 2, 257, 1280)
    time = torch.tensor([437.0])
    expected = theirs(
        latent, encoder_hidden_states=text, encoder_hidden_states_image=images, timestep=time
    ).sample
    return expected, ours(latent, time, text, clip_fea=images.view(1, 514, 1280))


def call_qwen_image(theirs: Any, ours: Any, dice: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = 4, 6
    latent, text = noise(dice, 1, 16, 1, 8, 12), noise(dice, 1, 7, 3584)
    patches = latent.view(1, 16, height, 2, width, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, height * width, 64)
    time = torch.tensor([0.437])
    found = theirs(
        patches,
        encoder_hidden_states=text,
        encoder_hidden_states_mask=torch.ones(1, 7, dtype=torch.bool),
        timestep=time,
        img_shapes=[[(1, height, width)]],
    ).sample
    expected = found.view(1, height, width, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(latent.shape)
    return expected, ours(latent, time, text)


def call_sdxl(theirs: Any, ours: Any, dice: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    latent, text, pooled = noise(dice, 1, 4, 8, 12), noise(dice, 1, 7, 2048), noise(dice, 1, 1280)
    time, sizes = torch.tensor([437]), torch.tensor([[1024.0, 768, 0, 16, 1024, 768]])
    added = {"text_embeds": pooled, "time_ids": sizes}
    expected = theirs(latent, time, encoder_hidden_states=text, added_cond_kwargs=added).sample
    vector = torch.cat([pooled, theirs.add_time_proj(sizes.flatten()).view(1, -1)], dim=1)
    return expected, ours(latent, time, text, y=vector)


def call_sd15(theirs: Any, ours: Any, dice: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    latent, text, time = noise(dice, 1, 4, 8, 12), noise(dice, 1, 7, 768), torch.tensor([437])
    return theirs(latent, time, encoder_hidden_states=text).sample, ours(latent, time, text)


CALLS: dict[str, Call] = {
    "sd3": call_sd3,
    "flux": call_flux,
    "wan": call_wan,
    "wan-i2v": call_wan_i2v,
    "qwen_image": call_qwen_image,
    "sdxl": call_sdxl,
    "sd15": call_sd15,
}


@pytest.mark.parametrize("family", CALLS)
def test_the_same_result_as_diffusers(family: str, model: Any) -> None:
    """Parts in the wrong order or halves not swapped would give another picture, not an error."""
    theirs = tiny_diffusers_model(family)
    ours = build(family, converted(theirs)).float()
    expected, found = CALLS[family](theirs, ours, torch.Generator().manual_seed(3))
    assert found.shape == expected.shape
    assert model.relative_error(found, expected) < 1e-4
