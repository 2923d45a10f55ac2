"""Load Text Encoders (Snug): one to four text-encoder files to a native CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from .adapter import folders
from .adapter.quantizing import available_targets
from .adapter.text_encoder_kinds import clip_types
from .adapter.text_encoders import load_text_encoders
from .quantize_inputs import AS_IN_FILE, on_load_input

NONE = "none"
AUTO = "auto"


class SnugLoadTextEncoders(io.ComfyNode):
    """One loader for any number of text encoders, `.gguf` and `.safetensors` in any mix."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folders.text_encoder_files()
        parts = [name for name in files if name.lower().endswith(".gguf")]
        return io.Schema(
            node_id="SnugLoadTextEncoders",
            display_name="Load Text Encoders (Snug)",
            category="Snug/loaders",
            description=(
                "Loads one to four text encoders, quantized or not, in any mix of formats (GGUF, NF4, FP4, INT8, "
                "FP8, quanto, torchao), as a normal CLIP for prompts, LoRA and saving. Quantized weights stay packed "
                "in memory and are decoded as they are used."
            ),
            inputs=[
                io.Combo.Input(
                    "text_encoder_1",
                    options=folders.TEXT_ENCODERS.choices(files),
                    tooltip=(
                        "A .gguf or .safetensors file from models/text_encoders or models/clip, plain or quantized. "
                        "What it is, is read from the file's content; its name does not matter."
                    ),
                ),
                io.Combo.Input(
                    "type",
                    options=clip_types(),
                    tooltip=(
                        "The kind of model that the prompt is for. A text encoder that this model does not use is "
                        "refused with the types that do."
                    ),
                ),
                *(
                    io.Combo.Input(
                        f"text_encoder_{number}",
                        options=[NONE, *files],
                        default=NONE,
                        optional=True,
                        tooltip=(
                            "Another text encoder, for models that use several: SDXL, Flux and HunyuanVideo two, "
                            "SD3 up to three, HiDream up to four; or the text projection of LTX-2. The order does not "
                            "matter."
                        ),
                    )
                    for number in (2, 3, 4)
                ),
                io.Combo.Input(
                    "mmproj",
                    options=[AUTO, NONE, *parts],
                    default=AUTO,
                    optional=True,
                    tooltip=(
                        "The vision part of a Qwen2.5-VL, Qwen3-VL or Gemma 3 GGUF, needed to edit images, or to write "
                        "a prompt from one. auto: the one in the same folder that fits."
                    ),
                ),
                on_load_input("quantize", available_targets(), "the text encoders"),
                io.Combo.Input(
                    "checkpoint",
                    options=[NONE, *folders.CHECKPOINTS.files()],
                    default=NONE,
                    optional=True,
                    tooltip=(
                        "For LTX-2: the checkpoint from models/checkpoints that holds the projection between Gemma and "
                        "the diffusion model, unless a file with it is chosen above. Only that part of it is loaded."
                    ),
                ),
            ],
            outputs=[io.Clip.Output(tooltip="The text encoders, ready for CLIP Text Encode and LoRA.")],
        )

    @classmethod
    def fingerprint_inputs(
        cls, text_encoder_1: str | None, type: str | None, **optional: str | None
    ) -> tuple[object, ...]:
        """Changes when a file on disk does, so that a replaced file is loaded anew; with auto also when a vision
        part is put beside a text encoder."""
        mmproj = optional.get("mmproj", AUTO)
        names = [*_chosen(text_encoder_1, optional), *([mmproj] if mmproj not in (AUTO, NONE) else [])]
        # None comes from another node and is not known yet.
        paths = [folders.find_text_encoder(name) for name in names if name is not None]
        paths += _checkpoint(optional)
        parts = folders.parts_on_disk(paths) if mmproj == AUTO else ()
        return (
            type,
            mmproj,
            optional.get("quantize", AS_IN_FILE),
            *names,
            *map(folders.state_on_disk, paths),
            *parts,
        )

    @classmethod
    def execute(cls, text_encoder_1: str, type: str, **optional: str) -> io.NodeOutput:
        mmproj = optional.get("mmproj", AUTO)
        if mmproj not in (AUTO, NONE):
            mmproj = folders.find_text_encoder(mmproj)
        paths = [folders.find_text_encoder(name) for name in _chosen(text_encoder_1, optional)]
        paths += _checkpoint(optional)
        quantize = optional.get("quantize", AS_IN_FILE)
        return io.NodeOutput(load_text_encoders(paths, type, mmproj, quantize))


def _chosen(first: Any, optional: Mapping[str, Any]) -> list[Any]:
    others = (optional.get(f"text_encoder_{number}", NONE) for number in (2, 3, 4))
    return [first, *(name for name in others if name != NONE)]


def _checkpoint(optional: Mapping[str, Any]) -> list[str]:
    name = optional.get("checkpoint", NONE)
    return [] if name in (NONE, None) else [folders.CHECKPOINTS.find(name)]
