"""Models against each other: each samples the same latent several times, with nothing else loaded."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapter.sampling import Sampling
from ..adapter.timed_sampling import (
    OUT_OF_MEMORY,
    Timing,
    loaded_bytes,
    sample_timed,
    step_counter,
    unload_everything,
)
from ..adapter.weight_formats import main_formats
from ..telemetry.process import telemetry
from .image_metrics import WINDOW, psnr, ssim


@dataclass(frozen=True, slots=True)
class Plan:
    """runs: that count, of each model; warmup: runs before them that do not."""

    sampling: Sampling
    runs: int = 3
    warmup: int = 1


@dataclass(slots=True)
class Row:
    """What was measured of one model. Seconds and bytes.

    device: that it computes on. loading, first_step: of the first run of all, warm-up or not. weights: on the device,
    as ComfyUI counts them. memory: in use on the device after loading; peak: the most in use there until the last run
    ended. steps: of the runs that count, without the first of each run (but where there is no other). totals: of whole
    runs. error: of the latent against the first model's, relative (L2 norms); psnr in dB and ssim likewise of the
    pictures. None: not measured, and psnr also where pictures are identical. is_finite: whether all numbers of the
    latent are, without which nothing is compared. problem: why there are no figures.
    """

    caption: str
    formats: list[str]
    device: str
    loading: float | None = None
    weights: int | None = None
    memory: int | None = None
    peak: int | None = None
    first_step: float | None = None
    steps: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    error: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    is_finite: bool = True
    problem: str = ""

    @property
    def step(self) -> float | None:
        """The median step."""
        return statistics.median(self.steps) if self.steps else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """The quartiles of the steps, between which half of them are."""
        if len(self.steps) < 2:
            return None
        low, _, high = statistics.quantiles(self.steps, n=4, method="inclusive")
        return low, high

    @property
    def compiling(self) -> float | None:
        """What the first step of all took more than the median one."""
        if self.first_step is None or self.step is None:
            return None
        return max(0.0, self.first_step - self.step)


def benchmark(
    models: Sequence[tuple[str, Any]],
    prompts: tuple[Any, Any],
    latent: dict[str, Any],
    plan: Plan,
    vae: Any = None,
) -> tuple[list[Row], dict[str, Any]]:
    """(a row for each model, LATENT: a batch of what those made whose latents have the first one's shape).

    models: caption (empty: the model's formats) and MODEL. prompts: positive and negative CONDITIONING. vae: decodes
    the latents when all models are done. Shows progress; stops when the user cancels. A model for which the device's
    memory does not suffice gets a row that says so; other errors end it.
    """
    counted = step_counter(len(models) * (plan.warmup + plan.runs) * plan.sampling.steps)
    rows, found = [], []
    for caption, patcher in models:
        formats = main_formats(patcher.model)
        row = Row(caption or _caption(formats), formats, str(patcher.load_device))
        unload_everything()
        try:
            found.append(_run(row, patcher, prompts, latent, plan, counted))
        except OUT_OF_MEMORY:
            row.problem = "out of memory"
            found.append(None)
        rows.append(row)
    unload_everything()
    _compare(rows, found, vae)
    alike = [samples for samples in found if samples is not None and _same_shape(samples, found[0])]
    batch = {key: value for key, value in latent.items() if key not in ("noise_mask", "batch_index")}
    return rows, {**batch, "samples": torch.cat(alike)} if alike else latent


def _caption(formats: Sequence[str]) -> str:
    """What a model is quantized to, or the dtype of one that is not."""
    return ", ".join([name for name in formats if not hasattr(torch, name)] or formats)


def _run(
    row: Row, patcher: Any, prompts: tuple[Any, Any], latent: dict[str, Any], plan: Plan, counted: Any
) -> torch.Tensor:
    known = telemetry()

    def loaded() -> None:
        if row.weights is None:
            counter = known.read().get(row.device)
            row.weights, row.memory = loaded_bytes(patcher), counter.current if counter else None

    samples = None
    with known.peaks() as peaks:
        for number in range(plan.warmup + plan.runs):
            samples, timing = sample_timed(patcher, prompts, latent, plan.sampling, loaded, counted)
            _note(row, timing, is_first=number == 0, counts=number >= plan.warmup)
    row.peak = peaks.get(row.device)
    assert samples is not None
    return samples.cpu()


def _note(row: Row, timing: Timing, is_first: bool, counts: bool) -> None:
    if is_first:
        row.loading, row.first_step = timing.loading, timing.steps[0]
    if counts:
        row.steps += timing.steps[1:] or timing.steps
        row.totals.append(timing.total)


def _compare(rows: Sequence[Row], found: Sequence[torch.Tensor | None], vae: Any) -> None:
    """Puts the quality against the first model into the rows."""
    for row, samples in zip(rows, found, strict=True):
        row.is_finite = samples is None or bool(samples.isfinite().all())
    reference = found[0]
    if reference is None or not rows[0].is_finite:
        return
    picture = _decoded(vae, reference) if vae is not None else None
    for row, samples in zip(rows[1:], found[1:], strict=True):
        if samples is None or not row.is_finite or not _same_shape(samples, reference):
            continue
        row.error = float((samples - reference).norm() / reference.norm().clamp_min(1e-12))
        if picture is None:
            continue
        other = _decoded(vae, samples)
        # One figure for the batch: that of all pixels.
        decibels = float(psnr(other.flatten(0, 1)[None], picture.flatten(0, 1)[None]))
        row.psnr = decibels if decibels != float("inf") else None
        if min(picture.shape[1:3]) >= WINDOW:
            row.ssim = float(ssim(other, picture).mean())


def _decoded(vae: Any, samples: torch.Tensor) -> torch.Tensor:
    """[pictures or frames, height, width, 3], as ComfyUI's VAEDecode makes it."""
    pictures = vae.decode(samples)
    return pictures.reshape(-1, *pictures.shape[-3:]).float().cpu()


def _same_shape(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    return b is not None and a.shape == b.shape


def as_data(row: Row) -> Mapping[str, Any]:
    """For JSON: all numbers, with the figures that tables show."""
    fields = {name: getattr(row, name) for name in Row.__slots__}
    return {**fields, "step": row.step, "spread": row.spread, "compiling": row.compiling}
