"""Spare Memory Cache (Snug): a MODEL whose weights are kept decoded as far as memory is free."""

from __future__ import annotations

from comfy_api.latest import io

from .adapter.spare_memory_report import set_spare_memory


class SnugSpareMemoryCache(io.ComfyNode):
    """The model with copies of its weights; the one that comes in stays as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugSpareMemoryCache",
            display_name="Spare Memory Cache (Snug)",
            category="Snug/speed",
            description=(
                "Keeps the weights of a quantized model decoded, as many as fit into memory that is free, so that they "
                "are not decoded in every step. Same images; the memory is given back when ComfyUI needs it."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, from any loader. It is not changed."),
                io.Float.Input(
                    "limit_gb",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.1,
                    tooltip=(
                        "The most memory, in GB, that the copies may take on the device that computes. 0: what is free "
                        "beside the model, computing, and a tenth of all memory for others."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model with these settings, ready for KSampler, LoRA and the rest."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What copies of all weights would take, and what is free now.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, limit_gb: float) -> io.NodeOutput:
        return io.NodeOutput(*set_spare_memory(model, limit_gb))
