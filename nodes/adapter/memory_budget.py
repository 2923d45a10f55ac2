"""Plans the models of a workflow within a memory budget, and makes them keep to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management as management
import comfy.sample
import comfy.utils
import torch

from ...quant_backends.core.errors import SnugError
from ...quant_backends.memory.budget import (
    GIGABYTE,
    BudgetPlan,
    Component,
    Stage,
    StagePlan,
    plan_budget,
)
from ...quant_backends.memory.plan import least_limit, size_text
from .compat import supported_arguments
from .computing import ImageSize, computing_bytes, latent_shape, sampling_estimate
from .group_offload import OffloadSettings, offload_clip, offload_model
from .lora_settings import lora_settings, set_lora_settings
from .memory_budget_patcher import Allowance, is_on_gpu, warn_of_more, with_allowance
from .memory_budget_vae import Coding, is_picture_as_video, with_room
from .offload_units import BLOCK, LEAF, offload_units, other_bytes
from .patches import adapter_bytes
from .weight_formats import main_formats

# Names of the components.
MODEL, CLIP, VAE, CONTROL_NET = "model", "text encoders", "VAE", "ControlNet"


@dataclass(frozen=True, slots=True)
class Models:
    """What ComfyUI's loaders make; None for what a workflow does not have."""

    model: Any
    clip: Any = None
    vae: Any = None
    control_net: Any = None


def apply_budget(
    budget_gb: float, models: Models, size: ImageSize, latent: Mapping[str, Any] | None = None
) -> tuple[Models, str]:
    """(models of their own that together take at most `budget_gb` of GPU memory, report). The given ones are not
    changed; on a CPU they are returned as they are.

    latent: ComfyUI's LATENT that will be sampled; it goes before `size`.
    Raises SnugError when the budget is too small.
    """
    device = models.model.load_device
    on_gpu = is_on_gpu(device)
    budget, remarks = int(budget_gb * GIGABYTE), []
    if not on_gpu:
        remarks.append("ComfyUI runs on the CPU, where nothing is changed; on a GPU the plan would be:")
    elif budget > (total := int(management.get_total_memory(device))):
        budget = total
        remarks.append(f"The GPU has {size_text(total)} only, which is what is planned with.")
    here = replace(models, clip=_if_on(device, models.clip), vae=_if_on(device, models.vae))
    for name, given, planned in ((CLIP, models.clip, here.clip), (VAE, models.vae, here.vae)):
        if given is not None and planned is None:
            remarks.append(f"{name}: on another device ({given.patcher.load_device}), not planned.")
    plan = plan_budget(budget, int(management.extra_reserved_memory()), _stages(here, size, latent))
    within, notes = _within(here, plan)
    report = "\n".join([*remarks, plan.report(notes)])
    if not on_gpu:
        return models, report
    return replace(within, clip=within.clip or models.clip, vae=within.vae or models.vae), report


def _if_on(device: torch.device, model: Any) -> Any:
    """The CLIP or VAE, or None: ComfyUI may have it run elsewhere, such as on the CPU."""
    return model if model is not None and model.patcher.load_device == device else None


def _stages(models: Models, size: ImageSize, latent: Mapping[str, Any] | None) -> list[Stage]:
    stages = []
    if models.clip is not None:
        stages.append(Stage("Text encoding", _component(CLIP, models.clip.patcher), computing_bytes(0)))
    images = _images(models, size, latent)
    work = str(size)
    if latent is not None:
        work = "latent of " + " and ".join(" × ".join(map(str, image.shape)) for image in images)
    stages.append(_sampling(models, images, work))
    if models.vae is not None:
        stages.append(_decoding(models.vae, images[0].shape, work))
    return stages


def _sampling(models: Models, images: list[torch.Tensor], work: str) -> Stage:
    patcher, control = models.model, models.control_net
    noise = comfy.utils.pack_latents(images)[0] if len(images) > 1 else images[0]
    needed = sampling_estimate(patcher.model, tuple(noise.shape))
    beside = []
    if control is not None:
        needed += control.inference_memory_requirements(patcher.model_dtype())
        beside += [_component(CONTROL_NET, network, False) for network in control.get_models()]
    others = {id(model): model for model in _attached_models(patcher)}.values()
    beside += [_component("model patch", other, False) for other in others]
    factors = sum(map(adapter_bytes, patcher.patches.values()))
    if factors:  # dense weights have it merged in, unless they are streamed
        beside.append(Component("LoRA", "", factors))
    return Stage("Sampling", _component(MODEL, patcher), computing_bytes(needed), work, tuple(beside))


