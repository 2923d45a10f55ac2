"""The diffusion-model families that a tiny model exists for, as data.

Every `config` is the smallest one that ComfyUI's own detection derives back from the tensors it produces;
a row count or width that detection fixes (SD1.5's 320 channels, Wan's text width 4096, HunyuanVideo's
pooled width 768) is left at its real value, everything else is as small as 256-wide blocks allow: K- and
IQ-quants pack 256 weights of one row, so narrower layers would never be quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """How to build one family's denoiser.

    `model_class` is "module:class" inside ComfyUI, `config` its keyword arguments, `dtype` the floating
    point type the family's files usually have. `renames` turns the names of ComfyUI's modules into those of
    published files, as (old part, new part) applied in order. `needs_test_node` says that ComfyUI 0.3.75
    fixes the head count and must be patched by `snug_test_nodes` to accept so narrow a model.
    `params_class` names the dataclass in the same module that the class takes its arguments through;
    arguments that this version of ComfyUI does not have yet are left out. `unused` are parameters that
    some version declares and none computes with.
    """

    model_class: str
    config: Mapping[str, Any]
    dtype: str = "bfloat16"
    renames: tuple[tuple[str, str], ...] = ()
    needs_test_node: bool = False
    params_class: str | None = None
    unused: frozenset[str] = frozenset()


def _unet(**config: Any) -> dict[str, Any]:
    """Arguments common to the UNet families; one `transformer_depth` entry per residual block."""
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "use_spatial_transformer": True,
        "legacy": False,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        **config,
    }


# What process_unet_state_dict of ComfyUI's HunyuanVideo config undoes: the names in Tencent's own files.
_HUNYUAN_RENAMES = (
    ("_attn.norm.query_norm.", "_attn_q_norm."),
    ("_attn.norm.key_norm.", "_attn_k_norm."),
    (".norm.query_norm.", ".q_norm."),
    (".norm.key_norm.", ".k_norm."),
    (".scale", ".weight"),
    ("txt_in.t_embedder.in_layer.", "txt_in.t_embedder.mlp.0."),
    ("txt_in.t_embedder.out_layer.", "txt_in.t_embedder.mlp.2."),
    ("txt_in.c_embedder.in_layer.", "txt_in.c_embedder.linear_1."),
    ("txt_in.c_embedder.out_layer.", "txt_in.c_embedder.linear_2."),
    ("_mod.lin.", "_mod.linear."),
    (".modulation.lin.", ".modulation.linear."),
    ("_attn.qkv.", "_attn_qkv."),
    ("_attn.proj.", "_attn_proj."),
    ("time_in.in_layer.", "time_in.mlp.0."),
    ("time_in.out_layer.", "time_in.mlp.2."),
    ("guidance_in.in_layer.", "guidance_in.mlp.0."),
    ("guidance_in.out_layer.", "guidance_in.mlp.2."),
    ("img_mlp.0.", "img_mlp.fc1."),
    ("img_mlp.2.", "img_mlp.fc2."),
    ("txt_mlp.0.", "txt_mlp.fc1."),
    ("txt_mlp.2.", "txt_mlp.fc2."),
)

# Black Forest Labs' files call the norm parameter "scale"; newer ComfyUI modules call it "weight".
_FLUX_RENAMES = (("_norm.weight", "_norm.scale"),)

FAMILIES: dict[str, Family] = {
    "sd15": Family(
        "comfy.ldm.modules.diffusionmodules.openaimodel:UNetModel",
        _unet(
            num_res_blocks=[1],
            channel_mult=[1],
            transformer_depth=[1],
            transformer_depth_output=[1, 0],
            transformer_depth_middle=-2,
            context_dim=768,
            num_heads=8,
        ),
        dtype="float16",
    ),
    "sdxl": Family(  # KOALA-700M's transformer depths, which detection matches exactly, at one width
        "comfy.ldm.modules.diffusionmodules.openaimodel:UNetModel",
        _unet(
            num_res_blocks=[1, 1, 1],
            channel_mult=[1, 1, 1],
            transformer_depth=[0, 2, 5],
            transformer_depth_output=[0, 0, 0, 0, 1, 0],
            transformer_depth_middle=-2,
            context_dim=2048,
            num_head_channels=64,
            use_linear_in_transformer=True,
            num_classes="sequential",
            adm_in_channels=2816,
        ),
        dtype="float16",
    ),
    "sd3": Family(  # hidden size is 64 * depth
        "comfy.ldm.modules.diffusionmodules.mmdit:OpenAISignatureMMDITWrapper",
        {
            "input_size": None,
            "in_channels": 16,
            "depth": 4,
            "adm_in_channels": 2048,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 256},
            },
            "num_patches": 1024,
            "pos_embed_max_size": 32,
            "pos_embed_scaling_factor": None,
        },
        dtype="float16",
    ),
    "flux": Family(
        "comfy.ldm.flux.model:Flux",
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "vec_in_dim": 768,
            "context_in_dim": 512,
            "hidden_size": 256,
            "num_heads": 2,
            "mlp_ratio": 4.0,
            "depth": 1,
            "depth_single_blocks": 2,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": True,
            "txt_ids_dims": [],
        },
        renames=_FLUX_RENAMES,
        needs_test_node=True,
        params_class="FluxParams",
    ),
    "qwen_image": Family(
        "comfy.ldm.qwen_image.model:QwenImageTransformer2DModel",
        {"in_channels": 64, "num_layers": 2, "num_attention_heads": 2},
        needs_test_node=True,
    ),
    "lumina2": Family(  # Z-Image's layout
        "comfy.ldm.lumina.model:NextDiT",
        {
            "patch_size": 2,
            "in_channels": 16,
            "dim": 256,
            "cap_feat_dim": 512,
            "n_layers": 2,
            "qk_norm": True,
            "n_heads": 2,
            "n_kv_heads": 2,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8.0 / 3.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        needs_test_node=True,
        unused=frozenset({"norm_final.weight"}),
    ),
    "wan": Family(
        "comfy.ldm.wan.model:WanModel",
        {
            "model_type": "t2v",
            "dim": 256,
            "ffn_dim": 512,
            "num_heads": 2,
            "num_layers": 2,
            "in_dim": 16,
            "out_dim": 16,
        },
    ),
    "ltxv": Family(  # 32 heads of width 8 need no sizes in the file's metadata
        "comfy.ldm.lightricks.model:LTXVModel",
        {
            "in_channels": 128,
            "cross_attention_dim": 256,
            "attention_head_dim": 8,
            "num_attention_heads": 32,
            "num_layers": 2,
        },
    ),
    "hunyuan_video": Family(
        "comfy.ldm.hunyuan_video.model:HunyuanVideo",
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": [1, 2, 2],
            "vec_in_dim": 768,
            "context_in_dim": 512,
            "hidden_size": 256,
            "num_heads": 2,
            "mlp_ratio": 4.0,
            "depth": 1,
            "depth_single_blocks": 1,
            "axes_dim": [16, 56, 56],
            "theta": 256,
            "qkv_bias": True,
            "guidance_embed": True,
            "byt5": False,
            "meanflow": False,
            "use_cond_type_embedding": False,
            "vision_in_dim": None,
            "meanflow_sum": False,
        },
        renames=_HUNYUAN_RENAMES,
        params_class="HunyuanVideoParams",
    ),
}
