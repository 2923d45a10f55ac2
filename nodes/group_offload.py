"""Group Offload (Snug): a MODEL or CLIP whose blocks come to the GPU just before they compute."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter.group_offload import OffloadSettings, offload_clip, offload_model

LEVELS = {"blocks": "block", "single layers": "leaf"}
PREFETCH = {"auto": None, "0": 0, "1": 1, "2": 2, "3": 3}
CPU, DISK = "CPU memory", "disk"


def _inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "limit_gb",
            default=0.0,
            min=0.0,
            max=1024.0,
            step=0.1,
            tooltip=(
                "How many GB of GPU memory the weights may take, streaming included: as many blocks as fit stay "
                "there, the others are streamed. What is computed needs memory beside that. 0: as little as possible."
            ),
        ),
        io.Combo.Input(
            "level",
            options=list(LEVELS),
            default="blocks",
            tooltip=(
                "What is streamed as a whole. Blocks of layers are faster; single layers need the least GPU memory."
            ),
        ),
        io.Int.Input(
            "blocks_per_group",
            default=1,
            min=1,
            max=64,
            tooltip=(
                "How many blocks are copied at a time. More take more GPU memory, and are faster only where blocks "
                "are very small."
            ),
        ),
        io.Combo.Input(
            "prefetch",
            options=list(PREFETCH),
            default="auto",
            tooltip=(
                "How many groups are copied ahead while one computes; each takes the GPU memory of one group. auto: "
                "one, or two where the plan is faster with it. 0 waits for every copy."
            ),
        ),
        io.Boolean.Input(
            "pin_memory",
            default=True,
            tooltip=(
                "Pins the streamed weights in system memory: copies are faster and run while the GPU computes. Untick "
                "when other programs need the memory."
            ),
        ),
        io.Combo.Input(
            "offload_to",
            options=[CPU, DISK],
            default=CPU,
            tooltip=(
                "Where the streamed weights are. Disk needs next to no system memory, and is as slow as reading them "
                "in every step: weights loaded by Snug stay in their files, others go to a temporary one."
            ),
        ),
    ]


def _settings(
    limit_gb: float, level: str, blocks_per_group: int, prefetch: str, pin_memory: bool, offload_to: str
) -> OffloadSettings:
    return OffloadSettings(
        level=LEVELS[level],
        blocks_per_group=blocks_per_group,
        prefetch=PREFETCH[prefetch],
        pin=pin_memory,
        limit=int(limit_gb * 2**30) or None,
        to_disk=offload_to == DISK,
    )


class SnugGroupOffload(io.ComfyNode):
    """The model, streamed; the one that comes in stays as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugGroupOffload",
            display_name="Group Offload (Snug)",
            category="Snug/memory",
            description=(
                "Runs a model that is larger than the GPU's memory: its blocks are copied to the GPU while those "
                "before them compute. Weights travel as they are stored, so quantized ones travel faster."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, from any loader. It is not changed."),
                *_inputs(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, ready for KSampler, LoRA, ControlNet and the rest."),
                io.String.Output(
                    display_name="report",
                    tooltip="What stays on the GPU, what is streamed, and how long copies take.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(*offload_model(model, _settings(**inputs)))


class SnugGroupOffloadCLIP(io.ComfyNode):
    """The same for text encoders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugGroupOffloadCLIP",
            display_name="Group Offload CLIP (Snug)",
            category="Snug/memory",
            description=(
                "Runs text encoders that are larger than the GPU's memory: their blocks are copied to the GPU while "
                "those before them compute. Without it ComfyUI copies layer by layer and waits for each."
            ),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders, from any loader. They are not changed."),
                *_inputs(),
            ],
            outputs=[
                io.Clip.Output(tooltip="The text encoders, ready for CLIP Text Encode and LoRA."),
                io.String.Output(
                    display_name="report",
                    tooltip="What stays on the GPU, what is streamed, and how long copies take.",
                ),
            ],
        )

    @classmethod
    def execute(cls, clip: io.Clip.Type, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(*offload_clip(clip, _settings(**inputs)))
