"""optimum-quanto's weights by their keys.

qint8, qfloat8: `X._data` in the logical shape, `X._scale`; qint4, qint2: `X._data._data` packed, `X._scale`,
`X._shift`; `L.input_scale` and `L.output_scale` (activations) are kept as extras. Packed groups do not tell how
many rows the weight has: whoever opens the file, its bias, or the metadata `snug_shapes` (JSON, name to shape) does.
"""

from __future__ import annotations

from .gguf_tensors import is_possible
from .gguf_values import shown
from .key_groups import KeyGroups
from .safetensors_file import SafetensorsFile, are_counts, strict_json

DATA, PACKED = "._data", "._data._data"
SHAPES = "snug_shapes"
STORED = {
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
}


def has_quanto(file: SafetensorsFile) -> bool:
    return any(name.endswith(DATA) and _base(name) + "._scale" in file.tensors for name in file.tensors)


def load_quanto(groups: KeyGroups) -> None:
    packed = groups.ending(PACKED)
    bits = _bits_of_file(groups, packed)
    shapes = _shapes_of_file(groups) if packed else {}
    for name in packed:
        _load_packed(groups, name, bits, shapes)
    for name in groups.ending(DATA):
        info = groups.file.tensors[name + DATA]
        if info.dtype_name not in STORED:
            groups.file.fail(
                f"the weight {shown(name)} has codes of {info.dtype_name}, expected I8 or float8"
            )
        scale = groups.take(f"{name}._scale")
        block = "tensor" if scale.numel() == 1 else "rows"
        groups.pack(
            name, groups.take(name + DATA), f"{STORED[info.dtype_name]}-{block}", info.shape, {"scale": scale}
        )
    for suffix in (".input_scale", ".output_scale"):
        layers = [name for name in groups.ending(suffix) if f"{name}.weight" in groups.state_dict]
        groups.keep(layer + suffix for layer in layers)


def _shapes_of_file(groups: KeyGroups) -> dict[str, tuple[int, ...]]:
    """The shapes that Snug notes in files of its own."""
    content = groups.file.metadata.get(SHAPES)
    if content is None:
        return {}
    try:
        found = strict_json(content.encode("utf-8", "replace"))
    except ValueError as error:
        groups.file.fail(f"{SHAPES} is not valid JSON ({error})")
    possible = isinstance(found, dict) and all(
        are_counts(shape) and len(shape) <= 8 and is_possible(shape) for shape in found.values()
    )
    if not possible:
        groups.file.fail(f"{SHAPES} does not list shapes")
    return {name: tuple(shape) for name, shape in found.items()}


def _base(name: str) -> str:
    return name.removesuffix(DATA).removesuffix(DATA)


def _possible_bits(groups: KeyGroups, name: str) -> list[int]:
    """The widths that fit the stored rows; one or two groups fit both."""
    scale, data = groups.file.tensors.get(f"{name}._scale"), groups.file.tensors[name + PACKED]
    if scale is None:
        groups.file.fail(f"the tensor {shown(name + '._scale')} is missing")
    if len(data.shape) != 2 or not data.shape[1] or not scale.shape:
        groups.file.fail(
            f"the codes of {shown(name)} have the shape {data.shape}, expected groups in two dimensions"
        )
    return [bits for bits in (4, 2) if data.shape[0] == -(-scale.shape[0] * bits // 8)]


def _bits_of_file(groups: KeyGroups, names: list[str]) -> int | None:
    """The width of all weights that leave no doubt, when they agree."""
    certain = {found[0] for name in names if len(found := _possible_bits(groups, name)) == 1}
    return certain.pop() if len(certain) == 1 else None


def _load_packed(groups: KeyGroups, name: str, bits_of_file: int | None, shapes: dict) -> None:
    possible = _possible_bits(groups, name)
    bits = possible[0] if len(possible) == 1 else bits_of_file
    if bits not in possible:
        groups.file.fail(f"the codes of {shown(name)} fit neither 4 nor 2 bits a weight for certain")
    data, scale, shift = (groups.take(name + suffix) for suffix in (PACKED, "._scale", "._shift"))
    shape = (
        groups.shapes.get(name)
        or shapes.get(name)
        or _shape_from_bias(groups, name, scale.numel() * data.shape[1])
    )
    groups.pack(
        name, data, f"quanto-int{bits}-{data.shape[1]}", tuple(shape), {"scale": scale, "shift": shift}
    )


def _shape_from_bias(groups: KeyGroups, name: str, weights: int) -> tuple[int, ...]:
    bias = groups.file.tensors.get(name.removesuffix("weight") + "bias")
    rows = bias.shape[0] if bias is not None and len(bias.shape) == 1 else 0
    if not rows or weights % rows:
        groups.file.fail(
            f"the shape of {shown(name)} is not in the file: quanto stores groups, and there is no bias to count rows",
            "load the folder with its config.json, or a version of the model quantized to qint8, NF4 or GGUF",
        )
    return (rows, weights // rows)