def _decoding(vae: Any, shape: torch.Size, work: str) -> Stage:
    if is_picture_as_video(vae, shape):
        shape = torch.Size((*shape[:2], *shape[3:]))
    coding = Coding(vae, tuple(shape))
    whole = computing_bytes(coding.nbytes)
    tiles = [(size, computing_bytes(nbytes)) for size, nbytes in coding.tiles()]
    tiles = [(size, nbytes) for size, nbytes in tiles if nbytes < whole]
    return Stage("Decoding", _component(VAE, vae.patcher, False), whole, work, tiles=tuple(tiles))


def _attached_models(patcher: Any) -> list[Any]:
    """Other models that ComfyUI loads together with this one."""
    return [*patcher.model_patches_models(), *patcher.get_nested_additional_models()]


def _component(name: str, patcher: Any, can_be_streamed: bool = True) -> Component:
    detail = ", ".join([type(patcher.model).__name__, *main_formats(patcher.model)])
    least = min(_least(patcher, level) for level in (BLOCK, LEAF)) if can_be_streamed else None
    return Component(name, detail, patcher.model_size(), least)


def _least(patcher: Any, level: str) -> int:
    """The smallest limit that group offloading accepts."""
    units = offload_units(patcher.model, level)
    if not units:
        return patcher.model_size()
    return other_bytes(patcher.model, units) + least_limit([unit.block for unit in units])


# ---- the latent that will be sampled --------------------------------------------------------------------------------


def _images(models: Models, size: ImageSize, latent: Mapping[str, Any] | None) -> list[torch.Tensor]:
    """What is sampled together, as zeros: usually one tensor, several where a model makes pictures and sound."""
    model = models.model
    if latent is None:
        return [_empty_latent(models, size)]
    samples = latent["samples"]
    known = {
        f"downscale_ratio_{name}": latent.get(f"downscale_ratio_{name}") for name in ("spacial", "temporal")
    }
    fix = comfy.sample.fix_empty_latent_channels
    samples = fix(model, samples, **supported_arguments(fix, **known))
    return samples.unbind() if samples.is_nested else [samples]


def _empty_latent(models: Models, size: ImageSize) -> torch.Tensor:
    form = models.model.get_model_object("latent_format")
    scale = None if models.vae is None else models.vae.spacial_compression_decode()
    shape = latent_shape(form, size, scale)
    if shape is None:
        raise SnugError(
            "This model makes something else than pictures, whose size width and height do not say; connect the "
            "LATENT that will be sampled to the memory budget."
        )
    return torch.empty(shape, device="meta")


# ---- keeping to the plan --------------------------------------------------------------------------------------------


def _within(models: Models, plan: BudgetPlan) -> tuple[Models, dict[str, str]]:
    """(the models with the plan applied, by component what is said about its streaming)"""
    notes: dict[str, str] = {}
    for stage in plan.stages:
        allowance = Allowance(plan.room(stage), stage.stage.other_weights)
        name = stage.stage.component.name
        if name == MODEL:
            model = _budgeted(models.model, allowance)
            warn_of_more(model, stage.computing)
            if stage.limit is not None:
                model, _ = offload_model(model, _settings(model, stage.limit))
                notes[name] = model.plan_report()  # what becomes of it on a CPU is said already
            models = replace(models, model=model)
        elif name == CLIP:
            clip = models.clip.clone()
            clip.patcher = _budgeted(clip.patcher, allowance)
            if stage.limit is not None:
                clip, _ = offload_clip(clip, _settings(clip.patcher, stage.limit))
                notes[name] = clip.patcher.plan_report()
            models = replace(models, clip=clip)
        else:
            models = replace(models, vae=_vae_within(models.vae, plan, stage, allowance))
    return models, notes


def _budgeted(patcher: Any, allowance: Allowance) -> Any:
    """With a budget no weights are kept decoded, which goes by what the card has free."""
    new = with_allowance(patcher, allowance)
    settings = lora_settings(new)
    if settings.cache:
        set_lora_settings(new, replace(settings, cache=False))
    return new


def _vae_within(vae: Any, plan: BudgetPlan, stage: StagePlan, allowance: Allowance) -> Any:
    vae = with_room(vae, plan.budget - plan.reserve - stage.weights)
    vae.patcher = with_allowance(vae.patcher, allowance)
    return vae


def _settings(patcher: Any, limit: int) -> OffloadSettings:
    """Whole blocks where they fit, as fewer copies are faster; layers otherwise."""
    return OffloadSettings(level=BLOCK if _least(patcher, BLOCK) <= limit else LEAF, limit=limit)
