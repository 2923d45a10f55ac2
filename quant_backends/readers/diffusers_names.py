"""Diffusion models under diffusers' names, given the names (and fused layers) of their reference code."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from ..core.errors import SnugError
from .diffusers_tables import TRANSFORMERS, UNET_LAYERS, UNET_RESNET, UNET_SIGNATURE, Names
from .gguf_values import shown
from .join_rows import Value, join_rows, swap_halves

_BLOCK = re.compile(r"([a-z_]*blocks)\.(\d{1,6})\.(.+)")
_UNET_BLOCK = re.compile(
    r"(down_blocks|up_blocks)\.(\d{1,6})\.(resnets|attentions|downsamplers|upsamplers)\.(\d{1,6})\.(.+)"
)
_UNET_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d{1,6})\.(.+)")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor goes: its reference name, which of how many parts it is, whether its halves are swapped."""

    name: str
    part: int = 0
    parts: int = 1
    swapped: bool = False


def to_original_names(
    tensors: Mapping[str, Value], progress: Callable[[int, int], None] | None = None
) -> dict[str, Value]:
    """The same weights under the names that ComfyUI's model detection expects.

    Flux, SD3 and 3.5, PixArt, Wan (2.1, 2.2, VACE) and the U-Nets of SD1, SD2 and SDXL are recognised by their names
    in diffusers, without a prefix; any other tensors come back as they are, and so do names that no table has.
    Layers that the reference fuses are joined by rows, packed where their packing allows it; all other tensors are
    the same objects.

    progress: called after every tensor with (bytes done, bytes in all).
    Raises SnugError when a fused layer is incomplete or its parts do not fit, or when two tensors have one place.
    """
    places = _places(tensors)
    total, done = sum(value.nbytes for value in tensors.values()), 0
    result: dict[str, Value] = {}
    waiting: dict[str, dict[int, tuple[str, Value]]] = {}
    for name, value in tensors.items():
        place = places.get(name, _Place(name))
        parts = waiting.setdefault(place.name, {})
        if place.name in result or place.part in parts:
            raise SnugError(f"Two tensors are the same part of {shown(place.name)}; one is {shown(name)}.")
        parts[place.part] = (name, value)
        if len(parts) == place.parts:
            result[place.name] = _built(place, [parts[index][1] for index in range(place.parts)])
            del waiting[place.name]
        done += value.nbytes
        if progress is not None:
            progress(done, total)
    for target, parts in waiting.items():
        names = ", ".join(shown(name) for name, _ in parts.values())
        raise SnugError(
            f"The model is incomplete: of the tensors that form {shown(target)} it has only {names}."
        )
    return result


def _built(place: _Place, parts: list[Value]) -> Value:
    try:
        joined = join_rows(parts) if len(parts) > 1 else parts[0]
        return swap_halves(joined) if place.swapped else joined
    except SnugError as error:
        problem = str(error).removesuffix(".")
        raise SnugError(f"The tensor {shown(place.name)} cannot be put together: {problem}.") from error


def _places(tensors: Collection[str]) -> dict[str, _Place]:
    """The place of every tensor whose family and name are known."""
    for names in TRANSFORMERS.values():
        if _is(tensors, names.signature, names.absent):
            return _transformer_places(tensors, names)
    if _is(tensors, UNET_SIGNATURE, ("controlnet_",)):
        return {name: _Place(target) for name, target in _unet_names(tensors)}
    return {}


def _is(tensors: Collection[str], signature: Iterable[str], absent: tuple[str, ...]) -> bool:
    return all(name in tensors for name in signature) and not any(name.startswith(absent) for name in tensors)


def _transformer_places(tensors: Collection[str], names: Names) -> dict[str, _Place]:
    known = {name: _Place(target, swapped=target in names.swapped) for name, target in names.renamed.items()}
    for target, parts in names.joined.items():
        known.update({name: _Place(target, part, len(parts)) for part, name in enumerate(parts)})
    blocks = {(match[1], int(match[2])) for name in tensors if (match := _BLOCK.fullmatch(name))}
    last = dict(sorted(blocks))  # the highest number of a kind is the last to be set
    places = {}
    for name in tensors:
        match = _BLOCK.fullmatch(name)
        pattern = f"{match[1]}.*.{match[3]}" if match else name
        layer, _, parameter = pattern.rpartition(".")
        place, end = known.get(pattern), ""
        if place is None and parameter in ("weight", "bias"):
            place, end = known.get(layer), f".{parameter}"
        if place is None:
            continue
        at_end = match is not None and int(match[2]) == last[match[1]] and place.name in names.swapped_at_end
        target = place.name.replace("*", match[2]) if match else place.name
        places[name] = _Place(target + end, place.part, place.parts, place.swapped or at_end)
    return places


def _unet_names(tensors: Collection[str]) -> Iterable[tuple[str, str]]:
    """(name, reference name) of a U-Net's tensors.

    The reference numbers all residual blocks in a row, down and up, with a number for every downsampler as well; a
    block's attention is its layer 1, an upsampler the layer after that (ComfyUI: comfy/utils.py, unet_to_diffusers).
    """
    matches = [match for name in tensors if (match := _UNET_BLOCK.fullmatch(name))]
    resnets: dict[tuple[str, int], int] = {}
    for match in matches:
        if match[3] == "resnets":
            level = match[1], int(match[2])
            resnets[level] = max(resnets.get(level, 0), int(match[4]) + 1)
    attentions = {(match[1], int(match[2]), int(match[4])) for match in matches if match[3] == "attentions"}
    first = {}
    for side, number, step in (("down_blocks", 1, 1), ("up_blocks", 0, 0)):
        for level in sorted(level for other, level in resnets if other == side):
            first[side, level] = number
            number += resnets[side, level] + step

    for name in tensors:
        layer, _, parameter = name.rpartition(".")
        if layer in UNET_LAYERS:
            yield name, f"{UNET_LAYERS[layer]}.{parameter}"
        elif match := _UNET_MIDDLE.fullmatch(name):
            number = 1 if match[1] == "attentions" else 2 * int(match[2])
            yield name, f"middle_block.{number}.{_unet_layer(match[1], match[3])}"
        elif (match := _UNET_BLOCK.fullmatch(name)) and (match[1], int(match[2])) in first:
            side, kind, level, index = match[1], match[3], int(match[2]), int(match[4])
            count = resnets[side, level]
            if kind == "downsamplers":
                target = f"input_blocks.{first[side, level] + count}.0.{match[5].replace('conv.', 'op.', 1)}"
            elif kind == "upsamplers":
                place = 2 if (side, level, count - 1) in attentions else 1
                target = f"output_blocks.{first[side, level] + count - 1}.{place}.{match[5]}"
            else:
                blocks = "input_blocks" if side == "down_blocks" else "output_blocks"
                place = 1 if kind == "attentions" else 0
                target = f"{blocks}.{first[side, level] + index}.{place}.{_unet_layer(kind, match[5])}"
            yield name, target


def _unet_layer(kind: str, rest: str) -> str:
    layer, _, parameter = rest.rpartition(".")
    return f"{UNET_RESNET[layer]}.{parameter}" if kind == "resnets" and layer in UNET_RESNET else rest
