"""Save Model (Snug) and Save Text Encoder (Snug): quantized weights into files, as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from .adapter.containers import CONTAINERS
from .adapter.model_tensors import LORA_CHOICES
from .adapter.output_path import COLLISIONS, FOLDERS
from .adapter.saving import SaveSettings, save_model, save_text_encoders


def _inputs(key: str, what: str) -> list[io.Input]:
    return [
        io.String.Input(
            "filename_prefix",
            default=f"{key}/Snug",
            tooltip=(
                "The file's name without its ending, with folders before it if you like. %year%, %month%, %day%, "
                f"%hour%, %minute% and %second% are filled in. Files in output/{key} are offered by ComfyUI's loaders."
            ),
        ),
        io.Combo.Input(
            "format",
            options=list(CONTAINERS),
            default=CONTAINERS[0],
            tooltip=(
                "The kind of file. auto: GGUF for weights in GGUF types, safetensors for all others. Weights are not "
                "changed by it: quantize with Quantize nodes before."
            ),
        ),
        io.Combo.Input(
            "lora",
            options=list(LORA_CHOICES),
            default=LORA_CHOICES[0],
            optional=True,
            tooltip=(
                f"What becomes of LoRAs on the {what}. merge: they are in the file for good; quantized weights are "
                "decoded, merged and quantized again. leave out: the file is without them. refuse: stop with a message."
            ),
        ),
        io.Combo.Input(
            "if_exists",
            options=list(COLLISIONS),
            default=COLLISIONS[0],
            optional=True,
            tooltip=(
                "add a number: every run makes a new file (name_00001_, name_00002_, …). replace: one file, exchanged "
                "when the new one is complete. refuse: stop with a message when there is such a file."
            ),
        ),
        io.Combo.Input(
            "folder",
            options=list(FOLDERS),
            default=FOLDERS[0],
            optional=True,
            tooltip=f"Where the name is looked at from: ComfyUI's output folder, or models/{key}.",
        ),
    ]


def _schema(node_id: str, title: str, description: str, first: io.Input, key: str, what: str) -> io.Schema:
    return io.Schema(
        node_id=node_id,
        display_name=title,
        category="Snug/quantize",
        description=description,
        is_output_node=True,
        hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        inputs=[first, *_inputs(key, what)],
        outputs=[io.String.Output(display_name="path", tooltip="Where the file is; one line for each.")],
    )


def _settings(hidden: Any, prefix: str, format: str, options: Mapping[str, str]) -> SaveSettings:
    """With what ComfyUI's own nodes write into files: the prompt and the workflow."""
    texts = {} if hidden.prompt is None else {"prompt": json.dumps(hidden.prompt)}
    texts |= {name: json.dumps(value) for name, value in (hidden.extra_pnginfo or {}).items()}
    return SaveSettings(
        prefix,
        format,
        options.get("lora", LORA_CHOICES[0]),
        options.get("if_exists", COLLISIONS[0]),
        options.get("folder", FOLDERS[0]),
        texts,
    )


def _result(paths: list[Path]) -> io.NodeOutput:
    text = "\n".join(map(str, paths))
    return io.NodeOutput(text, ui=ui.PreviewText(text))


class SnugSaveModel(io.ComfyNode):
    """One file with the weights of a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "SnugSaveModel",
            "Save Model (Snug)",
            (
                "Writes the diffusion model into a file, with quantized weights as they are: GGUF, or safetensors in "
                "the convention of the weights' library. Load Diffusion Model (Snug) gives the same model back."
            ),
            io.Model.Input("model", tooltip="The diffusion model, quantized or not. It is not changed."),
            "diffusion_models",
            "model",
        )

    @classmethod
    def execute(
        cls, model: io.Model.Type, filename_prefix: str, format: str, **options: str
    ) -> io.NodeOutput:
        return _result(save_model(model, _settings(cls.hidden, filename_prefix, format, options)))


class SnugSaveTextEncoder(io.ComfyNode):
    """One file for each text encoder of a CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "SnugSaveTextEncoder",
            "Save Text Encoder (Snug)",
            (
                "Writes each text encoder of a CLIP into a file, with quantized weights as they are. Load Text "
                "Encoders (Snug) gives the same CLIP back."
            ),
            io.Clip.Input("clip", tooltip="The text encoders, quantized or not. They are not changed."),
            "text_encoders",
            "text encoders",
        )

    @classmethod
    def execute(cls, clip: io.Clip.Type, filename_prefix: str, format: str, **options: str) -> io.NodeOutput:
        return _result(save_text_encoders(clip, _settings(cls.hidden, filename_prefix, format, options)))
