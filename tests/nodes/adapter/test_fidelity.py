"""Pictures that can be looked at: a trained tiny model draws digits, dense and quantized; a classifier reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digits import (
    CLASSES,
    LATENT,
    PICTURE,
    TEXT_ENCODER_TYPE,
    WEIGHTS,
    Judge,
    latents,
    make_digits_text_encoder,
    make_digits_vae,
    prompts,
    real_digits,
)
from digits.drawing import draw, draw_prompts
from digits.vae import decode
from narrow_models import accept_small_t5, node_module

# Of every class; enough to tell 90 % from 80 % of them.
EACH = 10
WANTED = torch.arange(CLASSES).repeat(EACH)


class Drawn:
    """What the dense model drew, and the classifier that reads it."""

    def __init__(self, patcher: Any) -> None:
        pixels, classes = real_digits()
        self.patcher = patcher
        self.judge = Judge(decode(latents(pixels)), classes)
        self.pictures = decode(draw(patcher, WANTED.tolist()))
        self.accuracy = self.judge.accuracy(self.pictures, WANTED)

    def quantized(self, target: str) -> tuple[float, float, float]:
        """Accuracy, PSNR in dB over all pictures, and mean SSIM of a format against the dense model."""
        from snug.nodes.adapter.quantizing import QuantizeSettings, quantize_model
        from snug.nodes.measure.image_metrics import psnr, ssim

        patcher, _ = quantize_model(self.patcher, QuantizeSettings(target))
        pictures = decode(draw(patcher, WANTED.tolist()))
        ratio = psnr(pictures.flatten(0, 1)[None], self.pictures.flatten(0, 1)[None]).item()
        return self.judge.accuracy(pictures, WANTED), ratio, ssim(pictures, self.pictures).mean().item()


@pytest.fixture(scope="module")
def drawn(comfy: Any) -> Drawn:
    return Drawn(comfy.sd.load_diffusion_model(str(WEIGHTS)))


def test_the_file_is_small_and_what_k_quants_pack() -> None:
    from safetensors import safe_open

    assert WEIGHTS.stat().st_size <= 8_000_000
    with safe_open(WEIGHTS, "pt") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        matrices = {name: part for name, part in tensors.items() if len(part.get_shape()) == 2}
    assert {part.get_dtype() for part in tensors.values()} == {"F16"}
    assert all(part.get_shape()[1] % 256 == 0 for part in matrices.values())


def test_the_classifier_reads_digits_it_has_not_seen() -> None:
    pixels, classes = real_digits()
    pictures = decode(latents(pixels))
    judge = Judge(pictures[::2], classes[::2])
    assert judge.accuracy(pictures[1::2], classes[1::2]) > 0.97
    assert judge.accuracy(torch.rand(200, PICTURE, PICTURE, 3), classes[:200]) < 0.3


def test_the_dense_model_draws_what_it_is_asked_for(drawn: Drawn) -> None:
    assert drawn.accuracy >= 0.9
    # The digit comes from the prompt, not from the noise.
    others = draw(drawn.patcher, ((WANTED + 1) % CLASSES).tolist())
    assert drawn.judge.accuracy(decode(others), WANTED) < 0.1


def test_q8_0_is_almost_identical(drawn: Drawn) -> None:
    accuracy, ratio, similarity = drawn.quantized("GGUF Q8_0")
    assert abs(accuracy - drawn.accuracy) <= 0.02
    assert ratio > 45 and similarity > 0.999


@pytest.mark.parametrize("target", ["GGUF Q4_K", "bitsandbytes NF4"])
def test_four_bits_are_read_as_well(drawn: Drawn, target: str) -> None:
    accuracy, ratio, similarity = drawn.quantized(target)
    assert accuracy >= drawn.accuracy - 0.05
    assert ratio > 25 and 0.95 < similarity < 0.9999


def test_two_bits_show(drawn: Drawn) -> None:
    """The figures above could not fail, if this did."""
    _, ratio, similarity = drawn.quantized("GGUF Q2_K")
    assert ratio < 30 and similarity < 0.98


def test_comfyui_decodes_what_the_formula_says(comfy: Any, tmp_path: Path) -> None:
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(make_digits_vae(tmp_path / "vae.safetensors"))))
    values = latents(real_digits()[0][:2]) + 0.5 * torch.randn(
        2, *LATENT, generator=torch.Generator().manual_seed(1)
    )
    pictures = vae.decode(values).flatten(0, 1)
    assert pictures.shape == (2, PICTURE, PICTURE, 3)
    assert (pictures - decode(values)).abs().max() < 0.01  # its weights are bfloat16
    # What was drawn in black and white comes back through the encoder, as one frame.
    blocks = torch.zeros(1, 8, 8)
    blocks[:, 2:6, 2:6] = 1
    found = vae.encode(decode(latents(blocks)))
    assert (found[:, 0, :, 3:5, 3:5] > 1.5).all() and (found[..., 0, :] < -1.5).all()


@pytest.mark.parametrize("quantize", ["as in the file", "bitsandbytes NF4"])
def test_prompts_go_through_a_text_encoder(
    quantize: str, drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A T5 of ComfyUI's own, quantized as it is loaded: digits are read off what is drawn for "0" to "9"."""
    from snug.nodes.adapter.text_encoders import load_text_encoders

    accept_small_t5(monkeypatch)
    path = make_digits_text_encoder(tmp_path / "digits-t5.safetensors")
    assert path.stat().st_size <= 8_000_000
    clip = load_text_encoders([str(path)], TEXT_ENCODER_TYPE, quantize=quantize)
    wanted = WANTED.tolist()
    ((positive, _),) = node_module("digits").SnugTestDigits().encode(clip, "".join(map(str, wanted)))[0]
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))[0][0]
    assert (positive[7] - prompts([7]).repeat(1, 3, 1)[0]).square().mean() < 0.1**2
    accuracy = drawn.judge.accuracy(decode(draw_prompts(drawn.patcher, positive, negative)), WANTED)
    assert accuracy >= drawn.accuracy - 0.05
