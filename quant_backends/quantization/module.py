"""Quantizes any network of plain torch in place: a transformer of diffusers, a text encoder of transformers.

quantize_module(pipe.transformer, "INT8 per row", skip="default, proj_out")
write_safetensors("model.safetensors", packed_state_dict(pipe.transformer))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..core.errors import SnugError
from ..core.packed import PackedTensor
from .calibration import LayerStatistics
from .layers import LayerInfo
from .packed_layers import DATA, KINDS, PackedWeight, pack_layer
from .recipe import Recipe, make_recipe
from .target import Target

Progress = Callable[[int, int], None]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Tables that only text encoders have, by the ends of their names.
_TEXT_TABLES = ("shared.weight", "embed_tokens.weight", "token_embedding.weight", "word_embeddings.weight")


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """quantized: layer to format name; kept: layer to why. bytes_before, bytes_after: of these layers' weights."""

    quantized: Mapping[str, str]
    kept: Mapping[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        formats = Counter(self.quantized.values())
        made = ", ".join(f"{count} layers to {name}" for name, count in formats.most_common()) or "no layers"
        kept = Counter(self.kept.values())
        rest = ", ".join(f"{count} by {reason}" for reason, count in kept.most_common())
        return (
            f"{made}; {len(self.kept)} kept{f' ({rest})' if rest else ''}; "
            f"{self.bytes_before / 2**20:.1f} MB before, {self.bytes_after / 2**20:.1f} MB after"
        )


def quantize_module(
    module: torch.nn.Module,
    target: str | Target,
    skip: str = "default",
    *,
    text_encoder: bool | None = None,
    kinds: Iterable[str] = ("linear",),
    importance: Mapping[str, torch.Tensor] | None = None,
    overrides: Mapping[str, str] | None = None,
    statistics: Mapping[str, LayerStatistics] | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> ModuleReport:
    """Quantizes the layers of `module` in place, one after the other, and says what it did.

    target: a name of `targets()` or `product_targets()`. skip: regular expressions for names of layers that keep their
    precision, between commas; "default" stands for what is delicate in the architecture. text_encoder: whether its
    defaults are those of text encoders; None finds out by its tables. kinds: "linear", "conv", "embedding".
    importance, overrides, statistics: as in `Recipe`. device: where to calculate, such as "cuda"; None is where each
    weight is. progress: called with weights done and their number; it may raise to stop, which leaves the module with
    the layers that are done.

    Raises SnugError for an unknown target or pattern.
    """
    layers = list(_layers(module))
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if text_encoder is None:
        text_encoder = any(name.endswith(_TEXT_TABLES) for name in names)
    recipe = make_recipe(
        target,
        [info for info, _ in layers],
        names,
        skip=skip,
        is_text_encoder=text_encoder,
        overrides=overrides,
        importance=importance,
        kinds=kinds,
        statistics=statistics,
    )
    uses = Counter(id(layer.weight) for _, layer in layers)
    work = _Work(recipe, None if device is None else torch.device(device), uses)
    done, total = 0, sum(info.weights for info, _ in layers)
    for info, layer in layers:
        work.quantize(info, layer)
        done += info.weights
        if progress is not None:
            progress(done, total)
    return ModuleReport(work.quantized, work.kept, work.before, work.after)


@dataclass(slots=True)
class _Work:
    """uses: how many layers have the weight of an id; shared: what became of those that several have, and the old
    weight, which stays alive until then so that its id stays its own.
    """

    recipe: Recipe
    device: torch.device | None
    uses: Mapping[int, int]
    shared: dict[int, tuple[torch.Tensor, PackedTensor | None]] = field(default_factory=dict)
    quantized: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    before: int = 0
    after: int = 0

    def quantize(self, info: LayerInfo, layer: torch.nn.Module) -> None:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        if id(weight) in self.shared:
            packed = self.shared[id(weight)][1]
        else:
            packed = self._pack(info, weight)
            if self.uses[id(weight)] > 1:
                self.shared[id(weight)] = weight, packed
        if packed is None:
            self.kept[info.name] = _reason(self.recipe, info)
            return
        self.quantized[info.name] = packed.format.name
        pack_layer(layer, packed, weight.dtype)

    def _pack(self, info: LayerInfo, weight: torch.Tensor) -> PackedTensor | None:
        packed = self.recipe.quantize(info, weight.detach().to(self.device or weight.device))
        packed = None if packed is None else move(packed, weight.device)
        self.before += weight.nbytes
        self.after += weight.nbytes if packed is None else packed.nbytes
        return packed


def _reason(recipe: Recipe, info: LayerInfo) -> str:
    if info.name in recipe.overrides:
        return "choice"
    if info.kind not in recipe.kinds:
        return "kind"
    return recipe.skip.reason(info.name) or "shape"


def _layers(module: torch.nn.Module) -> Iterator[tuple[LayerInfo, torch.nn.Module]]:
    """Every layer that can hold a packed weight and has a plain one."""
    for name, layer in module.named_modules():
        if type(layer) in KINDS and layer.weight.dtype in FLOATS:  # pyright: ignore
            weight = layer._parameters["weight"]
            if weight is not None:
                yield LayerInfo(name, tuple(weight.shape), KINDS[type(layer)][0], weight.dtype), layer  # pyright: ignore


def move(packed: PackedTensor, device: torch.device) -> PackedTensor:
    """The same weight on another device."""
    parts = {name: part.to(device) for name, part in packed.parts.items()}
    return PackedTensor(packed.data.to(device), packed.format, packed.shape, parts)


def packed_state_dict(module: torch.nn.Module) -> dict[str, PackedTensor | torch.Tensor]:
    """The module's weights by the names that they had before they were quantized, for `writers` and `load_packed`."""
    packed = {name: layer.packed for name, layer in module.named_modules() if isinstance(layer, PackedWeight)}
    state: dict[str, PackedTensor | torch.Tensor] = {}
    for name, value in module.state_dict().items():
        layer, _, last = name.rpartition(".")
        if layer not in packed or not last.startswith("weight_"):
            state[name] = value
        elif last == DATA:
            state[f"{layer}.weight".lstrip(".")] = packed[layer]
    return state


def load_packed(module: torch.nn.Module, tensors: Mapping[str, PackedTensor | torch.Tensor]) -> None:
    """Puts weights, packed or not, into a module of the same architecture, which need not be quantized.

    tensors: such as the state_dict of `readers.conventions.open_quantized_safetensors`. Raises SnugError, naming it,
    for a packed weight that the module has no layer for, and for missing and foreign tensors.
    """
    layers = dict(module.named_modules())
    plain = {}
    for name, value in tensors.items():
        if not isinstance(value, PackedTensor):
            plain[name] = value
            continue
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None or not (type(layer) in KINDS or isinstance(layer, PackedWeight)):
            raise SnugError(
                f"The module has no layer for {name}; it is of another architecture than the file."
            )
        old = layer._parameters.get("weight")
        if isinstance(layer, PackedWeight):
            shape, dtype = layer.packed_shape, layer.packed_dtype
        else:
            assert old is not None
            shape, dtype = tuple(old.shape), old.dtype
        if shape != value.shape:
            raise SnugError(f"{name} has the shape {value.shape}, but the module needs {shape}.")
        pack_layer(layer, value, dtype)
    own = {
        f"{name}.{part}".lstrip(".")
        for name, layer in layers.items()
        if isinstance(layer, PackedWeight)
        for part in layer._packed_buffers()
    }
    missing, foreign = module.load_state_dict(plain, strict=False, assign=True)
    wrong = [name for name in missing if name not in own] + foreign
    if wrong:
        raise SnugError(
            f"{len(wrong)} tensors are missing or foreign, {wrong[0]} among them; it is another model."
        )
