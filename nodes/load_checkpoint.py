"""Load Checkpoint (Snug): an all-in-one file to MODEL, CLIP and VAE."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter import folders
from .adapter.checkpoints import load_checkpoint
from .adapter.loading import COMPUTE_DTYPES
from .adapter.quantizing import available_targets
from .quantize_inputs import AS_IN_FILE, on_load_input


class SnugLoadCheckpoint(io.ComfyNode):
    """One loader for files that hold the whole of a model, quantized or not."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugLoadCheckpoint",
            display_name="Load Checkpoint (Snug)",
            category="Snug/loaders",
            description=(
                "Loads a file that holds diffusion model, text encoders and VAE together, quantized or not. "
                "Quantized weights stay packed in memory and are decoded as they are used."
            ),
            inputs=[
                io.Combo.Input(
                    "checkpoint_name",
                    options=folders.CHECKPOINTS.choices(folders.CHECKPOINTS.files()),
                    tooltip=(
                        "A .safetensors or .gguf file from models/checkpoints. What it holds and how it is "
                        "quantized is read from the file's content."
                    ),
                ),
                io.Combo.Input(
                    "compute_dtype",
                    options=list(COMPUTE_DTYPES),
                    default="auto",
                    tooltip=(
                        "The number format that the diffusion model calculates in; it does not change how much "
                        "memory the weights take. auto: what ComfyUI picks for this model on this device."
                    ),
                ),
                on_load_input("quantize", available_targets(), "the diffusion model"),
                on_load_input("quantize_text_encoders", available_targets(), "the text encoders"),
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model."),
                io.Clip.Output(tooltip="The text encoders; empty when the file has none."),
                io.Vae.Output(tooltip="The VAE; refuses to work when the file has none."),
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls,
        checkpoint_name: str | None,
        compute_dtype: str,
        quantize: str = AS_IN_FILE,
        quantize_text_encoders: str = AS_IN_FILE,
    ) -> tuple[Any, ...]:
        """Changes when the file on disk does, so that a replaced file is loaded anew."""
        settings = (compute_dtype, quantize, quantize_text_encoders)
        if checkpoint_name is None:  # comes from another node and is not known yet
            return (None, *settings)
        return (*settings, *folders.state_on_disk(folders.CHECKPOINTS.find(checkpoint_name)))

    @classmethod
    def execute(
        cls,
        checkpoint_name: str,
        compute_dtype: str,
        quantize: str = AS_IN_FILE,
        quantize_text_encoders: str = AS_IN_FILE,
    ) -> io.NodeOutput:
        path = folders.CHECKPOINTS.find(checkpoint_name)
        return io.NodeOutput(*load_checkpoint(path, compute_dtype, quantize, quantize_text_encoders))
