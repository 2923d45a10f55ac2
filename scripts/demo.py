#!/usr/bin/env python3
"""Show the pack at work in a real ComfyUI: the same model dense and as GGUF files, side by side.

Prepares the environment with bootstrap.py, then runs demo_run.py inside it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from bootstrap import prepare
from console import ScriptError, say


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="demo",
        description="Run one diffusion model dense and as GGUF files in a real ComfyUI, save the images and compare "
        "file size, weight memory, speed and image error. Without --model it takes a tiny model that draws "
        "handwritten digits.",
    )
    options.add_argument(
        "--comfyui", metavar="PATH", help="a ComfyUI checkout (default: $COMFYUI_PATH, else PyPI)"
    )
    options.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for images and files")
    options.add_argument("--steps", type=int, default=8)
    options.add_argument(
        "--size", type=int, default=128, metavar="PIXELS", help="width and height of the images of --model"
    )
    options.add_argument("--digits", default="0123456789", help="what to draw without --model")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--gpu", action="store_true", help="compute on the GPU (default: the CPU)")
    options.add_argument("--serve", action="store_true", help="leave ComfyUI open afterwards until Ctrl-C")
    real = options.add_argument_group("a model of your own (all three together)")
    real.add_argument("--model", type=Path, metavar="FILE", help="diffusion model, .safetensors")
    real.add_argument("--text-encoder", type=Path, metavar="FILE")
    real.add_argument("--vae", type=Path, metavar="FILE")
    real.add_argument("--text-encoder-type", default="stable_diffusion", help="as in ComfyUI's CLIPLoader")
    real.add_argument("--prompt", default="a lighthouse on a cliff at sunset, oil painting")
    return options


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    options = parser()
    found = options.parse_args(arguments)
    given = [found.model, found.text_encoder, found.vae]
    if any(given) and not all(given):
        options.error("--model, --text-encoder and --vae go together: name all three or none")
    for file in filter(None, given):
        if not file.is_file():
            options.error(f"{file} is not a file")
    if not re.fullmatch("[0-9]{1,100}", found.digits):
        options.error("--digits must be 1 to 100 digits, such as 0123456789")
    if found.steps < 2:
        options.error("--steps must be at least 2: the time per step is measured as a difference")
    return found


def main() -> int:
    options = parse()
    try:
        environment = prepare(options.comfyui)
    except ScriptError as error:
        say(f"error: {error}")
        return 1
    variables = {**os.environ, **environment.variables(), "OMP_WAIT_POLICY": "passive"}
    script = Path(__file__).with_name("demo_run.py")
    try:
        return subprocess.run([environment.python, script, *sys.argv[1:]], env=variables).returncode
    except KeyboardInterrupt:  # the child got it as well and has stopped ComfyUI
        return 130


if __name__ == "__main__":
    sys.exit(main())
