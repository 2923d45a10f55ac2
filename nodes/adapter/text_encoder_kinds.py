"""Which text encoders the types of ComfyUI's CLIP loaders use, and the check before anything is loaded.

Read from `comfy.sd.load_text_encoder_state_dicts` of ComfyUI 0.3.75 and 0.33. A kind is what core's own
detection calls a file (`TEModel`), with UMT5 and mT5 told apart from T5 by their vocabularies, and some of ours for the
files that core looks into without a name for them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.sd

from ...quant_backends.core.errors import FileFormatError, SnugError
from ...quant_backends.readers.text_encoder_kinds import projection_names

UMT5_ROWS, MT5_ROWS = 256384, 250112
# HunyuanDiT's pair. Core has the type, but takes its text encoders out of a checkpoint only.
HUNYUAN_DIT, BERT, MT5 = "hunyuan_dit", "HYDIT_BERT", "MT5_XL"
BERT_TENSOR = "bert.encoder.layer.0.attention.self.query.weight"
# LTX-2's file beside its Gemma.
PROJECTION, PROJECTION_NAME = "LTX2_PROJECTION", "LTX-2's text projection"
# MiniMax Music 3's language model, which writes sound: core knows it by the type that is chosen and this tensor.
MUSIC, MUSIC_TENSOR = "MINIMAX_MUSIC3", "model.audio_decoder.projection.weight"

# Kind: (what people call it, types that take it alone). No types: ComfyUI loads it alike whatever the type.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "CLIP_L": ("CLIP-L", ("stable_diffusion", "sd3", "hidream")),
    "CLIP_H": ("CLIP-H", ("stable_diffusion",)),
    "CLIP_G": ("CLIP-G", ("stable_diffusion", "stable_cascade", "sd3", "hidream")),
    "T5_XXL": ("T5-XXL", ("sd3", "chroma", "pixart", "ltxv", "mochi", "cogvideox", "hidream")),
    "T5_XXL_OLD": ("T5-XXL 1.0", ("cosmos",)),
    "T5_XL": ("T5-XL", ()),
    "T5_BASE": ("T5-base", ("stable_audio",)),
    "UMT5_XXL": ("UMT5-XXL", ("wan",)),
    "UMT5_BASE": ("UMT5-base", ("ace",)),
    "BYT5_SMALL_GLYPH": ("ByT5 small", ("hunyuan_image", "hunyuan_video_15")),
    "LLAMA3_8": ("LLaMA 3 8B", ("hidream",)),
    "GEMMA_2_2B": ("Gemma 2 2B", ("lumina2", "pixeldit")),
    "GEMMA_3_4B": ("Gemma 3 4B", ("lumina2",)),
    "GEMMA_3_4B_VISION": ("Gemma 3 4B", ("lumina2",)),
    "GEMMA_3_12B": ("Gemma 3 12B", ("ltxv",)),
    "GEMMA_4_E2B": ("Gemma 4 E2B", ()),
    "GEMMA_4_E4B": ("Gemma 4 E4B", ()),
    "GEMMA_4_12B": ("Gemma 4 12B", ()),
    "GEMMA_4_31B": ("Gemma 4 31B", ()),
    "T5_GEMMA": ("T5Gemma", ()),
    "JINA_CLIP_2": ("Jina CLIP v2", ("newbie",)),
    "GPT_OSS_20B": ("GPT-OSS 20B", ()),
    "QWEN25_3B": ("Qwen2.5-VL 3B", ("omnigen2",)),
    "QWEN25_7B": ("Qwen2.5-VL 7B", ("qwen_image", "hunyuan_image", "longcat_image")),
    "QWEN3_06B": ("Qwen3 0.6B", ()),
    "QWEN3_2B": ("Qwen3 2B", ("ovis",)),
    "QWEN3_4B": ("Qwen3 4B", ("lumina2", "flux2")),
    "QWEN3_8B": ("Qwen3 8B", ("flux2", "ideogram4")),
    "QWEN3VL_4B": ("Qwen3-VL 4B", ()),
    "QWEN3VL_8B": ("Qwen3-VL 8B", ()),
    "QWEN3VL_32B": ("Qwen3-VL 32B (for MiniMax H3)", ()),
    "QWEN35_08B": ("Qwen3.5 0.8B", ()),
    "QWEN35_2B": ("Qwen3.5 2B", ()),
    "QWEN35_4B": ("Qwen3.5 4B", ()),
    "QWEN35_9B": ("Qwen3.5 9B", ()),
    "QWEN35_27B": ("Qwen3.5 27B", ()),
    "MISTRAL3_24B": ("Mistral Small 3 24B", ("flux2",)),
    "MISTRAL3_24B_PRUNED_FLUX2": ("Mistral Small 3 24B (for Flux 2)", ("flux2",)),
    "MINISTRAL_3_3B": ("Ministral 3 3B", ()),
    PROJECTION: (PROJECTION_NAME, ("ltxv",)),
    MUSIC: ("MiniMax Music 3", ("minimax",)),
    BERT: ("HunyuanDiT's BERT", (HUNYUAN_DIT,)),
    MT5: ("mT5-XL", (HUNYUAN_DIT,)),
}
# Those that ComfyUI can use beside another one only, and which.
NEVER_ALONE = {"JINA_CLIP_2": "Gemma 3 4B", PROJECTION: "a Gemma", BERT: "mT5-XL", MT5: "HunyuanDiT's BERT"}

_T5_CLIPS = frozenset({"CLIP_L", "CLIP_G", "T5_XXL"})
# What LTX-2 has been made with: its first versions with Gemma 3, later ones with Gemma 4.
_LTX2_GEMMAS = frozenset({"GEMMA_3_12B", "GEMMA_4_E2B", "GEMMA_4_E4B", "GEMMA_4_12B", "GEMMA_4_31B"})
# Types that take several files: number of files, then type to the kinds among them.
TOGETHER: dict[int, dict[str, frozenset[str]]] = {
    2: {
        "sdxl": frozenset({"CLIP_L", "CLIP_G"}),
        "sd3": _T5_CLIPS,
        "flux": frozenset({"CLIP_L", "T5_XXL"}),
        "hunyuan_video": frozenset({"CLIP_L", "LLAMA3_8"}),
        "hidream": _T5_CLIPS | {"LLAMA3_8"},
        "hunyuan_image": frozenset({"QWEN25_7B", "BYT5_SMALL_GLYPH"}),
        "hunyuan_video_15": frozenset({"QWEN25_7B", "BYT5_SMALL_GLYPH"}),
        "kandinsky5": frozenset({"QWEN25_7B", "CLIP_L"}),
        "kandinsky5_image": frozenset({"QWEN25_7B", "CLIP_L"}),
        "newbie": frozenset({"GEMMA_3_4B", "JINA_CLIP_2"}),
        "ace": frozenset({"QWEN3_06B", "QWEN3_2B", "QWEN3_4B"}),
        "ltxv": _LTX2_GEMMAS | {PROJECTION},
        HUNYUAN_DIT: frozenset({BERT, MT5}),
    },
    3: {"sd3": _T5_CLIPS},
    4: {"hidream": _T5_CLIPS | {"LLAMA3_8"}},
}


def clip_types() -> list[str]:
    """The types of the running ComfyUI, those for one file first."""
    return list(dict.fromkeys([*_types_of("CLIPLoader"), *_pair_types()]))


def _pair_types() -> list[str]:
    return [*_types_of("DualCLIPLoader"), HUNYUAN_DIT]


def _types_of(loader: str) -> list[str]:
    nodes: Any = importlib.import_module("nodes")  # ComfyUI's; not complete while custom nodes are imported
    return getattr(nodes, loader).INPUT_TYPES()["required"]["type"][0]


def detect_kind(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The kind of a text encoder by its tensors' names and shapes; None when this ComfyUI knows none."""
    for name, kind in ((MUSIC_TENSOR, MUSIC), (BERT_TENSOR, BERT)):
        if name in shapes:
            return kind
    try:
        found = comfy.sd.detect_te_model(
            {name: SimpleNamespace(shape=shape) for name, shape in shapes.items()}
        )
    except LookupError:  # it looks at tensors and dimensions that a damaged file does not have
        return None
    if found is None:
        return PROJECTION if projection_names(shapes) else None
    rows = shapes.get("shared.weight", ())[:1]
    if rows == (MT5_ROWS,) and found.name == "T5_XL":
        return MT5
    return f"UM{found.name}" if rows == (UMT5_ROWS,) else found.name


