"""Precision (Snug): what a MODEL, CLIP or VAE calculates in, and with which attention."""

from __future__ import annotations

from comfy_api.latest import io

from .adapter.attention import COMFYUIS_CHOICE, SLICING, attention_backends, missing_backend
from .adapter.loading import COMPUTE_DTYPES
from .adapter.precision import PrecisionSettings, set_precision
from .adapter.precision_copies import set_clip_precision, set_vae_precision


def _dtype_input(auto: str) -> io.Combo.Input:
    return io.Combo.Input(
        "compute_dtype",
        options=list(COMPUTE_DTYPES),
        default="auto",
        tooltip=(
            f"The number format to calculate in; how weights are stored does not change. auto: {auto}. fp32 is the "
            f"most exact and slowest; bf16 has its range with fewer digits; fp16 has more digits, but some models "
            f"overflow to black images."
        ),
    )


class SnugPrecision(io.ComfyNode):
    """The model with settings of its own; the one that comes in stays as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugPrecision",
            display_name="Precision (Snug)",
            category="Snug/speed",
            description=(
                "What a model calculates in, which attention it uses and in how many slices, for this model alone. The "
                "help page says which node or start option does which technique."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, from any loader. It is not changed."),
                _dtype_input("what the model calculates in now"),
                io.Boolean.Input(
                    "fp32_islands",
                    default=True,
                    tooltip=(
                        "Norms and the final layer calculate in float32 while the rest is fp16 or bf16: large sums do "
                        "not overflow and the result is not rounded, at a few percent of the time. Without meaning "
                        "where everything is float32."
                    ),
                ),
                io.Combo.Input(
                    "attention_backend",
                    options=attention_backends(),
                    default=COMFYUIS_CHOICE,
                    tooltip=(
                        "The attention of this model: those that ComfyUI and other packs offer on this machine. "
                        "pytorch suits nearly everything; sage and flash need their packages and are faster on large "
                        "images; split and sub_quad save memory where nothing else works."
                    ),
                ),
                io.Combo.Input(
                    "attention_slicing",
                    options=list(SLICING),
                    default=SLICING[0],
                    tooltip=(
                        "Attention over parts of the image, one after the other: the same result, less memory at the "
                        "peak, somewhat slower. auto: as many as the free memory asks for (ComfyUI's split attention). "
                        "A number: always so many, with any backend. Most backends on a GPU need no slices."
                    ),
                ),
                io.Boolean.Input(
                    "fuse_qkv",
                    default=False,
                    tooltip=(
                        "Multiplies query, key and value of quantized layers as one matrix: fewer and larger steps, "
                        "more memory for the decoded weights. Worth a try on small images; no use in compiled blocks."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model with these settings, ready for KSampler, LoRA and the rest."
                ),
                io.String.Output(
                    display_name="report", tooltip="What the model calculates in, and what was found in it."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, attention_backend: str) -> bool | str:
        """In place of ComfyUI's own check, whose message names no reason."""
        return missing_backend(attention_backend) or True

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        compute_dtype: str,
        fp32_islands: bool,
        attention_backend: str,
        attention_slicing: str,
        fuse_qkv: bool,
    ) -> io.NodeOutput:
        settings = PrecisionSettings(
            compute_dtype, fp32_islands, attention_backend, attention_slicing, fuse_qkv
        )
        return io.NodeOutput(*set_precision(model, settings))


class SnugPrecisionCLIP(io.ComfyNode):
    """The same for text encoders, which ComfyUI calculates in float32."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugPrecisionCLIP",
            display_name="Precision CLIP (Snug)",
            category="Snug/speed",
            description=(
                "What text encoders calculate in. ComfyUI uses float32; bf16 is faster on a GPU and halves what the "
                "calculation takes beside the weights, for a slightly different image."
            ),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders, from any loader. They are not changed."),
                _dtype_input("as they are, which is fp32"),
            ],
            outputs=[io.Clip.Output(tooltip="Text encoders that share the weights of the given ones.")],
        )

    @classmethod
    def execute(cls, clip: io.Clip.Type, compute_dtype: str) -> io.NodeOutput:
        return io.NodeOutput(set_clip_precision(clip, compute_dtype))


class SnugPrecisionVAE(io.ComfyNode):
    """The same for a VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugPrecisionVAE",
            display_name="Precision VAE (Snug)",
            category="Snug/speed",
            description=(
                "What a VAE calculates in, for this VAE alone: fp32 against black images and banding, bf16 or fp16 for "
                "half the memory. --fp32-vae and the like do it for all of them."
            ),
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE, from any loader. It is not changed."),
                _dtype_input("what the VAE calculates in now"),
            ],
            outputs=[io.Vae.Output(tooltip="The VAE with weights of its own in this number format.")],
        )

    @classmethod
    def execute(cls, vae: io.Vae.Type, compute_dtype: str) -> io.NodeOutput:
        return io.NodeOutput(set_vae_precision(vae, compute_dtype))
