"""ggml's types and llama.cpp's mixes of them as targets, largest first."""

from __future__ import annotations

from ..formats import FORMATS, Format
from ..writers.mixes import MIXES, Mix, mixed_format
from .layers import LayerInfo
from .target import Target


def _one_type(fmt: type[Format]) -> Target:
    def choose(layer: LayerInfo, block: int, blocks: int) -> type[Format] | None:
        return None if not layer.shape or layer.shape[-1] % fmt.block_size else fmt

    return Target(f"GGUF {fmt.name}", "gguf", choose, _bits(fmt.name))


def _mix(mix: Mix) -> Target:
    def choose(layer: LayerInfo, block: int, blocks: int) -> type[Format] | None:
        return mixed_format(mix, layer.name, layer.shape, block, blocks)

    return Target(f"GGUF {mix.name}", "gguf", choose, _bits(mix.base))


def _bits(name: str) -> float:
    return FORMATS[name].block_bytes * 8 / FORMATS[name].block_size


def _types_of(mix: Mix) -> set[str]:
    rules = [rule for rules in (mix.diffusion, mix.language) for rule in rules.values()]
    return {mix.base, *(name for rule in rules for _, name in rule)}


def _all() -> list[Target]:
    """What can be written. Types that have a mix of their name are that mix; F32 makes nothing smaller."""
    mixes = [mix for mix in MIXES.values() if all(FORMATS[name].can_quantize for name in _types_of(mix))]
    names = {mix.name for mix in mixes}
    types = [
        fmt for fmt in FORMATS.values() if fmt.can_quantize and fmt.name != "F32" and fmt.name not in names
    ]
    found = [*map(_mix, mixes), *map(_one_type, types)]
    # Of mixes with one base, those with more of larger types first: L, M, S, then the type itself.
    return sorted(found, key=lambda target: (-target.bits, "LMS".find(target.name[-1]) % 4, target.name))


GGUF: tuple[Target, ...] = tuple(_all())
