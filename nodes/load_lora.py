"""Load LoRA (Snug): any LoRA file onto a MODEL, a CLIP or both."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter import folders
from .adapter.loras import apply_lora


class SnugLoadLora(io.ComfyNode):
    """One LoRA loader for `.safetensors` and `.gguf`, which says so when a LoRA does not fit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def strength(name: str, what: str) -> io.Float.Input:
            return io.Float.Input(
                name,
                default=1.0,
                min=-100.0,
                max=100.0,
                step=0.01,
                tooltip=f"How strongly the LoRA changes the {what}: 0 not at all, negative values the other way.",
            )

        return io.Schema(
            node_id="SnugLoadLora",
            display_name="Load LoRA (Snug)",
            category="Snug/loaders",
            description=(
                "Adds a LoRA to a model, a text encoder or both, quantized or not, at full precision. Says what the "
                "LoRA was made for when it does not fit. Several nodes can be chained."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The diffusion model to change; any MODEL, quantized or not.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder to change; leave it out for a LoRA of the model alone.",
                ),
                io.Combo.Input(
                    "lora_name",
                    options=folders.LORAS.choices(folders.LORAS.files()),
                    tooltip="A .safetensors or .gguf file from models/loras.",
                ),
                strength("strength_model", "diffusion model"),
                strength("strength_clip", "text encoder"),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the LoRA."),
                io.Clip.Output(tooltip="The text encoder with the LoRA."),
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls, lora_name: str | None, strength_model: float, strength_clip: float, **_linked: Any
    ) -> tuple[Any, ...]:
        """Changes when the file on disk does, so that a replaced file is loaded anew."""
        if lora_name is None:  # comes from another node and is not known yet
            return (None, strength_model, strength_clip)
        return (strength_model, strength_clip, *folders.state_on_disk(folders.LORAS.find(lora_name)))

    @classmethod
    def execute(
        cls, lora_name: str, strength_model: float, strength_clip: float, model: Any = None, clip: Any = None
    ) -> io.NodeOutput:
        path = folders.LORAS.find(lora_name)
        return io.NodeOutput(*apply_lora(model, clip, path, strength_model, strength_clip))
