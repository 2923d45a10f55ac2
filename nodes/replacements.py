"""What takes the place of other packs' loaders when a workflow was made with them and they are not installed.

ComfyUI offers it in the page with one click, and does it by itself for workflows that come in API format, since it has
node replacement. Files are looked for in the same folders under the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy_api.latest
from comfy_api.latest import io

_MODEL = "SnugLoadDiffusionModel"
_ENCODERS = "SnugLoadTextEncoders"
_CHECKPOINT = "SnugLoadCheckpoint"
_COMPUTE = {"compute_dtype": "auto"}


@dataclass(frozen=True, slots=True)
class Replacement:
    """One node of another pack.

    widgets: its inputs in the order in which workflows store their values. inputs: new name to old name.
    values: what the new node is given besides.
    """

    old: str
    new: str
    widgets: tuple[str, ...]
    inputs: dict[str, str]
    values: dict[str, str]


def _encoders(old: str, count: int, kind: str | None) -> Replacement:
    """kind: the type of model where the old node has no input for it."""
    files = tuple(f"clip_name{number}" for number in range(1, count + 1)) if count > 1 else ("clip_name",)
    inputs = {f"text_encoder_{number}": name for number, name in enumerate(files, 1)}
    if kind is not None:
        return Replacement(old, _ENCODERS, files, inputs, {"type": kind})
    return Replacement(old, _ENCODERS, (*files, "type"), {**inputs, "type": "type"}, {})


REPLACEMENTS: tuple[Replacement, ...] = (
    # ComfyUI-GGUF
    Replacement("UnetLoaderGGUF", _MODEL, ("unet_name",), {"model_name": "unet_name"}, _COMPUTE),
    Replacement(
        "UnetLoaderGGUFAdvanced",
        _MODEL,
        ("unet_name", "dequant_dtype", "patch_dtype", "patch_on_device"),
        {"model_name": "unet_name"},
        _COMPUTE,
    ),
    _encoders("CLIPLoaderGGUF", 1, None),
    _encoders("DualCLIPLoaderGGUF", 2, None),
    _encoders("TripleCLIPLoaderGGUF", 3, "sd3"),
    _encoders("QuadrupleCLIPLoaderGGUF", 4, "hidream"),
    # ComfyUI_bitsandbytes_NF4 and its forks
    Replacement(
        "CheckpointLoaderNF4", _CHECKPOINT, ("ckpt_name",), {"checkpoint_name": "ckpt_name"}, _COMPUTE
    ),
    Replacement("UNETLoaderNF4", _MODEL, ("unet_name", "bnb_dtype"), {"model_name": "unet_name"}, _COMPUTE),
)


async def register() -> None:
    """Tells ComfyUI of them; does nothing where it has no node replacement."""
    node_replace: Any = getattr(io, "NodeReplace", None)
    if node_replace is None:
        return
    api = comfy_api.latest.ComfyAPI()
    for found in REPLACEMENTS:
        mapping = [{"new_id": new, "old_id": old} for new, old in found.inputs.items()]
        mapping += [{"new_id": new, "set_value": value} for new, value in found.values.items()]
        await api.node_replacement.register(
            node_replace(
                new_node_id=found.new,
                old_node_id=found.old,
                old_widget_ids=list(found.widgets),
                input_mapping=mapping,
            )
        )
