"""Names a diffusion model's architecture after its tensors, as `general.architecture` of a GGUF file wants it."""

from __future__ import annotations

from collections.abc import Collection

# An architecture is the first whose tensors are all there. More particular ones come first: the block names
# of SDXL are SD1's, those of HunyuanVideo begin like Flux's.
_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("hyvid", ("txt_in.individual_token_refiner.blocks.0.norm1.weight",)),
    ("flux", ("double_blocks.0.img_attn.proj.weight",)),
    ("sd3", ("joint_blocks.0.x_block.attn.qkv.weight", "context_embedder.weight")),
    ("aura", ("double_layers.0.attn.w1q.weight", "cond_seq_linear.weight")),
    (
        "hidream",
        ("caption_projection.0.linear.weight", "double_stream_blocks.0.block.adaLN_modulation.1.weight"),
    ),
    ("cosmos", ("blocks.0.mlp.layer1.weight", "blocks.0.adaln_modulation_cross_attn.1.weight")),
    ("wan", ("head.modulation", "blocks.0.self_attn.norm_q.weight")),
    ("ltxv", ("adaln_single.linear.weight", "patchify_proj.weight", "scale_shift_table")),
    ("lumina2", ("cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight")),
    ("qwen_image", ("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight")),
    ("sdxl", ("input_blocks.0.0.weight", "label_emb.0.0.weight")),
    ("sd1", ("input_blocks.0.0.weight", "time_embed.0.weight")),
)


def detect_architecture(names: Collection[str]) -> str | None:
    """The GGUF architecture of a model with these tensor names (original names, no prefix); None if unknown."""
    for architecture, marks in _MARKS:
        if all(mark in names for mark in marks):
            return architecture
    return None
