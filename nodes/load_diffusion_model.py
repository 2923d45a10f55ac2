"""Load Diffusion Model (Snug): any diffusion-model file to a native MODEL."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter import folders
from .adapter.loading import COMPUTE_DTYPES, load_diffusion_model, summary_for_tooltip
from .adapter.quantizing import available_targets
from .quantize_inputs import AS_IN_FILE, on_load_input


class SnugLoadDiffusionModel(io.ComfyNode):
    """One loader for every diffusion model: `.gguf`, `.safetensors` of any convention, diffusers folders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugLoadDiffusionModel",
            display_name="Load Diffusion Model (Snug)",
            category="Snug/loaders",
            description=(
                "Loads a diffusion model, quantized or not, as a normal MODEL: it works with KSampler, LoRA, "
                "ControlNet and saving. Quantized weights stay packed in memory and are decoded as they are used."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.DIFFUSION_MODELS.choices(folders.diffusion_model_files()),
                    tooltip=(
                        "A .gguf or .safetensors file from models/diffusion_models or models/unet, or a folder (its "
                        "name ends in /) in diffusers' layout from there or from models/diffusers. What it is, is read "
                        f"from its content, whatever its name. Stays packed: {summary_for_tooltip()}."
                    ),
                ),
                io.Combo.Input(
                    "compute_dtype",
                    options=list(COMPUTE_DTYPES),
                    default="auto",
                    tooltip=(
                        "The number format that layers calculate in; it does not change how much memory the "
                        "weights take. auto: what ComfyUI picks for this model on this device. bf16 and fp16 "
                        "are fast on most GPUs, fp32 is exact and slow."
                    ),
                ),
                on_load_input("quantize", available_targets(), "the model"),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, ready for KSampler, LoRA and every other MODEL node.")
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls, model_name: str | None, compute_dtype: str, quantize: str = AS_IN_FILE
    ) -> tuple[Any, ...]:
        """Changes when the file on disk does, so that a replaced file is loaded anew."""
        if model_name is None:  # comes from another node and is not known yet
            return (None, compute_dtype, quantize)
        return (compute_dtype, quantize, *folders.state_on_disk(folders.find_diffusion_model(model_name)))

    @classmethod
    def execute(cls, model_name: str, compute_dtype: str, quantize: str = AS_IN_FILE) -> io.NodeOutput:
        path = folders.find_diffusion_model(model_name)
        return io.NodeOutput(load_diffusion_model(path, compute_dtype, quantize))
