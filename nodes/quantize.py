"""Quantize Model (Snug) and Quantize Text Encoder (Snug): a MODEL or CLIP in fewer bits, beside the original."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter.quantizing import (
    DEVICES,
    QuantizeSettings,
    available_targets,
    memory_targets,
    quantize_clip,
    quantize_model,
)
from .quantize_inputs import skip_input, target_input

Calibration = io.Custom("SNUG_CALIBRATION")


def _more_inputs(what: str) -> list[io.Input]:
    return [
        Calibration.Input(
            "calibration",
            optional=True,
            tooltip=(
                f"What Calibrate (Snug) has recorded with this {what}: rounding then spares the input channels that "
                "matter most. Only formats that can make use of it do."
            ),
        ),
        io.Float.Input(
            "fit_gb",
            default=0.0,
            min=0.0,
            max=1000.0,
            step=0.1,
            optional=True,
            tooltip=(
                f"The size that the {what} is to have, in GB. Not 0: layers that suffer most get larger formats of "
                "the target's family, others smaller ones, so that the error is the least for this size; a calibration "
                "tells it more. 0: every layer gets the target."
            ),
        ),
        io.Boolean.Input(
            "fuse_lora",
            default=False,
            optional=True,
            tooltip=(
                "Off: LoRAs that come before this node stay LoRAs, added at full precision and changeable. On: they "
                "are merged into the weights before these are quantized, as for a file to be saved."
            ),
        ),
        io.Boolean.Input(
            "requantize",
            default=False,
            optional=True,
            tooltip=(
                "Off: layers that are quantized already stay as they are. On: they are decoded and quantized again, "
                "which adds one rounding to the other; better start from the original file."
            ),
        ),
        io.Combo.Input(
            "device",
            options=list(DEVICES),
            default=DEVICES[0],
            optional=True,
            tooltip=(
                "Where weights are quantized, one layer at a time. auto: on the GPU if there is one, many times "
                "faster; cpu: when the GPU is to be left alone."
            ),
        ),
    ]


class SnugQuantizeModel(io.ComfyNode):
    """The model with quantized weights; the one that comes in stays as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugQuantizeModel",
            display_name="Quantize Model (Snug)",
            category="Snug/quantize",
            description=(
                "Stores the weights of a model in fewer bits: GGUF types, NF4, FP8 and more. It works with LoRA, "
                "ControlNet and sampling like any other model, and Save Model (Snug) writes it into a file."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, from any loader. It is not changed."),
                target_input([*available_targets(), *memory_targets()]),
                skip_input(
                    "the embedders of image, text, time and position, norms, modulation where it is delicate, and the "
                    "last layer"
                ),
                *_more_inputs("model"),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The quantized model, ready for KSampler, LoRA and Save Model (Snug)."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was quantized, what was not and why, and the bytes saved.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, target: str, skip_patterns: str, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(*quantize_model(model, QuantizeSettings(target, skip_patterns, **options)))


class SnugQuantizeTextEncoder(io.ComfyNode):
    """The same for text encoders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugQuantizeTextEncoder",
            display_name="Quantize Text Encoder (Snug)",
            category="Snug/quantize",
            description=(
                "Stores the weights of text encoders in fewer bits: GGUF types, NF4, FP8 and more. Prompts are encoded "
                "as before, and Save Text Encoder (Snug) writes the result into files."
            ),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders, from any loader. They are not changed."),
                target_input([*available_targets(), *memory_targets()]),
                skip_input("embedding tables, norms and the projection at the end"),
                *_more_inputs("text encoder"),
            ],
            outputs=[
                io.Clip.Output(tooltip="The quantized text encoders."),
                io.String.Output(
                    display_name="report",
                    tooltip="What was quantized, what was not and why, and the bytes saved.",
                ),
            ],
        )

    @classmethod
    def execute(cls, clip: io.Clip.Type, target: str, skip_patterns: str, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(*quantize_clip(clip, QuantizeSettings(target, skip_patterns, **options)))
