"""Quantize a diffusers pipeline: the transformer to int8, the text encoder to float8, the last projection left alone.

    python examples/quantize_diffusers.py

makes a tiny PixArt-Sigma (random weights, nothing is downloaded), quantizes it, compares images, saves and loads the
transformer. For a real one put `PixArtSigmaPipeline.from_pretrained(...)` in the place of `tiny_pipeline()`.
Needs diffusers and transformers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from snug_path import register_snug

register_snug()
from snug.quant_backends.quantization import (  # noqa: E402
    load_packed,
    packed_state_dict,
    quantize_module,
)
from snug.quant_backends.readers.conventions import open_quantized_safetensors  # noqa: E402
from snug.quant_backends.writers import write_safetensors  # noqa: E402

TEXT_WIDTH = 64


def tiny_transformer() -> Any:
    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=64,
        sample_size=8,
        patch_size=2,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    ).eval()


def tiny_pipeline() -> Any:
    torch.manual_seed(0)
    text = T5Config(vocab_size=256, d_model=TEXT_WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    return PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=T5EncoderModel(text).eval(),
        vae=vae.eval(),
        transformer=tiny_transformer(),
        scheduler=DPMSolverMultistepScheduler(),
    )


@torch.no_grad()
def image(pipe: Any, steps: int = 2) -> torch.Tensor:
    """float [3, height, width] for a prompt of fixed tokens."""
    tokens = torch.arange(12).view(1, 12) * 17 % 256
    mask = torch.ones(1, 12)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=pipe.text_encoder(tokens, attention_mask=mask)[0],
        prompt_attention_mask=mask,
        negative_prompt_embeds=pipe.text_encoder(tokens.flip(1), attention_mask=mask)[0],
        negative_prompt_attention_mask=mask,
        num_inference_steps=steps,
        height=16,
        width=16,
        use_resolution_binning=False,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images[0]


def main() -> float:
    pipe = tiny_pipeline()
    dense = image(pipe)

    print("transformer:", quantize_module(pipe.transformer, "INT8 per row", skip="default, proj_out"))
    print("text encoder:", quantize_module(pipe.text_encoder, "FP8 e4m3fn per row"))

    quantized = image(pipe)
    error = ((quantized - dense).norm() / dense.norm()).item()
    print(f"image: {error:.2%} away from the one of the full weights")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "transformer.safetensors"
        print("saved as", write_safetensors(path, packed_state_dict(pipe.transformer)))
        pipe.transformer = tiny_transformer()
        load_packed(pipe.transformer, open_quantized_safetensors(path).state_dict)
        assert torch.equal(image(pipe), quantized), "what was loaded is not what was saved"
        print("loaded again: the same image")
    return error


if __name__ == "__main__":
    main()
