"""The demo's workflow in ComfyUI's API format: one model, one prompt, KSampler, one PNG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SAVE_NODE = "save"
INFO_NODE = "info"


@dataclass(frozen=True)
class Picture:
    """What is drawn: the same for every model that is compared."""

    size: int
    steps: int
    seed: int
    vae: str
    prompt: str
    text_encoder: str | None  # None: random conditioning from the test nodes
    text_encoder_type: str


def workflow(picture: Picture, model_file: str, dense: bool, steps: int | None = None) -> dict[str, Any]:
    """A workflow that draws ``picture`` with a file from ``models/diffusion_models``.

    ``dense`` picks ComfyUI's own loader, otherwise Snug's; ``steps`` overrides the picture's.
    """
    loader = (
        _node("UNETLoader", unet_name=model_file, weight_dtype="default")
        if dense
        else _node("SnugLoadDiffusionModel", model_name=model_file, compute_dtype="auto")
    )
    sampler = _node(
        "KSampler",
        model=["model", 0],
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["latent", 0],
        seed=picture.seed,
        steps=steps or picture.steps,
        cfg=4.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    return {
        "model": loader,
        **_conditioning(picture),
        "latent": _node("EmptyLatentImage", width=picture.size, height=picture.size, batch_size=1),
        "sampler": sampler,
        "vae": _node("VAELoader", vae_name=picture.vae),
        "decode": _node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        SAVE_NODE: _node("SaveImage", images=["decode", 0], filename_prefix="demo"),
        INFO_NODE: _node("SnugTestModelInfo", model=["model", 0], samples=["sampler", 0]),
    }


def _conditioning(picture: Picture) -> dict[str, Any]:
    if picture.text_encoder is None:
        return {
            name: _node("SnugTestConditioning", seed=seed, tokens=77, dim=768, pooled_dim=0)
            for name, seed in (("positive", 1), ("negative", 2))
        }
    return {
        "clip": _node("CLIPLoader", clip_name=picture.text_encoder, type=picture.text_encoder_type),
        "positive": _node("CLIPTextEncode", clip=["clip", 0], text=picture.prompt),
        "negative": _node("CLIPTextEncode", clip=["clip", 0], text=""),
    }


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
