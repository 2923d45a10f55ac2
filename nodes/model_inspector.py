"""Model Inspector (Snug): what a model is made of, and whether it fits."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .adapter.computing import ImageSize
from .adapter.folders import state_on_disk
from .adapter.inspection_plot import draw
from .adapter.model_inspector import NONE, find_file, inspect, inspectable_files
from .image_size_inputs import image_size_inputs


class SnugModelInspector(io.ComfyNode):
    """Reports; nothing is loaded or changed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugModelInspector",
            display_name="Model Inspector (Snug)",
            category="Snug/memory",
            description=(
                "Shows what a model is made of: architecture, formats and why they were chosen, bytes of its blocks, "
                "missing and unexpected tensors, metadata; and whether it fits on this device at a resolution, with "
                "what would be offloaded. Of a file only the header is read."
            ),
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="A diffusion model to inspect, from any loader. It is not changed.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Text encoders to inspect, from any loader. They are not changed.",
                ),
                io.Combo.Input(
                    "file",
                    options=inspectable_files(),
                    default=NONE,
                    tooltip="A file to inspect without loading it; only its header is read.",
                ),
                *image_size_inputs(", for the estimate of the fit."),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="All findings as text."),
                io.String.Output(
                    display_name="json",
                    tooltip="The same as JSON, one object for each model, sizes in bytes.",
                ),
                io.Image.Output(
                    display_name="plot", tooltip="Bars of formats, blocks and the fit, as a picture."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None, **_others: Any) -> Any:
        """Changes when the file on disk does; what is free on the device is as it was when the node ran."""
        # None comes from another node and is not known yet.
        return file if file in (None, NONE) else state_on_disk(find_file(file))

    @classmethod
    def execute(
        cls,
        file: str,
        width: int,
        height: int,
        batch_size: int,
        model: Any = None,
        clip: Any = None,
    ) -> io.NodeOutput:
        summaries, report, as_json = inspect(model, clip, file, ImageSize(width, height, batch_size))
        return io.NodeOutput(report, as_json, draw(summaries), ui=ui.PreviewText(report))
