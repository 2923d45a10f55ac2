"""Compile Model (Snug): torch.compile for any MODEL, without compiling again for every change of LoRA or memory."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter.compilation import DYNAMIC, REGIONAL, WHOLE, CompileSettings, compile_model
from .adapter.compile_backends import MODES, backends


class SnugTorchCompile(io.ComfyNode):
    """MODEL to MODEL; bypassing the node runs the model as before."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugTorchCompile",
            display_name="Compile Model (Snug)",
            category="Snug/speed",
            description=(
                "Speeds up a model with torch.compile, after a first step that takes longer. Changing LoRA, "
                "strength, prompt, seed or memory use does not compile again."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model to compile; any MODEL, quantized or not."),
                io.Combo.Input(
                    "backend",
                    options=backends(),
                    default="inductor",
                    tooltip=(
                        "What compiles. inductor makes it faster; it needs Triton on a GPU and a C++ compiler on a "
                        "CPU. aot_eager and eager gain nothing and are there to find out where an error comes from."
                    ),
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="default",
                    tooltip=(
                        "How hard inductor tries; other backends ignore it. max-autotune measures variants and takes "
                        "minutes on the first step. reduce-overhead and max-autotune record CUDA graphs of what lies "
                        "between the layers with weights, which helps small models."
                    ),
                ),
                io.Combo.Input(
                    "scope",
                    options=[REGIONAL, WHOLE],
                    default=REGIONAL,
                    tooltip=(
                        "The blocks that a model repeats are compiled once and used for all of them: nearly as fast "
                        "as the whole model, and ready several times sooner. The whole model for those without "
                        "repeated blocks."
                    ),
                ),
                io.Boolean.Input(
                    "fullgraph",
                    default=False,
                    tooltip=(
                        "Stops with an error where something cannot be compiled, instead of running that part "
                        "uncompiled. For finding out what a slow model does."
                    ),
                ),
                io.Combo.Input(
                    "dynamic",
                    options=list(DYNAMIC),
                    default="auto",
                    tooltip=(
                        "What happens when the image size, prompt length or batch changes. auto: nothing at another "
                        "image size or prompt length; the first batch of several compiles once more. on: every size "
                        "may change from the start. off: compiles for each size anew, which gives the fastest code."
                    ),
                ),
                io.Boolean.Input(
                    "fallback_to_eager",
                    default=False,
                    tooltip="Falls back to the uncompiled model, with a warning in the log, when compiling fails.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, which compiles itself at its first step.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        backend: str,
        mode: str,
        scope: str,
        fullgraph: bool,
        dynamic: str,
        fallback_to_eager: bool,
    ) -> io.NodeOutput:
        settings = CompileSettings(backend, mode, scope, fullgraph, dynamic, fallback_to_eager)
        return io.NodeOutput(compile_model(model, settings))
