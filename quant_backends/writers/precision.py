"""Which tensors of a diffusion model are too delicate to quantize, per architecture, as data.

The lists follow the files that people have: ComfyUI-GGUF's tools/convert.py and its patch of llama.cpp's
quantizer, which keep embedders, modulation and output layers at 16 or 32 bits. A tensor belongs to an entry
when the entry occurs anywhere in its name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrecisionRules:
    """What one architecture asks of a writer.

    half: name parts of matrices stored as F16 or BF16; full: name parts of parameters stored as F32, for
    loaders that cannot cast them; dropped: name parts of tensors that are no weights; fold_rows: matrices and
    kernels whose rows are no multiple of 256 are stored as (n / 256, 256), else K-quants could not hold them.
    """

    half: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    fold_rows: bool = False

    def is_half(self, name: str) -> bool:
        return any(part in name for part in self.half)

    def is_full(self, name: str) -> bool:
        return any(part in name for part in self.full)

    def is_dropped(self, name: str) -> bool:
        return any(part in name for part in self.dropped)


_UNET = PrecisionRules(
    half=(
        "class_embedding",
        "time_embedding",
        "add_embedding",
        "time_embed",
        "label_emb",
        "conv_in",
        "conv_out",
        "input_blocks.0.0",
        "out.2",
    ),
    fold_rows=True,
)
_FLUX = PrecisionRules(half=("txt_in", "img_in", "time_in", "vector_in", "guidance_in", "final_layer"))

RULES: dict[str, PrecisionRules] = {
    "flux": _FLUX,
    "hyvid": _FLUX,
    "sd1": _UNET,
    "sdxl": _UNET,
    "sd3": PrecisionRules(
        half=(
            "final_layer",
            "time_text_embed",
            "context_embedder",
            "t_embedder",
            "y_embedder",
            "x_embedder",
            "proj_out",
            "pos_embed",
        )
    ),
    "aura": PrecisionRules(
        half=(
            "t_embedder",
            "init_x_linear",
            "modF.1",
            "cond_seq_linear",
            "final_linear",
            "positional_encoding",
            "register_tokens",
        )
    ),
    "ltxv": PrecisionRules(
        half=("adaln_single", "caption_projection", "patchify_proj", "proj_out"),
        full=("scale_shift_table",),
    ),
    "wan": PrecisionRules(
        half=("patch_embedding", "text_embedding", "time_projection", "time_embedding", "img_emb", "head."),
        full=(".modulation",),
    ),
    "hidream": PrecisionRules(
        half=("p_embedder", "t_embedder", "x_embedder", "final_layer", "caption_projection"),
        full=(".ff_i.gate.weight", "img_emb.emb_pos"),
    ),
    "cosmos": PrecisionRules(
        half=("p_embedder", "t_embedder", "x_embedder", "t_embedding_norm", "final_layer"),
        full=("pos_embedder",),
        dropped=("_extra_state", "accum_"),
    ),
    "lumina2": PrecisionRules(
        half=("t_embedder", "x_embedder", "final_layer", "cap_embedder", "context_refiner", "noise_refiner")
    ),
    # No list is published for Qwen-Image: these are the same roles as Flux's.
    "qwen_image": PrecisionRules(half=("img_in", "txt_in", "time_text_embed", "norm_out", "proj_out.")),
}

# Of text encoders, by llama.cpp's names: the position bias of T5, which models read themselves.
_T5 = PrecisionRules(full=("attn_rel_b",))
TEXT_ENCODER_RULES: dict[str, PrecisionRules] = {"t5": _T5, "t5encoder": _T5}
