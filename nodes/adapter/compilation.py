"""torch.compile for one MODEL: a wrapper on its patcher that lets blocks run compiled while the model is called.

Nothing is changed for good: the modules get their compiled forward when ComfyUI calls the model and lose it when
the call returns, so a clone without the wrapper, or with other settings, shares the weights and nothing else.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

from ...quant_backends.core.errors import SnugError
from .attention import ATTENTION_OPTION, compilable, ignores_options
from .compat import is_dynamic
from .compile_backends import COMPILER_ERRORS, compile_options, missing_for, sentence
from .compile_shapes import mark_block_sizes, mark_network_sizes, plain_strides
from .compiled_layers import Opaque, opaque_layers, replaced_forwards, runs_stand_in

logger = logging.getLogger("snug")

REGIONAL = "regional (repeated blocks)"
WHOLE = "whole model"
DYNAMIC = {"auto": None, "on": True, "off": False}

# How often one function may be compiled: a server runs many models and resolutions through the same code, and
# torch's own limit of 8 would leave it uncompiled after some hours, without a word.
RECOMPILE_LIMIT = 64

# What ComfyUI writes into transformer_options for each step or block. Blocks only hand it on to patches; without
# any, it would be no more than a reason to compile every block for itself.
VOLATILE_OPTIONS = frozenset(
    ("block", "block_index", "block_type", "callbacks", "cond_or_uncond", "sample_sigmas", "sigmas", "uuids")
)
PATCH_OPTIONS = ("patches", "patches_replace", ATTENTION_OPTION)


@dataclass(frozen=True)
class CompileSettings:
    """backend: of torch; mode: of inductor, without meaning for others; scope: REGIONAL or WHOLE; dynamic: a key of
    DYNAMIC; fallback: run uncompiled, with a warning, what cannot be compiled.
    """

    backend: str = "inductor"
    mode: str = "default"
    scope: str = REGIONAL
    fullgraph: bool = False
    dynamic: str = "auto"
    fallback: bool = False


def compile_model(patcher: Any, settings: CompileSettings) -> Any:
    """A clone of a MODEL that runs compiled, in place of any torch.compile setting that it has already.

    Raises SnugError when this machine lacks what the backend needs, or the model has no repeated blocks.
    """
    missing = missing_for(settings.backend, patcher.load_device)
    if missing is not None:
        if not settings.fallback:
            raise SnugError(missing)
        logger.warning("The model runs uncompiled: %s", missing)
        return patcher.clone()
    if settings.scope == REGIONAL and not repeated_blocks(patcher.model.diffusion_model):
        raise SnugError(
            f"This model ({type(patcher.model.diffusion_model).__name__}) has no repeated blocks to compile; "
            f"choose the scope '{WHOLE}'."
        )
    clone = _clone_without_dynamic_vram(patcher)
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY, CompileWrapper(settings))
    return clone


def _clone_without_dynamic_vram(patcher: Any) -> Any:
    """As ComfyUI's own node does: with dynamic VRAM models look up in each step which blocks are paged in."""
    if not is_dynamic(patcher):
        return patcher.clone()
    if patcher.cached_patcher_init is None:
        raise SnugError(
            "This model cannot be compiled while ComfyUI pages its weights (dynamic VRAM), because the node that "
            "loaded it does not say how to load it again; load it with a node of Snug or ComfyUI, or start ComfyUI "
            "with --disable-dynamic-vram."
        )
    return patcher.clone(disable_dynamic=True)


