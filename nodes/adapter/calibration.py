"""Calibrating a MODEL or CLIP: ComfyUI's own sampler or encoder runs, and what reaches the layers is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

from ...quant_backends.core.errors import SnugError
from ...quant_backends.core.version import pack_version
from ...quant_backends.quantization.calibration import Calibration, load_calibration, save_calibration
from ...quant_backends.quantization.recording import Recorder
from .folders import CALIBRATIONS, new_calibration_path
from .sampling import Sampling, sample
from .sensitivity import sensitivity_while

# How many layers the report names.
_NAMED = 5


@dataclass(frozen=True, slots=True)
class Keep:
    """What becomes of a result. save_as: name of the file, "" for none; previous: what it is added to."""

    save_as: str = ""
    previous: Calibration | None = None


def calibrate_model(
    patcher: Any,
    positives: Sequence[Any],
    negative: Any,
    latent: dict[str, Any],
    sampling: Sampling,
    keep: Keep,
    sensitivity: bool = False,
) -> tuple[Calibration, str]:
    """(calibration, report) of sampling once for each of `positives` (CONDITIONING), each with a seed of its own.

    The layers run as always, whatever their weights are packed in and with the LoRAs of the model; only compiling is
    left out, as compiled layers are not called one by one. Stops when the user cancels; nothing of the recording stays
    on the model. sensitivity: also measure how much the output depends on each layer, which takes three more calls of
    the network for each. Raises SnugError.
    """
    clone = patcher.clone()
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY)
    network = clone.model.diffusion_model
    bar = comfy.utils.ProgressBar(len(positives) * sampling.steps)
    recorder = Recorder(network, clone.load_device)
    with _counted(network) as calls:
        for number, positive in enumerate(positives):
            with recorder:
                _sample(clone, positive, negative, latent, sampling, number, bar)
    samples = len(positives)
    info: dict[str, Any] = {"model": type(clone.model).__name__, "sampling": asdict(sampling)}
    if sensitivity:  # in a pass of its own: layers that are disturbed have other inputs

        def sample_once() -> None:
            _sample(clone, positives[0], negative, latent, sampling, 0, bar)

        info["sensitivity"] = sensitivity_while(sample_once, network, sampling.steps)
    return _finish(recorder, keep, calls[0], samples=samples, steps=samples * sampling.steps, **info)


def calibrate_clip(clip: Any, prompts: str, keep: Keep) -> tuple[Calibration, str]:
    """(calibration, report) of encoding the lines of `prompts`; layers by their names in the CLIP's model."""
    lines = [line for line in prompts.splitlines() if line.strip()]
    if not lines:
        raise SnugError("There is no prompt to calibrate with; write at least one line.")
    clone = clip.clone()
    model = clone.cond_stage_model
    bar = comfy.utils.ProgressBar(len(lines))
    recorder = Recorder(model, clone.patcher.load_device)
    with recorder:
        for line in lines:
            comfy.model_management.throw_exception_if_processing_interrupted()
            clone.encode_from_tokens_scheduled(clone.tokenize(line))
            bar.update(1)
    info = {"model": type(model).__name__}
    return _finish(recorder, keep, len(lines), samples=len(lines), steps=len(lines), **info)


def open_calibration(name: str) -> tuple[Calibration, str]:
    """(calibration, report) of a saved file, by its name in the list. Raises SnugError."""
    calibration = load_calibration(Path(CALIBRATIONS.find(name)))
    return calibration, describe(calibration)


def describe(calibration: Calibration, idle: Sequence[str] = ()) -> str:
    """For people. idle: layers that did not run."""
    info, layers = calibration.info, calibration.layers
    counts = ", ".join(f"{info[key]} {key}" for key in ("samples", "steps", "calls") if key in info)
    lines = [f"{len(layers)} layers of {info.get('model', 'a model')} recorded ({counts or 'no counts'})"]
    if idle:
        more = "" if len(idle) <= _NAMED else f" and {len(idle) - _NAMED} more"
        lines.append(f"{len(idle)} layers did not run: {', '.join(idle[:_NAMED])}{more}")
    if calibration.sensitivity:
        most = sorted(calibration.sensitivity.items(), key=lambda item: -item[1])[:_NAMED]
        lines.append("the image depends most on: " + ", ".join(name for name, _ in most))
    outliers = sorted(((_peak(found.absmax), name) for name, found in layers.items()), reverse=True)
    lines.append(
        "largest inputs beside the layer's typical channel (the more, the harder for 8-bit activations):"
    )
    for factor, name in outliers[:_NAMED]:
        least, largest = layers[name].range.tolist()
        lines.append(f"  {factor:.0f} times: {name}, {least:.4g} to {largest:.4g}")
    return "\n".join(lines)


def _peak(absmax: torch.Tensor) -> float:
    """The largest channel over the median one."""
    return (absmax.amax() / absmax.median().clamp_min(1e-12)).item()


def _sample(
    patcher: Any,
    positive: Any,
    negative: Any,
    latent: dict[str, Any],
    sampling: Sampling,
    number: int,
    bar: Any,
) -> None:
    def on_step(step: int, *_: Any) -> None:
        bar.update_absolute(number * sampling.steps + step + 1)

    sample(patcher, positive, negative, latent, sampling, on_step, number)


@contextmanager
def _counted(network: torch.nn.Module) -> Any:
    """A list whose one number is how often the network has been called inside the block."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    handle = network.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


def _finish(recorder: Recorder, keep: Keep, calls: int, **info: Any) -> tuple[Calibration, str]:
    calibration = recorder.calibration(calls=calls, version=pack_version(), **info)
    idle = recorder.idle
    if keep.previous is not None:
        calibration = keep.previous.joined(calibration)
        idle = [name for name in idle if name not in calibration.layers]
    report = describe(calibration, idle)
    if keep.save_as.strip():
        path = new_calibration_path(keep.save_as)
        try:
            save_calibration(calibration, Path(path))
        except OSError as error:
            raise SnugError(
                f"The calibration could not be saved as {path} ({error.strerror or error}); free space there, or "
                f"leave save_as empty."
            ) from error
        report += f"\nsaved as {path}"
    return calibration, report
