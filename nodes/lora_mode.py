"""LoRA Mode (Snug): how LoRA is applied to quantized weights."""

from __future__ import annotations

from comfy_api.latest import io

from .adapter.lora_mode import MODES, set_lora_mode


class SnugLoraMode(io.ComfyNode):
    """The model with another way of applying LoRA; the one that comes in stays as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugLoraMode",
            display_name="LoRA Mode (Snug)",
            category="Snug/memory",
            description=(
                "Decides how LoRA is applied to quantized layers, for the LoRA nodes before and behind it. The report "
                "says what each way costs for this model in memory and operations."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, from any loader. It is not changed."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MODES[0],
                    tooltip=(
                        "For a layer of in x out weights, a LoRA of rank r and M tokens (of all images of a batch).\n"
                        "merge while dequantizing: added to the weight whenever it is decoded, as without this node: "
                        "2*r*in*out operations a step, and 4*in*out bytes while the layer runs.\n"
                        "side branch: calculated beside the weight: 2*M*r*(in+out) operations a step, no memory.\n"
                        "automatic: the cheaper of the two, for each layer and size of image.\n"
                        "bake in: the LoRAs before this node are merged now and the weights quantized again: nothing "
                        "per step, but rounding, which the report shows. Later LoRAs are added as usual."
                    ),
                ),
                io.Boolean.Input(
                    "cache_other_types",
                    default=True,
                    tooltip=(
                        "LoHa, LoKr, DoRA, OFT and other costly kinds have no side branch. On: layers with them are "
                        "kept merged and decoded as long as memory is free, 2*in*out bytes each (4 in fp32), which "
                        "is given back when ComfyUI needs it. Off: they are merged anew in every step."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, ready for KSampler, more LoRA and the rest."),
                io.String.Output(
                    display_name="report",
                    tooltip="Layers with LoRA by kind, the cost of each mode, and the error when LoRA was baked in.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, mode: str, cache_other_types: bool) -> io.NodeOutput:
        return io.NodeOutput(*set_lora_mode(model, mode, cache_other_types))
