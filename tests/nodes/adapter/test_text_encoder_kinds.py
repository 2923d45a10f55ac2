"""Every type of ComfyUI's CLIP loaders, and every kind of text encoder that it detects, has its place in the tables.

A type or kind that nobody has thought of fails here, so that somebody does.
"""

from __future__ import annotations

from typing import Any

import pytest
from snug.quant_backends.core.errors import SnugError

# Type of the enumeration: files that it is used with, one set for each way.
TYPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "STABLE_DIFFUSION": (("CLIP_L",), ("CLIP_G",), ("CLIP_H",), ("QWEN35_4B",), ("GEMMA_4_E4B",)),
    "STABLE_CASCADE": (("CLIP_G",),),
    "SD3": (("CLIP_L", "CLIP_G"), ("CLIP_L", "T5_XXL"), ("CLIP_L", "CLIP_G", "T5_XXL"), ("T5_XXL",)),
    "STABLE_AUDIO": (("T5_BASE",), ("T5_GEMMA",)),
    "HUNYUAN_DIT": (("HYDIT_BERT", "MT5_XL"),),
    "FLUX": (("CLIP_L", "T5_XXL"),),
    "MOCHI": (("T5_XXL",),),
    "LTXV": (("T5_XXL",), ("GEMMA_3_12B",), ("GEMMA_3_12B", "LTX2_PROJECTION")),
    "HUNYUAN_VIDEO": (("CLIP_L", "LLAMA3_8"),),
    "PIXART": (("T5_XXL",),),
    "COSMOS": (("T5_XXL_OLD",),),
    "LUMINA2": (("GEMMA_2_2B",), ("GEMMA_3_4B",), ("QWEN3_4B",)),
    "WAN": (("UMT5_XXL",),),
    "HIDREAM": (("LLAMA3_8",), ("CLIP_L", "LLAMA3_8"), ("CLIP_L", "CLIP_G", "T5_XXL", "LLAMA3_8")),
    "CHROMA": (("T5_XXL",),),
    "ACE": (("UMT5_BASE",), ("QWEN3_06B", "QWEN3_2B"), ("QWEN3_06B", "QWEN3_4B")),
    "OMNIGEN2": (("QWEN25_3B",),),
    "QWEN_IMAGE": (("QWEN25_7B",),),
    "HUNYUAN_IMAGE": (("QWEN25_7B",), ("QWEN25_7B", "BYT5_SMALL_GLYPH")),
    "HUNYUAN_VIDEO_15": (("QWEN25_7B", "BYT5_SMALL_GLYPH"),),
    "OVIS": (("QWEN3_2B",),),
    "KANDINSKY5": (("QWEN25_7B", "CLIP_L"),),
    "KANDINSKY5_IMAGE": (("QWEN25_7B", "CLIP_L"),),
    "NEWBIE": (("GEMMA_3_4B", "JINA_CLIP_2"),),
    "FLUX2": (("MISTRAL3_24B",), ("QWEN3_4B",), ("QWEN3_8B",)),
    "LONGCAT_IMAGE": (("QWEN25_7B",),),
    "COGVIDEOX": (("T5_XXL",),),
    "LENS": (("GPT_OSS_20B",),),
    "PIXELDIT": (("GEMMA_2_2B",),),
    "IDEOGRAM4": (("QWEN3_8B",), ("QWEN3VL_8B",)),
    "BOOGU": (("QWEN3VL_8B",),),
    "KREA2": (("QWEN3VL_4B",),),
    "JOYIMAGE": (("QWEN3VL_8B",),),
    "MAGE": (("QWEN3VL_4B",),),
    "MINIMAX": (("QWEN3VL_32B",), ("MINIMAX_MUSIC3",)),
    # Offered without a member of their own.
    "SDXL": (("CLIP_L", "CLIP_G"),),
}


def kinds() -> Any:
    from snug.nodes.adapter import text_encoder_kinds

    return text_encoder_kinds


def test_every_type_is_known(comfy: Any) -> None:
    assert {*comfy.sd.CLIPType.__members__, *map(str.upper, kinds().clip_types())} <= TYPES.keys()


def test_every_kind_has_a_name(comfy: Any) -> None:
    assert comfy.sd.TEModel.__members__.keys() <= kinds().KINDS.keys()
    assert {kind for ways in TYPES.values() for way in ways for kind in way} <= kinds().KINDS.keys()


@pytest.mark.parametrize("clip_type", TYPES)
def test_types_take_their_text_encoders(clip_type: str, comfy: Any) -> None:
    """And not a CLIP-L beside another CLIP-L, which is no way of any."""
    offered = kinds().clip_types()
    if clip_type.lower() not in offered:
        pytest.skip(f"this ComfyUI does not offer type {clip_type.lower()}")
    known = {*comfy.sd.TEModel.__members__, "UMT5_XXL", "UMT5_BASE", "HYDIT_BERT", "MT5_XL"}
    known |= {"LTX2_PROJECTION", "MINIMAX_MUSIC3"}
    for way in TYPES[clip_type]:
        if not known.issuperset(way) or (len(way) == 2 and clip_type.lower() not in kinds()._pair_types()):
            continue
        kinds().check_kinds([(f"{kind}.gguf", kind) for kind in way], clip_type.lower())
    with pytest.raises(SnugError):
        kinds().check_kinds([("5.gguf", "CLIP_H"), ("6.gguf", "CLIP_H")], clip_type.lower())
