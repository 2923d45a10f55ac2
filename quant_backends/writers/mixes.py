"""File types that mix ggml formats: the layers that matter most get more bits ("Q4_K_M" and the like), as data.

The rules for diffusion models are those of ComfyUI-GGUF's patch of llama.cpp's quantizer (`img_tensor_get_type`), those
for language models llama.cpp's own (`llama_tensor_get_type`, src/llama-quant.cpp, models without experts).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..formats import FORMATS, Format

Role: TypeAlias = Literal["value", "fused", "down", "output", "embedding"]
When: TypeAlias = Literal[
    "always", "first 2", "first 4", "first 1/8", "first 1/16", "more bits", "shared heads"
]
# The first of a role's rules whose condition holds names the format.
Rules: TypeAlias = "dict[Role, tuple[tuple[When, str], ...]]"


@dataclass(frozen=True, slots=True)
class Mix:
    """name: llama.cpp's name of the file type. base: the format of every layer that no rule is about.

    diffusion, language: what other layers get, in networks of the two kinds.
    """

    name: str
    base: str
    diffusion: Rules
    language: Rules


def _always(**formats: str) -> Rules:
    return {role: (("always", name),) for role, name in formats.items()}  # pyright: ignore[reportReturnType]


# Language models tie the output to the embedding or have no output at all here, so this is about the embedding.
_EMBEDDING: Rules = _always(embedding="Q6_K")
_MORE: Rules = {"value": (("more bits", "Q6_K"),), "down": (("more bits", "Q6_K"),)}

MIXES: dict[str, Mix] = {
    mix.name: mix
    for mix in (
        Mix(
            "Q2_K",
            "Q2_K",
            _always(value="Q3_K"),
            {
                **_always(down="Q3_K", output="Q3_K"),
                **_EMBEDDING,
                "value": (("shared heads", "Q4_K"), ("always", "Q3_K")),
            },
        ),
        Mix("Q3_K_S", "Q3_K", {}, _EMBEDDING),
        Mix(
            "Q3_K_M",
            "Q3_K",
            {**_always(fused="Q4_K", down="Q4_K"), "value": (("first 2", "Q5_K"), ("always", "Q4_K"))},
            {
                **_always(fused="Q4_K", output="Q4_K"),
                **_EMBEDDING,
                "value": (("first 2", "Q5_K"), ("always", "Q4_K")),
                "down": (("first 1/16", "Q5_K"), ("always", "Q4_K")),
            },
        ),
        Mix(
            "Q3_K_L",
            "Q3_K",
            _always(value="Q5_K", fused="Q4_K", down="Q5_K"),
            {**_always(value="Q5_K", fused="Q4_K", down="Q5_K", output="Q5_K"), **_EMBEDDING},
        ),
        Mix("Q4_0", "Q4_0", _always(down="Q4_1"), _EMBEDDING),
        Mix(
            "Q4_K_S",
            "Q4_K",
            {**_always(down="Q5_K"), "value": (("first 4", "Q5_K"),)},
            {**_EMBEDDING, "value": (("first 4", "Q5_K"),), "down": (("first 1/8", "Q5_K"),)},
        ),
        Mix(
            "Q4_K_M",
            "Q4_K",
            _always(value="Q6_K", fused="Q5_K", down="Q6_K"),
            {**_always(fused="Q5_K"), **_EMBEDDING, **_MORE},
        ),
        Mix("Q5_0", "Q5_0", _always(down="Q5_1"), _EMBEDDING),
        Mix("Q5_K_S", "Q5_K", {}, _EMBEDDING),
        Mix(
            "Q5_K_M",
            "Q5_K",
            _always(value="Q6_K", fused="Q6_K", down="Q6_K"),
            {**_always(fused="Q6_K"), **_EMBEDDING, **_MORE},
        ),
    )
}

# What a language model's row falls back to when it is no whole number of super-blocks.
_SMALLER_BLOCKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

# Text encoders by ComfyUI's names and by llama.cpp's.
_LANGUAGE = re.compile(
    r"(?:.*\.)?(?:model\.layers\.\d+\.(?:self_attn|mlp)|(?:encoder|decoder)\.block\.\d+\.layer|(?:enc\.)?blk\.\d+)\."
    r"|(?:.*\.)?(?:embed_tokens|shared|token_embd)(?:\.weight)?$"
)
_LANGUAGE_ROLES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("value", re.compile(r".*\.(?:v_proj|SelfAttention\.v|attn_v)$")),
    ("fused", re.compile(r".*\.(?:qkv_proj|attn_qkv)$")),
    ("down", re.compile(r".*\.(?:down_proj|DenseReluDense\.wo|ffn_down)$")),
    ("output", re.compile(r".*\.(?:o_proj|SelfAttention\.o|attn_o|attn_output)$")),
    ("embedding", re.compile(r"(?:.*\.)?(?:embed_tokens|shared|token_embd)$")),
)
_DIFFUSION_ROLES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("value", re.compile(r".*(?:attn_v|\.to_v|\.v|\.attn\.w[12]v|_attn\.v_proj)$")),
    ("fused", re.compile(r".*(?:attn_qkv|attn\.qkv|attention\.qkv)$")),
    (
        "down",
        re.compile(
            r".*(?:ffn_down.*|experts\..*\.w2|\.ffn\.2|\.ff\.net\.2|\.mlp\.layer2|\.adaln_modulation_mlp\.2"
            r"|\.feed_forward\.w2)$"
        ),
    ),
)
# Where a UNet's blocks are counted anew, though they are not its first.
_LATER_BLOCKS = ("middle_block.", "output_blocks.", "mid_block.", "up_blocks.")
_BLOCK = re.compile(r"(.*?)\.(\d+)\.")


def mixed_format(
    mix: Mix, name: str, shape: Sequence[int], block: int = 0, blocks: int = 1
) -> type[Format] | None:
    """The format of one layer's weight in a file of this mix.

    name: of the layer or its weight, by its original name. shape: of the weight as it is stored (torch order).
    block, blocks: the number of its block, from 0 up, and how many blocks there are. Returns None when its rows are no
    whole number of blocks of any format that the mix could use: such weights stay in 16 bits. Which layers are too
    delicate to quantize at all is not decided here.
    """
    layer = name.removesuffix(".weight")
    language = _LANGUAGE.match(name) is not None
    chosen = mix.base
    role = _role(layer, language)
    if role is not None:
        rules = (mix.language if language else mix.diffusion).get(role, ())
        if layer.startswith(_LATER_BLOCKS):
            block = blocks
        chosen = next((fmt for when, fmt in rules if _holds(when, shape, block, blocks)), chosen)
    fmt = FORMATS[chosen]
    columns = shape[-1] if len(shape) else 1
    if columns % fmt.block_size and language and chosen in _SMALLER_BLOCKS:
        fmt = FORMATS[_SMALLER_BLOCKS[chosen]]
    return None if columns % fmt.block_size else fmt


def block_numbers(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """For every tensor (block, blocks): its block's number and how many blocks its list has; (0, 1) outside blocks."""
    found = {name: _BLOCK.match(name) for name in names}
    sizes: dict[str, int] = {}
    for match in found.values():
        if match is not None:
            sizes[match[1]] = max(sizes.get(match[1], 0), int(match[2]) + 1)
    return {
        name: (int(match[2]), sizes[match[1]]) if match is not None else (0, 1)
        for name, match in found.items()
    }


def _role(layer: str, language: bool) -> Role | None:
    patterns = _LANGUAGE_ROLES if language else _DIFFUSION_ROLES
    return next((role for role, pattern in patterns if pattern.match(layer)), None)


def _holds(when: When, shape: Sequence[int], block: int, blocks: int) -> bool:
    if when == "always":
        return True
    if (
        when == "more bits"
    ):  # llama.cpp's use_more_bits: the first and last eighth and every third between them
        return block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
    if when == "shared heads":  # at least four query heads to one of value
        return len(shape) > 1 and shape[0] * 4 <= shape[1]
    amount = when.removeprefix("first ")
    return block < (blocks // int(amount[2:]) if "/" in amount else int(amount))
