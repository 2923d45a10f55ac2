"""Trains the tiny model that draws digits.

Run it with the Python that ComfyUI runs with; it also needs scikit-learn, whose handwritten digits it learns from. The
committed weights, tests/assets/digits-wan.safetensors, are what these made, in 12 minutes of one processor core:

    python scripts/train_digits.py --comfyui PATH --out first.safetensors
    python scripts/train_digits.py --comfyui PATH --start first.safetensors --steps 1000 --seed 1 --out FILE

Afterwards it draws digits with the file and says how many a classifier recognises.
"""

from __future__ import annotations

import argparse
import importlib
import time
import warnings
from pathlib import Path

import torch
from digits import CLASSES, Judge, latents, real_digits
from digits.drawing import draw
from digits.network import Training, stored, train
from digits.vae import decode
from safetensors.torch import load_file, save_file
from tiny import use_comfyui

EVERY = 100


class Progress:
    """Prints the mean loss of each hundred steps."""

    def __init__(self, steps: int) -> None:
        self.steps, self.started, self.losses = steps, time.monotonic(), []

    def __call__(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        if step % EVERY == 0 or step == self.steps:
            mean = sum(self.losses) / len(self.losses)
            print(
                f"step {step} of {self.steps}: loss {mean:.4f}, {time.monotonic() - self.started:.0f} s",
                flush=True,
            )
            self.losses.clear()


def accuracy(path: Path, each: int = 20) -> float:
    """Share of digits drawn with the file, `each` of every class, that a classifier of real ones recognises."""
    pixels, classes = real_digits()
    judge = Judge(decode(latents(pixels)), classes)
    model = importlib.import_module("comfy.sd").load_diffusion_model(str(path))
    wanted = torch.arange(CLASSES).repeat(each)
    return judge.accuracy(decode(draw(model, wanted.tolist())), wanted)


def main() -> None:
    defaults = Training()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comfyui", required=True, type=Path, help="folder of a ComfyUI checkout")
    parser.add_argument("--out", required=True, type=Path, help="the .safetensors file to write")
    parser.add_argument("--start", type=Path, help="weights of an earlier training to go on with")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    options = parser.parse_args()

    use_comfyui(options.comfyui)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
    settings = Training(steps=options.steps, seed=options.seed)
    start = load_file(options.start) if options.start else None
    weights = stored(train(settings, Progress(options.steps), start))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, options.out, metadata={"format": "pt"})
    count = sum(tensor.numel() for tensor in weights.values())
    print(f"{options.out}: {count / 1e6:.1f} M parameters, {options.out.stat().st_size / 1e6:.1f} MB")
    print(f"{100 * accuracy(options.out):.1f} % of the digits it draws are recognised")


if __name__ == "__main__":
    main()
