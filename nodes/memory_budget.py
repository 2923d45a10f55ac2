"""Memory Budget (Snug): the models of a workflow within so many GB of GPU memory."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter.memory_budget import ImageSize, Models, apply_budget
from .image_size_inputs import image_size_inputs


class SnugMemoryBudget(io.ComfyNode):
    """One number for all models; those that come in stay as they are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugMemoryBudget",
            display_name="Memory Budget (Snug)",
            category="Snug/memory",
            description=(
                "Makes a workflow run within so many GB of GPU memory: keeps models whole where they fit, streams "
                "their blocks where they do not, decodes in tiles where needed, and has models that are not in use "
                "leave the GPU. The report says what was chosen and why."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The diffusion model, from any loader, with its LoRAs. It is not changed.",
                ),
                io.Float.Input(
                    "budget_gb",
                    default=8.0,
                    min=1.0,
                    max=1024.0,
                    step=0.1,
                    tooltip=(
                        "The most GPU memory that the workflow may take, in GB. For a card of 8 GB that is 8: what "
                        "the desktop needs is left free (ComfyUI's --reserve-vram)."
                    ),
                ),
                *image_size_inputs("; unused when a latent is connected."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip=(
                        "What KSampler gets as latent_image: its size goes before width, height and batch size. "
                        "Needed for video and audio."
                    ),
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoders. They are not changed."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE that decodes. It is not changed."),
                io.ControlNet.Input(
                    "control_net",
                    optional=True,
                    tooltip="The ControlNet; it stays on the GPU while the model samples.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, for KSampler."),
                io.Clip.Output(tooltip="The text encoders, for CLIP Text Encode, if they were connected."),
                io.Vae.Output(
                    tooltip="The VAE, for VAE Decode, which uses tiles by itself; if it was connected."
                ),
                io.ControlNet.Output(tooltip="The ControlNet, for Apply ControlNet, if it was connected."),
                io.String.Output(
                    display_name="report",
                    tooltip="What is on the GPU at each stage, and what streaming costs.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        budget_gb: float,
        width: int,
        height: int,
        batch_size: int,
        latent: Any = None,
        clip: Any = None,
        vae: Any = None,
        control_net: Any = None,
    ) -> io.NodeOutput:
        models, report = apply_budget(
            budget_gb, Models(model, clip, vae, control_net), ImageSize(width, height, batch_size), latent
        )
        return io.NodeOutput(models.model, models.clip, models.vae, models.control_net, report)
