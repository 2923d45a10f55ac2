"""Load ControlNet (Snug): any ControlNet file to a native CONTROL_NET."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter import folders
from .adapter.controlnets import load_controlnet


class SnugLoadControlNet(io.ComfyNode):
    """One loader for ControlNets, quantized or not."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugLoadControlNet",
            display_name="Load ControlNet (Snug)",
            category="Snug/loaders",
            description=(
                "Loads a ControlNet, quantized or not, as a normal CONTROL_NET for Apply ControlNet. Quantized "
                "weights stay packed in memory and are decoded as they are used."
            ),
            inputs=[
                io.Combo.Input(
                    "control_net_name",
                    options=folders.CONTROLNETS.choices(folders.CONTROLNETS.files()),
                    tooltip="A .safetensors or .gguf file from models/controlnet.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip=(
                        "Only for a ControlNet that is stored as the difference to its model (difference "
                        "ControlNets for SD 1.5): that model."
                    ),
                ),
            ],
            outputs=[io.ControlNet.Output(tooltip="The ControlNet, ready for Apply ControlNet.")],
        )

    @classmethod
    def fingerprint_inputs(cls, control_net_name: str | None, **_linked: Any) -> tuple[Any, ...]:
        """Changes when the file on disk does, so that a replaced file is loaded anew."""
        if control_net_name is None:  # comes from another node and is not known yet
            return (None,)
        return folders.state_on_disk(folders.CONTROLNETS.find(control_net_name))

    @classmethod
    def execute(cls, control_net_name: str, model: Any = None) -> io.NodeOutput:
        return io.NodeOutput(load_controlnet(folders.CONTROLNETS.find(control_net_name), model))
