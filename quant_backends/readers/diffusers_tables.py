"""What diffusers calls the tensors of diffusion models, and what their reference code calls them, as data.

Sources: diffusers' own converters (loaders/single_file_utils.py, scripts/convert_wan_to_diffusers.py) read backwards,
and the tables that ComfyUI has for LoRA files (comfy/utils.py: flux_to_diffusers, mmdit_to_diffusers,
pixart_to_diffusers). `*` stands for the number of a block. Names are those of layers, whose `weight` and `bias` both
follow, or of single parameters. Qwen-Image is not here: its reference code is diffusers' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Names:
    """How one family is recognised and renamed.

    signature: tensors that together only this family has, under diffusers' names. absent: beginnings of names that
    belong to other models built from the same blocks. renamed: diffusers' name to the reference's. joined: reference
    name to the names of the parts, the first rows first; a part may be missing only with all others. swapped:
    reference names of layers whose output halves are in the other order. swapped_at_end: the same, in the last block
    alone.
    """

    signature: tuple[str, ...]
    renamed: Mapping[str, str]
    joined: Mapping[str, tuple[str, ...]]
    absent: tuple[str, ...] = ("controlnet_",)
    swapped: frozenset[str] = field(default_factory=frozenset)
    swapped_at_end: frozenset[str] = field(default_factory=frozenset)


def _block(old: str, new: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{old}.*.{name}": f"{new}.*.{target}" for name, target in names.items()}


def _parts(block: str, attention: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{block}.*.{attention}.{name}" for name in names)


_DOUBLE, _SINGLE = "transformer_blocks", "single_transformer_blocks"
_QKV, _ADDED_QKV = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_EMBEDDER = {"linear_1": "in_layer", "linear_2": "out_layer"}
_MLP = {"linear_1": "mlp.0", "linear_2": "mlp.2"}

FLUX = Names(
    signature=(
        "x_embedder.weight",
        "context_embedder.weight",
        "time_text_embed.timestep_embedder.linear_1.weight",
        "transformer_blocks.0.attn.norm_added_q.weight",
    ),
    renamed={
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        **{f"time_text_embed.timestep_embedder.{a}": f"time_in.{b}" for a, b in _EMBEDDER.items()},
        **{f"time_text_embed.text_embedder.{a}": f"vector_in.{b}" for a, b in _EMBEDDER.items()},
        **{f"time_text_embed.guidance_embedder.{a}": f"guidance_in.{b}" for a, b in _EMBEDDER.items()},
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
        **_block(
            _DOUBLE,
            "double_blocks",
            {
                "norm1.linear": "img_mod.lin",
                "norm1_context.linear": "txt_mod.lin",
                "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
                "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
                "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
                "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
                "attn.to_out.0": "img_attn.proj",
                "attn.to_add_out": "txt_attn.proj",
                "ff.net.0.proj": "img_mlp.0",
                "ff.net.2": "img_mlp.2",
                "ff_context.net.0.proj": "txt_mlp.0",
                "ff_context.net.2": "txt_mlp.2",
            },
        ),
        **_block(
            _SINGLE,
            "single_blocks",
            {
                "norm.linear": "modulation.lin",
                "attn.norm_q.weight": "norm.query_norm.scale",
                "attn.norm_k.weight": "norm.key_norm.scale",
                "proj_out": "linear2",
            },
        ),
    },
    joined={
        "double_blocks.*.img_attn.qkv": _parts(_DOUBLE, "attn", *_QKV),
        "double_blocks.*.txt_attn.qkv": _parts(_DOUBLE, "attn", *_ADDED_QKV),
        "single_blocks.*.linear1": (*_parts(_SINGLE, "attn", *_QKV), f"{_SINGLE}.*.proj_mlp"),
    },
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
)

SD3 = Names(
    signature=(
        "pos_embed.proj.weight",
        "context_embedder.weight",
        "time_text_embed.text_embedder.linear_1.weight",
        "transformer_blocks.0.attn.add_q_proj.weight",
    ),
    renamed={
        "context_embedder": "context_embedder",
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        **{f"time_text_embed.timestep_embedder.{a}": f"t_embedder.{b}" for a, b in _MLP.items()},
        **{f"time_text_embed.text_embedder.{a}": f"y_embedder.{b}" for a, b in _MLP.items()},
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
        **_block(
            _DOUBLE,
            "joint_blocks",
            {
                "norm1.linear": "x_block.adaLN_modulation.1",
                "norm1_context.linear": "context_block.adaLN_modulation.1",
                "attn.norm_q": "x_block.attn.ln_q",
                "attn.norm_k": "x_block.attn.ln_k",
                "attn.norm_added_q": "context_block.attn.ln_q",
                "attn.norm_added_k": "context_block.attn.ln_k",
                "attn.to_out.0": "x_block.attn.proj",
                "attn.to_add_out": "context_block.attn.proj",
                "attn2.norm_q": "x_block.attn2.ln_q",
                "attn2.norm_k": "x_block.attn2.ln_k",
                "attn2.to_out.0": "x_block.attn2.proj",
                "ff.net.0.proj": "x_block.mlp.fc1",
                "ff.net.2": "x_block.mlp.fc2",
                "ff_context.net.0.proj": "context_block.mlp.fc1",
                "ff_context.net.2": "context_block.mlp.fc2",
            },
        ),
    },
    joined={
        "joint_blocks.*.x_block.attn.qkv": _parts(_DOUBLE, "attn", *_QKV),
        "joint_blocks.*.x_block.attn2.qkv": _parts(_DOUBLE, "attn2", *_QKV),
        "joint_blocks.*.context_block.attn.qkv": _parts(_DOUBLE, "attn", *_ADDED_QKV),
    },
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    # The context of the last block ends in a norm like the final one.
    swapped_at_end=frozenset({"joint_blocks.*.context_block.adaLN_modulation.1"}),
)

PIXART = Names(
    signature=(
        "adaln_single.linear.weight",
        "pos_embed.proj.weight",
        "caption_projection.linear_1.weight",
        "transformer_blocks.0.attn1.to_q.weight",
    ),
    renamed={
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "caption_projection.y_embedding": "y_embedder.y_embedding",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        **{f"adaln_single.emb.timestep_embedder.{a}": f"t_embedder.{b}" for a, b in _MLP.items()},
        **{f"adaln_single.emb.resolution_embedder.{a}": f"csize_embedder.{b}" for a, b in _MLP.items()},
        **{f"adaln_single.emb.aspect_ratio_embedder.{a}": f"ar_embedder.{b}" for a, b in _MLP.items()},
        "adaln_single.linear": "t_block.1",
        "scale_shift_table": "final_layer.scale_shift_table",
        "proj_out": "final_layer.linear",
        **_block(
            _DOUBLE,
            "blocks",
            {
                "scale_shift_table": "scale_shift_table",
                "attn1.to_out.0": "attn.proj",
                "attn2.to_q": "cross_attn.q_linear",
                "attn2.to_out.0": "cross_attn.proj",
                "ff.net.0.proj": "mlp.fc1",
                "ff.net.2": "mlp.fc2",
            },
        ),
    },
    joined={
        "blocks.*.attn.qkv": _parts(_DOUBLE, "attn1", *_QKV),
        "blocks.*.cross_attn.kv_linear": _parts(_DOUBLE, "attn2", "to_k", "to_v"),
    },
)

_WAN_IMAGE = "condition_embedder.image_embedder"
WAN = Names(
    signature=(
        "patch_embedding.weight",
        "condition_embedder.time_proj.weight",
        "scale_shift_table",
        "blocks.0.attn1.to_q.weight",
    ),
    # Wan Animate has encoders whose layers are stored in other shapes as well.
    absent=("controlnet_", "motion_encoder.", "face_adapter."),
    renamed={
        "patch_embedding": "patch_embedding",
        "vace_patch_embedding": "vace_patch_embedding",
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        f"{_WAN_IMAGE}.pos_embed": "img_emb.emb_pos",
        f"{_WAN_IMAGE}.norm1": "img_emb.proj.0",
        f"{_WAN_IMAGE}.ff.net.0.proj": "img_emb.proj.1",
        f"{_WAN_IMAGE}.ff.net.2": "img_emb.proj.3",
        f"{_WAN_IMAGE}.norm2": "img_emb.proj.4",
        "scale_shift_table": "head.modulation",
        "proj_out": "head.head",
        **{
            name: target
            for blocks in ("blocks", "vace_blocks")
            for name, target in _block(
                blocks,
                blocks,
                {
                    "scale_shift_table": "modulation",
                    "norm2": "norm3",
                    **{
                        f"{old}.{part}": f"{new}.{target}"
                        for old, new in (("attn1", "self_attn"), ("attn2", "cross_attn"))
                        for part, target in {
                            "to_q": "q",
                            "to_k": "k",
                            "to_v": "v",
                            "to_out.0": "o",
                            "norm_q": "norm_q",
                            "norm_k": "norm_k",
                            "add_k_proj": "k_img",
                            "add_v_proj": "v_img",
                            "norm_added_k": "norm_k_img",
                        }.items()
                    },
                    "ffn.net.0.proj": "ffn.0",
                    "ffn.net.2": "ffn.2",
                    "proj_in": "before_proj",
                    "proj_out": "after_proj",
                },
            ).items()
        },
    },
    joined={},
)

TRANSFORMERS = {"flux": FLUX, "sd3": SD3, "pixart": PIXART, "wan": WAN}

# The U-Nets of Stable Diffusion 1, 2 and XL: the place of a block follows from how many there are before it.
UNET_SIGNATURE = (
    "conv_in.weight",
    "time_embedding.linear_1.weight",
    "down_blocks.0.resnets.0.conv1.weight",
    "up_blocks.0.resnets.0.conv1.weight",
)
UNET_LAYERS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
