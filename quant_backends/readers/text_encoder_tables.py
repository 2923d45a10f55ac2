"""What is known about tensor names in text-encoder and vision-tower files, as data.

Left: llama.cpp's names (gguf-py, gguf/constants.py, TENSOR_NAMES). Right: the names of the original models,
which ComfyUI's classes keep.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .diffusion_tables import CONNECTORS


@dataclass(frozen=True, slots=True)
class NameMap:
    """How one layout of a model names its tensors.

    block: matches "….<number>.<part>", groups (number, part). block_prefix: what the number is put into.
    parts: names inside a block, tops: names outside; both without ".weight" and ".bias".
    dropped: prefixes of tensors that no text encoder uses. bare: ends of original names that have no ".weight".
    """

    block: re.Pattern[str]
    block_prefix: str
    parts: dict[str, str]
    tops: dict[str, str]
    dropped: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """What the converter of an architecture does beside renaming.

    permuted: rows of the query and key projections are reordered per head for ggml's rotary embedding.
    norm_shift: what was added to every norm weight (Gemma's norms multiply with 1 + weight).
    """

    names: NameMap
    permuted: bool = False
    norm_shift: float = 0.0


_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")

T5_NAMES = NameMap(
    block=re.compile(r"enc\.blk\.(\d+)\.(.+)"),
    block_prefix="encoder.block.{}.",
    parts={
        "attn_q": "layer.0.SelfAttention.q",
        "attn_k": "layer.0.SelfAttention.k",
        "attn_v": "layer.0.SelfAttention.v",
        "attn_o": "layer.0.SelfAttention.o",
        "attn_norm": "layer.0.layer_norm",
        "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
        "ffn_up": "layer.1.DenseReluDense.wi_1",
        "ffn_gate": "layer.1.DenseReluDense.wi_0",
        "ffn_down": "layer.1.DenseReluDense.wo",
        "ffn_norm": "layer.1.layer_norm",
    },
    tops={"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"},
    dropped=("dec.", "output."),
)
# The first T5 (and its base size in Stable Audio) has one up projection and no gate.
T5_UNGATED = {"ffn_up": "layer.1.DenseReluDense.wi"}

LLAMA_NAMES = NameMap(
    block=_BLOCK,
    block_prefix="model.layers.{}.",
    parts={
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_gate": "mlp.gate_proj",
    },
    tops={"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
    dropped=("rope_freqs.", "rope_factors_"),  # ComfyUI's classes calculate their own frequencies
)

GEMMA_NAMES = NameMap(
    block=_BLOCK,
    block_prefix=LLAMA_NAMES.block_prefix,
    parts={
        **LLAMA_NAMES.parts,
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    tops=LLAMA_NAMES.tops,
    dropped=LLAMA_NAMES.dropped,
)

GEMMA4_NAMES = NameMap(
    block=_BLOCK,
    block_prefix=LLAMA_NAMES.block_prefix,
    parts={
        **GEMMA_NAMES.parts,
        "inp_gate": "per_layer_input_gate",
        "proj": "per_layer_projection",
        "post_norm": "post_per_layer_input_norm",
        "layer_output_scale": "layer_scalar",
    },
    tops={
        **LLAMA_NAMES.tops,
        "per_layer_token_embd": "model.embed_tokens_per_layer",
        "per_layer_model_proj": "model.per_layer_model_projection",
        "per_layer_proj_norm": "model.per_layer_projection_norm",
    },
    dropped=LLAMA_NAMES.dropped,
    bare=(".layer_scalar",),
)

# By `general.architecture`.
FAMILIES = {
    "t5": Family(T5_NAMES),
    "t5encoder": Family(T5_NAMES),
    "llama": Family(LLAMA_NAMES, permuted=True),  # LLaMA 3 and Mistral
    "mistral3": Family(LLAMA_NAMES, permuted=True),
    "qwen2": Family(LLAMA_NAMES),
    "qwen2vl": Family(LLAMA_NAMES),  # Qwen2.5-VL as well
    "qwen3": Family(LLAMA_NAMES),
    "qwen3vl": Family(LLAMA_NAMES),
    "gemma2": Family(GEMMA_NAMES, norm_shift=1.0),
    "gemma3": Family(GEMMA_NAMES, norm_shift=1.0),
    "gemma4": Family(GEMMA4_NAMES),
}

# Text encoders of ComfyUI's whose GGUF files hold other tensors than its classes, by `general.architecture`.
SAFETENSORS_ONLY = {
    "gpt-oss": "GPT-OSS",
    "qwen35": "Qwen3.5",
    "qwen35moe": "Qwen3.5",
    "bert": "BERT",
    "jina-bert-v2": "Jina's BERT",
    "jina-bert-v3": "Jina's BERT",
}

LLAMA_CPP = re.compile(r"(enc\.|dec\.)?blk\.\d+\.")
# Files of other converters keep the original names; what comes before them is a checkpoint's prefix.
ORIGINAL = re.compile(
    r"(?:.*?\.)??(?=text_model\.(?:encoder|embeddings)\.|transformer\.resblocks\.\d+\."
    r"|encoder\.block\.\d+\.layer\.\d+\.SelfAttention\.|model\.layers\.\d+\.(?:self_attn|mlp|input_layernorm)\.)"
)
# What is found where a text encoder was expected.
CHECKPOINT = re.compile(r"(model\.diffusion_model|first_stage_model|vae)\.")
DENOISER = re.compile(
    r"((model|net|diffusion_model|transformer|unet)\.)?"
    r"((double|single|double_stream|single_stream|joint|input|output|down|up|transformer|single_transformer"
    r"|joint_transformer|double_transformer)_blocks|blocks|(double|single)_layers|(noise|context)_refiner)\.\d+\."
)
ADAPTER = re.compile(r".*\.(lora_(a|b|up|down|A|B)(\.\w+)?|hada_w\d_[ab]|lokr_w\d(_[ab])?)$")
# Connectors with a third block are not the first LTX-2's: ComfyUI leaves them to the diffusion model.
THIRD_CONNECTOR_BLOCK = f"{CONNECTORS[0]}transformer_1d_blocks.2."
# Linear layers of language models and T5 by what they lead to, for files that do not tell their shapes.
FROM_HIDDEN = (
    *(f".SelfAttention.{part}.weight" for part in "qkv"),
    *(f".{part}_proj.weight" for part in ("q", "k", "v", "up", "gate")),
    *(f".DenseReluDense.{part}.weight" for part in ("wi", "wi_0", "wi_1")),
)
TO_HIDDEN = (
    ".SelfAttention.o.weight",
    ".DenseReluDense.wo.weight",
    ".o_proj.weight",
    ".down_proj.weight",
)

# Read by ComfyUI's models themselves instead of through its operations, or too small to matter.
DIRECT_TENSORS = re.compile(
    r".*((position|token_type)_embeddings?\.weight|pos_embed\.weight|text_projection"
    r"|relative_attention_bias\.weight|mm_input_projection_weight|learnable_registers|mlp\.router\.weight)$"
)

QUERY_KEY = re.compile(r".*\.self_attn\.([qk])_proj\.(weight|bias)$")
# Not those of a vision part.
SHIFTED_NORM = re.compile(r"model\..*norm\.weight$")


@dataclass(frozen=True, slots=True)
class VisionFamily:
    """A vision tower. prefix: where ComfyUI's text encoder keeps it. output: what makes the embeddings, and which of
    its dimensions is their width. deepstack: name of the mergers in between. shifted: norms that one was added to.
    """

    prefix: str
    names: NameMap
    output: tuple[str, int] = ("mm.2.weight", 0)
    deepstack: dict[str, str] = field(default_factory=dict)
    shifted: tuple[str, ...] = ()


_VISION_BLOCK = re.compile(r"v\.blk\.(\d+)\.(.+)")
_VISION_PARTS = {
    "ln1": "norm1",
    "ln2": "norm2",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_qkv": "attn.qkv",
    "attn_out": "attn.proj",
}

# By the projector's name in the metadata.
VISION_FAMILIES = {
    "qwen2.5vl_merger": VisionFamily(
        "visual.",
        NameMap(
            block=_VISION_BLOCK,
            block_prefix="blocks.{}.",
            parts={
                **_VISION_PARTS,
                "ffn_up": "mlp.up_proj",
                "ffn_gate": "mlp.gate_proj",
                "ffn_down": "mlp.down_proj",
            },
            tops={
                "v.patch_embd": "patch_embed.proj",
                "v.post_ln": "merger.ln_q",
                "mm.0": "merger.mlp.0",
                "mm.2": "merger.mlp.2",
            },
        ),
    ),
    "qwen3vl_merger": VisionFamily(
        "model.visual.",
        NameMap(
            block=_VISION_BLOCK,
            block_prefix="blocks.{}.",
            parts={**_VISION_PARTS, "ffn_up": "mlp.linear_fc1", "ffn_down": "mlp.linear_fc2"},
            tops={
                "v.patch_embd": "patch_embed.proj",
                "v.position_embd": "pos_embed",
                "v.post_ln": "merger.norm",
                "mm.0": "merger.linear_fc1",
                "mm.2": "merger.linear_fc2",
            },
        ),
        deepstack={"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"},
    ),
    "gemma3": VisionFamily(
        "",
        NameMap(
            block=_VISION_BLOCK,
            block_prefix="vision_model.encoder.layers.{}.",
            parts={
                "ln1": "layer_norm1",
                "ln2": "layer_norm2",
                **{f"attn_{letter}": f"self_attn.{letter}_proj" for letter in "qkv"},
                "attn_out": "self_attn.out_proj",
                "ffn_up": "mlp.fc1",
                "ffn_down": "mlp.fc2",
            },
            tops={
                "v.patch_embd": "vision_model.embeddings.patch_embedding",
                "v.position_embd": "vision_model.embeddings.position_embedding",
                "v.post_ln": "vision_model.post_layernorm",
                "mm.input_projection": "multi_modal_projector.mm_input_projection_weight",
                "mm.soft_emb_norm": "multi_modal_projector.mm_soft_emb_norm",
            },
            bare=(".mm_input_projection_weight",),
        ),
        output=("mm.input_projection.weight", 1),
        shifted=("multi_modal_projector.mm_soft_emb_norm.weight",),
    ),
}
# The two layers of a block, which llama.cpp's first converters named the other way round.
WIDENING = re.compile(r"(.+\.mlp\.)fc1\.weight$")
# Which vision tower belongs to which text encoder.
VISION_OF = {"qwen2vl": "qwen2.5vl_merger", "qwen3vl": "qwen3vl_merger", "gemma3": "gemma3"}
PROJECTOR_KEYS = ("clip.vision.projector_type", "clip.projector_type")
# llama.cpp keeps the number of the layer after which a merger taps; ComfyUI counts the mergers.
DEEPSTACK = re.compile(r"v\.deepstack\.(\d+)\.(norm|fc1|fc2)$")
# The second slice in time of the 3-D patch embedding, which ggml stores as two 2-D ones.
SECOND_PATCH = "v.patch_embd.weight.1"

# Vocabularies that ComfyUI brings tokenizers for (T5 as padded and as trained, ByT5); another T5 is a UMT5.
T5_BUILT_IN_ROWS = ((32128,), (32100,), (384,))
# So does LLaMA 3 (and with the image token of LLaVA); what else has its layers is a Mistral.
LLAMA_3_ROWS = (128256, 128320)
