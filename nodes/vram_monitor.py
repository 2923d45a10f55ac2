"""VRAM Monitor (Snug): where the memory of a prompt went, on any wire."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .telemetry.monitor import CSV, JSON, NOTHING, Settings, begin, look


class SnugVRAMMonitor(io.ComfyNode):
    """Passes its value through; ComfyUI runs it after the nodes that the value comes from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugVRAMMonitor",
            display_name="VRAM Monitor (Snug)",
            category="Snug/memory",
            description=(
                "Shows where the memory of a prompt went: the peak, the growth and the time of each node, the models "
                "that are loaded and what each device's memory is taken by, as text, picture and file. Sits on any "
                "wire and passes its value through."
            ),
            inputs=[
                io.AnyType.Input(
                    "value",
                    tooltip="Anything; it is passed through. What it comes from runs before and is recorded.",
                ),
                io.Boolean.Input(
                    "reset_peak",
                    default=False,
                    tooltip="Begin anew here: monitors that run later report only what comes after this one.",
                ),
                io.Boolean.Input(
                    "free_memory",
                    default=False,
                    tooltip="Unload all models and give back cached memory before the workflow continues.",
                ),
                io.Combo.Input(
                    "save_as",
                    options=[NOTHING, CSV, JSON],
                    default=NOTHING,
                    tooltip="Also write the numbers to a file: CSV a line per node, JSON with the timeline and models.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="snug/memory",
                    tooltip="The file's name below ComfyUI's output folder; a number is added to it.",
                ),
            ],
            outputs=[
                io.AnyType.Output(display_name="value", tooltip="What came in."),
                io.String.Output(display_name="report", tooltip="Devices, models, and nodes by their peak."),
                io.Image.Output(
                    display_name="timeline", tooltip="The memory over time with the nodes below it."
                ),
            ],
            hidden=[io.Hidden.unique_id],  # without it, ComfyUI takes two monitors for the same node
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """ComfyUI asks for this when it begins with a prompt that has the node in it. Always the same, so that
        results after the node stay cached."""
        begin()
        return ""

    @classmethod
    def execute(
        cls, value: Any, reset_peak: bool, free_memory: bool, save_as: str, filename_prefix: str
    ) -> io.NodeOutput:
        view = look(cls.hidden.unique_id, Settings(reset_peak, free_memory, save_as, filename_prefix))
        ui = {"text": (view.report,), "snug_memory": (view.peak,)}
        return io.NodeOutput(value, view.report, view.picture, ui=ui)