def check_kinds(kinds: Sequence[tuple[str, str | None]], clip_type: str) -> None:
    """kinds: (path, kind) of each file, as chosen together. Raises SnugError when `clip_type` is not for them.

    Types and kinds that the tables do not have (a newer ComfyUI) are left to ComfyUI.
    """
    count = len(kinds)
    if count == 1:
        ((path, kind),) = kinds
        name, types = KINDS.get(kind or "", ("", ()))
        if kind in NEVER_ALONE:
            raise FileFormatError(
                os.fspath(path),
                f"this is {name}, which is used beside {NEVER_ALONE[kind]}",
                f"choose both, and type {types[0]}",
            )
        if types and clip_type not in types:
            raise _wrong_type(path, name, clip_type, types)
        return
    wanted = TOGETHER.get(count, {}).get(clip_type)
    if wanted is not None and count == 2 and clip_type not in _pair_types():
        raise SnugError(
            f"This ComfyUI takes type {clip_type} with one text encoder file only, got 2; update ComfyUI."
        )
    if wanted is None:
        if count == 2 and clip_type in _pair_types():
            return
        possible = [number for number in TOGETHER if clip_type in TOGETHER[number]]
        alone = clip_type in _types_of("CLIPLoader")
        if possible or alone:
            numbers = " or ".join(map(str, [1] * alone + possible))
            raise SnugError(
                f"Type {clip_type} takes {numbers} text encoder file{'s' * (numbers != '1')}, got {count}; set the "
                f"others to none, or choose another type."
            )
        return
    for path, kind in kinds:
        if kind in KINDS and kind not in wanted:
            raise _wrong_type(path, KINDS[kind][0], clip_type, _types_for(kind, count))
    found = [kind for _, kind in kinds]
    if len(wanted) == count and found[0] in KINDS and len(set(found)) < count:
        names = " and ".join(KINDS[kind][0] for kind in sorted(wanted))
        raise SnugError(
            f"Type {clip_type} takes {names}, got {KINDS[found[0] or ''][0]} twice; choose one of each."
        )
    if clip_type == "ltxv" and found.count(PROJECTION) != 1:
        raise SnugError(
            f"Type ltxv takes a Gemma and {PROJECTION_NAME}, got {' and '.join(Path(path).name for path, _ in kinds)}; "
            f"choose one file of each, or the Gemma and an LTX-2 checkpoint as checkpoint."
        )


def _types_for(kind: str, count: int) -> tuple[str, ...]:
    return tuple(name for name, kinds in TOGETHER[count].items() if kind in kinds) or KINDS[kind][1]


def _wrong_type(path: str, name: str, clip_type: str, types: tuple[str, ...]) -> FileFormatError:
    available = [entry for entry in types if entry in clip_types()]
    hint = f"choose type {' or '.join(available)}" if available else "update ComfyUI to use it"
    return FileFormatError(
        os.fspath(path),
        f"this is {name}, which type {clip_type} does not use here",
        f"{hint}, or another file",
    )
