"""Fast Matmul (Snug): the large layers of a MODEL multiplied in 8 bits, whatever its weights are stored in."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter.fast_matmul import MODES, set_fast_matmul
from .calibrate import Calibration
from .quantize_inputs import DEFAULT_SKIP


class SnugFastMatmul(io.ComfyNode):
    """The model with another way of multiplying; the one that comes in stays as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugFastMatmul",
            display_name="Fast Matmul (Snug)",
            category="Snug/speed",
            description=(
                "Multiplies the large layers of a model in 8 bits, which most GPUs and newer CPUs do about twice as "
                "fast as in 16, whatever the weights are stored in: GGUF, NF4, FP8, INT8 or not quantized. Slightly "
                "inexact; the report says by how much. LoRA stays exact beside it."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, from any loader. It is not changed."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MODES[0],
                    tooltip=(
                        "What inputs and weights of a layer are rounded to for its product.\n"
                        "auto: what this device does faster; off where it does neither.\n"
                        "int8: with input channels rotated first, so that outliers do no harm: the more exact. NVIDIA "
                        "from RTX 20 on, CPUs with VNNI.\n"
                        "fp8: NVIDIA from RTX 40 on.\n"
                        "off: exact, as without this node."
                    ),
                ),
                io.String.Input(
                    "leave_out",
                    default=DEFAULT_SKIP,
                    tooltip=(
                        "Layers that multiply exactly: parts of their names (regular expressions) between commas. "
                        "'default' stands for modulation, embedders, the last layer and the short text beside the "
                        "image; 'default, single_blocks' adds to it, and nothing at all takes every layer of the "
                        "blocks."
                    ),
                ),
                io.Boolean.Input(
                    "keep_rounded",
                    default=True,
                    tooltip=(
                        "On: the rounded weights are kept in memory that is free, 1 byte a weight, and given back when "
                        "ComfyUI needs it. Off: they are made anew in each call, which pays for large images (with "
                        "Triton, from 512 x 512 on)."
                    ),
                ),
                Calibration.Input(
                    "calibration",
                    optional=True,
                    tooltip=(
                        "From Calibrate (Snug): the report then shows the error of the layers' outputs for the inputs "
                        "that were recorded. Without it, that of the weights."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model with these settings, ready for KSampler, LoRA and the rest."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Which layers multiply in 8 bits, how, and the error of each kind of layer.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model: io.Model.Type, mode: str, leave_out: str, keep_rounded: bool, calibration: Any = None
    ) -> io.NodeOutput:
        return io.NodeOutput(*set_fast_matmul(model, mode, leave_out, keep_rounded, calibration))
