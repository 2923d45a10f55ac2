"""What is known about tensor names in diffusion-model files, as data."""

from __future__ import annotations

import re

# Prefixes of the diffusion model inside a checkpoint, tried in this order. The last three are left by tools that save
# a whole pipeline or a wrapped model.
DIFFUSION_PREFIXES = ("model.diffusion_model.", "model.", "net.", "diffusion_model.", "transformer.", "unet.")

# What checkpoints hold beside the diffusion model: autoencoder, text encoders, the sampler's constants.
COMPANIONS = re.compile(
    r"(first_stage_model|vae|cond_stage_model|conditioner|text_encoders?|te|text_model|model_ema|denoiser)\."
    r"|(alphas|betas|log_one|sqrt_|posterior_)[a-z_]*$"
)

# The names llama.cpp's converters give to language models, and the original ones of T5, CLIP, BERT and language models.
TEXT_ENCODER = re.compile(
    r"(enc\.|dec\.)?blk\.\d+\.attn_|token_embd\.weight$"
    r"|(encoder|decoder)\.block\.\d+\.layer\.\d+\.\w*Attention\."
    r"|text_model\.encoder\.layers\.|transformer\.resblocks\."
    r"|(language_)?model\.(language_model\.)?layers\.\d+\.self_attn\.[qkvo]_proj\."
    r"|model\.encoder\.layers\.\d+\.(mixer|self_attn)\.|layers\.\d+\.self_attn\.sinks$|bert\.encoder\.layer\."
)
# LTX-2's projection from a Gemma to the diffusion model; in its checkpoint or in files of its own.
PROJECTIONS = ("text_embedding_projection.",)
# What ComfyUI takes beside it.
CONNECTORS = tuple(f"model.diffusion_model.{part}_embeddings_connector." for part in ("audio", "video"))
CONTROLNET = re.compile(
    r"control_model\.|controlnet_(cond_embedding|blocks|down_blocks|single_blocks|x_embedder)\."
    r"|(input_hint_block|zero_convs)\."
)
VISION_TOWER = re.compile(r"v\.(blk\.\d+|patch_embd|post_ln)\.|mm\.\d+\.")
LORA = re.compile(r".*\.lora_(a|b|up\.weight|down\.weight|A\.weight|B\.weight)$")
# An autoencoder's own names: a file is one when it has nothing else and has the first layer of a decoder.
VAE = re.compile(r"(first_stage_model\.|vae\.)?(encoder|decoder|quant_conv|post_quant_conv|conv1|conv2|bn)\.")
VAE_DECODER = re.compile(r"(first_stage_model\.|vae\.)?decoder\.(conv_in|conv1)\.")

# Parameters whose leading dimensions of size 1 are lost by tools that rewrite tensors with ggml (it does not
# count trailing dimensions of size 1, and its order is reversed): name, fewest dimensions left, dimensions
# expected.
LEADING_ONES = (
    (re.compile(r"pos_embed$"), 2, 3),  # Stable Diffusion 3: (1, positions, channels)
    (re.compile(r"(positional_encoding|register_tokens)$"), 2, 3),  # AuraFlow: (1, tokens, channels)
    (re.compile(r"(\w*blocks\.\d+|head)\.modulation$"), 2, 3),  # Wan: (1, 6 or 2, channels)
    (re.compile(r"img_emb\.emb_pos$"), 2, 3),  # Wan first and last frame: (1, tokens, channels)
    (re.compile(r"(x|cap|siglip)_pad_token$"), 1, 2),  # Lumina 2, Z-Image: (1, channels)
    (re.compile(r"keyframes_abs_pos_embedding$"), 1, 2),  # LTX-Video: (1, channels)
    (re.compile(r".*\.padding_tokens$"), 1, 4),  # Wan Animate and S2V: (1, 1, 1, channels)
    (re.compile(r"casual_audio_encoder\.weights$"), 3, 4),  # Wan S2V: (1, layers, 1, 1)
    (re.compile(r"motion_encoder\..*\.bias$"), 3, 4),  # Wan Animate's StyleGAN layers: (1, channels, 1, 1)
    (re.compile(r"txtfusion\.projector\.weight$"), 1, 2),  # Krea 2: one output, (1, text layers)
)

# The 3-D convolutions of supported models: Wan with its variants, HunyuanVideo, HiDream-O1.
CONV3D = re.compile(
    r"(([a-z]+_)?patch_embedding(_[a-z]+)?|img_in\.proj|cond_encoder|frame_packer\.proj(_[24]x)?"
    r"|visual\.patch_embed\.proj)\.weight$"
)

# 1x1 layers around the attention blocks of the U-Net models.
UNET_PROJECTION = re.compile(r"(input_blocks|middle_block|output_blocks)\..*\.proj_(in|out)\.weight$")
UNET_CONTEXT = re.compile(r"(input_blocks|middle_block|output_blocks)\..*\.attn2\.to_k\.weight$")
# Width of the text embedding of Stable Diffusion 1; its successors are wider.
SD1_CONTEXT_WIDTH = 768

# Black Forest Labs' query and key norms, whose parameter ComfyUI has called both `scale` and `weight`.
QK_NORM = re.compile(r"(.*\.norm\.(?:query|key)_norm)\.(?:scale|weight)$")

# Weights that ComfyUI's models multiply with themselves instead of through its operations.
DIRECT_WEIGHTS = re.compile(
    r"motion_encoder\."  # Wan Animate: StyleGAN layers
    r"|.*\.(ff_i|moe)\.gate\.weight$"  # HiDream, Hunyuan3D 2.1: the routers of their experts
    r"|.*norm\d*\.weight$"  # AuraFlow: one row of norm weights per head
)
