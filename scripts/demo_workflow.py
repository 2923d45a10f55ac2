"""The demo's workflow in ComfyUI's API format: one model, one prompt, KSampler, one PNG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from digits.drawing import GUIDANCE, SAMPLER, SCHEDULER

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
    text_encoder: str
    text_encoder_type: str
    is_digits: bool  # by the model that draws them; the prompt is the digits, a picture for each


def workflow(
    picture: Picture, model_file: str, format: str | None, steps: int | None = None, decode: bool = True
) -> dict[str, Any]:
    """A workflow that draws ``picture`` with a file from ``models/diffusion_models``.

    ``format`` is the file's; None picks ComfyUI's own loaders. The text encoder of the digits is quantized to the same
    format as it is loaded. ``steps`` overrides the picture's. Without ``decode`` it ends with the latent.
    """
    loader = (
        _node("UNETLoader", unet_name=model_file, weight_dtype="default")
        if format is None
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
        cfg=GUIDANCE if picture.is_digits else 4.0,
        sampler_name=SAMPLER,
        scheduler=SCHEDULER if picture.is_digits else "normal",
        denoise=1.0,
    )
    size = {"width": picture.size, "height": picture.size}
    latent = (
        _node("EmptyHunyuanLatentVideo", **size, length=1, batch_size=len(picture.prompt))
        if picture.is_digits
        else _node("EmptyLatentImage", **size, batch_size=1)
    )
    sampled = {
        "model": loader,
        **_conditioning(picture, format),
        "latent": latent,
        "sampler": sampler,
        INFO_NODE: _node("SnugTestModelInfo", model=["model", 0], samples=["sampler", 0]),
    }
    if not decode:
        return sampled
    return {
        **sampled,
        "vae": _node("VAELoader", vae_name=picture.vae),
        "decode": _node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        SAVE_NODE: _node("SaveImage", images=["decode", 0], filename_prefix="demo"),
    }


def _conditioning(picture: Picture, format: str | None) -> dict[str, Any]:
    encoder, kind = picture.text_encoder, picture.text_encoder_type
    clip, positive = _node("CLIPLoader", clip_name=encoder, type=kind), "CLIPTextEncode"
    texts: dict[str, Any] = {"text": picture.prompt}
    if picture.is_digits:
        positive, texts = "SnugTestDigits", {"digits": picture.prompt}
        if format is not None:
            quantize = "as in the file" if format == "F16" else f"GGUF {format}"
            clip = _node("SnugLoadTextEncoders", text_encoder_1=encoder, type=kind, quantize=quantize)
    return {
        "clip": clip,
        "positive": _node(positive, clip=["clip", 0], **texts),
        "negative": _node("CLIPTextEncode", clip=["clip", 0], text=""),
    }


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
