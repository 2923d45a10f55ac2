"""Writes tiny real models: `python scripts/tiny_models.py --comfyui PATH --family sd15 --out FILE`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tiny import FAMILIES, make_tiny_model, use_comfyui


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", required=True, type=Path, help="folder of a ComfyUI checkout")
    parser.add_argument("--family", required=True, action="append", choices=sorted(FAMILIES))
    parser.add_argument("--out", required=True, type=Path, help="file, or a folder for <family>.safetensors")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if len(options.family) > 1 and options.out.suffix:
        parser.error("--out must be a folder when several families are asked for")

    use_comfyui(options.comfyui)
    for family in options.family:
        path = options.out if options.out.suffix else options.out / f"{family}.safetensors"
        shapes = make_tiny_model(family, path, options.seed)
        weights = sum(shape.numel() for shape in shapes.values())
        print(f"{path}: {weights / 1e6:.1f} M parameters, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
