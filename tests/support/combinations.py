"""The features that may be put on one MODEL together: how each is applied, and what its result has to equal.

What a combination has to equal is made by ComfyUI alone: a dense model of the same weights, rounded by torch's own cast
where layerwise casting rounds them, with the LoRA merged by ComfyUI. Compiling and offloading change nothing.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from lora_files import generic_names, random_factors
from workflows import SETUPS


def cast(patcher: Any, storage: str) -> Any:
    """Every layer that is not quantized, also those that the node leaves alone by default."""
    from snug.nodes.adapter.layerwise_casting import cast_model

    return cast_model(patcher, storage, "auto", "")[0]


def compiled(patcher: Any, settings: Mapping[str, Any]) -> Any:
    from snug.nodes.adapter.compilation import CompileSettings, compile_model

    return compile_model(patcher, CompileSettings(**settings))


def with_lora(patcher: Any, strength: float) -> Any:
    """A LoRA for every matrix, as core's loader node applies it; the same for all models of a family."""
    import comfy.sd

    shapes = {
        name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in patcher.model.named_parameters()
        if name.endswith(".weight") and weight.dim() == 2
    }
    lora = generic_names(random_factors(shapes, rank=8), "")
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0)
    assert len(patched.patches) == len(shapes)
    return patched


def offloaded(patcher: Any, settings: Mapping[str, Any]) -> Any:
    from snug.nodes.adapter.group_offload import OffloadSettings, offload_model

    return offload_model(patcher, OffloadSettings(**settings))[0]


class Feature(NamedTuple):
    """apply: (patcher, setting) to a patcher with it; settings: two that can be told apart if it changes results."""

    apply: Callable[[Any, Any], Any]
    settings: tuple[Any, Any]


FEATURES: dict[str, Feature] = {
    "casting": Feature(cast, ("float8_e4m3fn per row", "float8_e5m2")),
    "offload": Feature(
        offloaded, ({"level": "block"}, {"level": "leaf", "blocks_per_group": 3, "prefetch": 2})
    ),
    "compile": Feature(compiled, ({"backend": "aot_eager"}, {"backend": "eager", "dynamic": "on"})),
    "lora": Feature(with_lora, (0.8, -0.5)),
}
# Whatever else there is has to give the result of the model without it.
CHANGING = ("casting", "lora")
ALONE = [(name,) for name in FEATURES]
PAIRS = list(itertools.combinations(FEATURES, 2))
ORDERED_PAIRS = list(itertools.permutations(FEATURES, 2))


def with_features(patcher: Any, features: Iterable[str], setting: int = 0) -> Any:
    """The model behind the nodes of `features`, in this order; setting: which one of each feature's settings."""
    for name in features:
        patcher = FEATURES[name].apply(patcher, FEATURES[name].settings[setting])
    return patcher


def sample(patcher: Any, family: str, steps: int = 2, seed: int = 3) -> torch.Tensor:
    """A latent from ComfyUI's own sampling, which loads the model as a workflow would."""
    import comfy.sample

    setup = SETUPS[family]
    generator = torch.Generator().manual_seed(1)

    def conditioning() -> list[Any]:
        text = torch.randn(1, 16, setup.embedding[1], generator=generator)
        return [
            [
                text,
                {"pooled_output": torch.randn(1, setup.pooled, generator=generator)} if setup.pooled else {},
            ]
        ]

    latent = torch.zeros(1, patcher.model.latent_format.latent_channels, 8, 8)
    return comfy.sample.sample(
        patcher,
        torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed)),
        steps,
        4.0,
        "euler",
        "simple",
        conditioning(),
        conditioning(),
        latent,
        disable_pbar=True,
        seed=seed,
    )


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """L2 norm of the difference over the norm of what was wanted."""
    return ((found - wanted).norm() / wanted.norm()).item()


class Bench:
    """The models of one file: the one that features are put on, and what ComfyUI makes of the same weights.

    load, load_reference: make both, each time anew. before, state: a latent of the plain model, and what it is.
    """

    def __init__(self, family: str, load: Callable[[], Any], load_reference: Callable[[], Any]) -> None:
        self.family = family
        self.plain = load()
        self.before = sample(self.plain, family)
        self.state = state_of(self.plain)
        self._load_reference = load_reference
        self._references: dict[Any, Any] = {}
        self._expected: dict[Any, torch.Tensor] = {}

    def reference(self, features: Iterable[str], setting: int = 0) -> Any:
        """The model of ComfyUI alone that one with these features must equal."""
        key = self._key(features, setting)
        if key not in self._references:
            reference = self._load_reference()
            for name in key[:-1]:
                if name == "casting":
                    self._round(reference, FEATURES[name].settings[setting])
                else:
                    reference = with_lora(reference, FEATURES[name].settings[setting])
            self._references[key] = reference
        return self._references[key]

    def expected(self, features: Iterable[str], setting: int = 0) -> torch.Tensor:
        """Its latent."""
        key = self._key(features, setting)
        if key not in self._expected:
            self._expected[key] = sample(self.reference(features, setting), self.family)
        return self._expected[key]

    def check_undone(self) -> None:
        """The plain model samples as it did before, and is what it was."""
        assert torch.equal(sample(self.plain, self.family), self.before)
        changed = state_of(self.plain) ^ self.state
        assert not changed, sorted(changed, key=repr)[:8]

    def _key(self, features: Iterable[str], setting: int) -> tuple[Any, ...]:
        return (*(name for name in CHANGING if name in features), setting)

    def _round(self, reference: Any, storage: str) -> None:
        for name in _packed_anew(self.plain.model, cast(self.plain, storage).model):
            layer = reference.model.get_submodule(name)
            layer.weight = torch.nn.Parameter(rounded(layer.weight.detach(), storage), requires_grad=False)


def rounded(weight: torch.Tensor, storage: str) -> torch.Tensor:
    """What layerwise casting makes of a weight, by torch's own cast."""
    dtype = getattr(torch, storage.split()[0])
    if "row" not in storage:
        return weight.to(dtype).to(weight.dtype)
    largest = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.dim() - 1))
    scale = largest / torch.finfo(dtype).max
    return (weight / scale).to(dtype).to(weight.dtype) * scale


def _packed_anew(before: torch.nn.Module, after: torch.nn.Module) -> list[str]:
    """Names of the layers whose weight is in another format than before."""
    from snug.nodes.adapter.packed_module import packed_modules

    formats = [
        {(name, m.weight.params.format) for name, m in packed_modules(model)} for model in (before, after)
    ]
    return [name for name, _ in formats[1] - formats[0]]


# What a model that was sampled may remember: in which order its blocks ran.
_MEMORIES = ("snug_execution_order",)


def state_of(patcher: Any) -> set[Any]:
    """Whatever a feature could leave behind in a model that is not loaded: the class of each module, its attributes
    and hooks, and every bit of its tensors.
    """
    patcher.detach()
    state: set[Any] = set()
    for name, module in patcher.model.named_modules():
        state.add((name, type(module)))
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            state.add((name, key, _content(tensor)))
        for key, value in vars(module).items():
            if key not in _MEMORIES and value is not getattr(type(module), key, None):
                state.add((name, key, len(value) if key.endswith("_hooks") else None))
    return state


def _content(tensor: Any) -> Any:
    if tensor is None:
        return None
    data = getattr(tensor, "_qdata", tensor).detach().contiguous().flatten().view(torch.uint8)
    return type(tensor), tensor.dtype, tensor.device, zlib.crc32(data.numpy())
