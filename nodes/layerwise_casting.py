"""Layerwise Casting (Snug): a MODEL or CLIP whose weights are stored as float8."""

from __future__ import annotations

from comfy_api.latest import io

from .adapter.layerwise_casting import STORAGE_FORMATS, cast_clip, cast_model
from .adapter.loading import COMPUTE_DTYPES
from .quantize_inputs import skip_input


def _storage_input() -> io.Combo.Input:
    return io.Combo.Input(
        "storage_dtype",
        options=list(STORAGE_FORMATS),
        default=next(iter(STORAGE_FORMATS)),
        tooltip=(
            "The number format that weights are kept in, one byte each. e4m3fn is twice as exact as e5m2 but holds "
            "small numbers badly; 'per row' scales each row of a weight to its whole range, which mends that at "
            "practically the same size. e5m2 has the range by itself."
        ),
    )


class SnugLayerwiseCasting(io.ComfyNode):
    """The model with float8 weights; the one that comes in stays as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugLayerwiseCasting",
            display_name="Layerwise Casting (Snug)",
            category="Snug/memory",
            description=(
                "Stores the weights of a model as float8 and calculates in its compute dtype: half the memory of "
                "bf16 on any hardware. Layers that are quantized already stay as they are; LoRA nodes may come before "
                "or after."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, from any loader. It is not changed."),
                _storage_input(),
                io.Combo.Input(
                    "compute_dtype",
                    options=list(COMPUTE_DTYPES),
                    default="auto",
                    tooltip=(
                        "The number format that layers calculate in; it does not change how much memory the weights "
                        "take. auto: what the model calculates in now."
                    ),
                ),
                skip_input(
                    "norms, embedders of image, text, time and position, modulation where it is delicate, and the "
                    "last layer",
                    "casts",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model with float8 weights, ready for KSampler, LoRA and the rest."
                ),
                io.String.Output(
                    display_name="report", tooltip="What was cast, what was not and why, and the bytes saved."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model: io.Model.Type, storage_dtype: str, compute_dtype: str, skip_patterns: str
    ) -> io.NodeOutput:
        return io.NodeOutput(*cast_model(model, storage_dtype, compute_dtype, skip_patterns))


class SnugLayerwiseCastingCLIP(io.ComfyNode):
    """The same for text encoders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugLayerwiseCastingCLIP",
            display_name="Layerwise Casting CLIP (Snug)",
            category="Snug/memory",
            description=(
                "Stores the weights of text encoders as float8: half the memory of fp16. They calculate in fp32, as "
                "always in ComfyUI. Layers that are quantized already stay as they are."
            ),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders, from any loader. They are not changed."),
                _storage_input(),
                skip_input("norms, embedding tables and the projection at the end", "casts"),
            ],
            outputs=[
                io.Clip.Output(tooltip="The text encoders with float8 weights."),
                io.String.Output(
                    display_name="report", tooltip="What was cast, what was not and why, and the bytes saved."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip: io.Clip.Type, storage_dtype: str, skip_patterns: str) -> io.NodeOutput:
        return io.NodeOutput(*cast_clip(clip, storage_dtype, skip_patterns))