def repeated_blocks(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The blocks that a network consists of, by name: classes with two or more members in lists of layers.

    Blocks inside of blocks belong to the outer ones. In a U-Net, where the members of the outer lists differ, these
    are the transformer blocks.
    """
    members = {
        f"{name}.{key}": member
        for name, group in network.named_modules()
        if isinstance(group, torch.nn.ModuleList)
        for key, member in group.named_children()
        if _is_block(member)
    }
    counts = Counter(type(member) for member in members.values())
    blocks: dict[str, torch.nn.Module] = {}
    for name, member in members.items():  # outer lists come first
        if counts[type(member)] > 1 and not any(name.startswith(f"{block}.") for block in blocks):
            blocks[name] = member
    return blocks


def _is_block(module: torch.nn.Module) -> bool:
    """Whether a member of a list is a unit that is worth compiling: a class of its own around several layers."""
    containers = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)
    layers = sum(hasattr(layer, "comfy_cast_weights") for layer in module.modules())
    return not isinstance(module, containers) and layers > 1


class CompiledForward:
    """The forward of one module while its model is called: compiled, and compiled once for all modules of a class."""

    def __init__(self, module: torch.nn.Module, wrapper: CompileWrapper, is_block: bool) -> None:
        self.module = module
        self.wrapper = wrapper
        self.is_block = is_block
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]
        self.compiled = wrapper.compiled(type(module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrapper.failed:
            try:
                return self._run(args, kwargs)
            except COMPILER_ERRORS as error:
                self.wrapper.give_up(error, type(self.module).__name__)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = [*zip_longest(self.names[: len(args)], args, fillvalue=""), *kwargs.items()]
        stable = [(name, self._stable(name, value)) for name, value in named]
        if self.wrapper.settings.dynamic == "auto":
            (mark_block_sizes if self.is_block else mark_network_sizes)(stable)
        positional = [value for _, value in stable[: len(args)]]
        return self.compiled(self.module, *positional, **dict(stable[len(args) :]))

    def _stable(self, name: str, value: Any) -> Any:
        """An argument with what never matters, or never changes, made so for the compiler too."""
        if name == "transformer_options":
            return _traceable_options(value, self.is_block)
        return plain_strides(value) if self.is_block and isinstance(value, torch.Tensor) else value


def _traceable_options(options: dict[str, Any], is_block: bool) -> dict[str, Any]:
    """transformer_options without what would be compiled into the code for nothing."""
    patches = [options[name] for name in PATCH_OPTIONS if options.get(name)]
    if is_block and all(map(ignores_options, patches)):  # others may look at everything
        options = {name: value for name, value in options.items() if name not in VOLATILE_OPTIONS}
    return {ATTENTION_OPTION: _traceable_attention, **options}


def _traceable_attention(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """ComfyUI's attention, except where it divides its work by the free memory, which cannot be compiled."""
    return compilable(function)(*args, **kwargs)


def _guards_to_keep(entries: Sequence[Any]) -> list[bool]:
    """All but those on the class of a layer that runs its stand-in.

    Each load has classes of its own, and the same model would be compiled again whenever it is loaded.
    """
    return [entry.guard_type != "TYPE_MATCH" or not runs_stand_in(entry.value) for entry in entries]


class _Parts(NamedTuple):
    """Of one model: the modules that run compiled and the layers inside them."""

    compiled: list[CompiledForward]
    layers: list[Opaque]


class CompileWrapper:
    """The APPLY_MODEL wrapper. failed: compiling went wrong and everything runs uncompiled from now on."""

    def __init__(self, settings: CompileSettings) -> None:
        self.settings = settings
        self.failed = False
        self._functions: dict[type, Callable[..., Any]] = {}
        # By model, since clones can carry the wrapper to another one (without dynamic VRAM, on another GPU).
        self._parts: weakref.WeakKeyDictionary[torch.nn.Module, _Parts] = weakref.WeakKeyDictionary()

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        if self.failed:
            return executor(*args, **kwargs)
        parts = self._parts_of(executor.class_obj)
        with replaced_forwards(parts.layers), _compiled_forwards(parts.compiled), _recompile_limit():
            return executor(*args, **kwargs)

    def compiled(self, cls: type) -> Callable[..., Any]:
        """The compiled forward of a class of modules, which takes the module as its first argument."""
        if cls not in self._functions:
            settings = self.settings
            self._functions[cls] = torch.compile(
                cls.forward,  # type: ignore[attr-defined]
                backend=settings.backend,
                options=compile_options(settings.backend, settings.mode, _guards_to_keep),
                fullgraph=settings.fullgraph,
                dynamic=DYNAMIC[settings.dynamic],
            )
        return self._functions[cls]

    def give_up(self, error: Exception, what: str) -> None:
        """Lets the model run uncompiled if the user wants that, else raises SnugError with the reason."""
        problem = sentence(error, self.settings.backend, what, self.settings.fullgraph)
        if not self.settings.fallback:
            raise SnugError(problem) from error
        if not self.failed:
            logger.warning("The model runs uncompiled: %s", problem)
        self.failed = True

    def _parts_of(self, model: Any) -> _Parts:
        if model not in self._parts:
            network = model.diffusion_model
            regional = self.settings.scope == REGIONAL
            modules = list(repeated_blocks(network).values()) if regional else [network]
            self._parts[model] = _Parts(
                [CompiledForward(module, self, regional) for module in modules],
                [layer for module in modules for layer in opaque_layers(module)],
            )
        return self._parts[model]


@contextmanager
def _compiled_forwards(compiled: list[CompiledForward]) -> Iterator[None]:
    replaced: list[torch.nn.Module] = []
    try:
        for forward in compiled:
            if "forward" not in forward.module.__dict__:  # else another node runs this block in its own way
                forward.module.__dict__["forward"] = forward
                replaced.append(forward.module)
        yield
    finally:
        for module in replaced:
            del module.__dict__["forward"]


@contextmanager
def _recompile_limit() -> Iterator[None]:
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before torch 2.6
    with config.patch({name: max(getattr(config, name), RECOMPILE_LIMIT)}):
        yield
