"""Writes tiny real models: `python scripts/tiny_models.py --comfyui PATH --family sd15 --out FILE`.

Run it with the Python that ComfyUI runs with. --family and --vae may be repeated; then --out is a folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tiny import FAMILIES, TINY_VAES, make_tiny_lora, make_tiny_model, make_tiny_vae, use_comfyui


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comfyui", required=True, type=Path, help="folder of a ComfyUI checkout")
    parser.add_argument("--family", action="append", default=[], choices=sorted(FAMILIES))
    parser.add_argument("--vae", action="append", default=[], choices=sorted(TINY_VAES), help="TAESD pair")
    parser.add_argument("--lora", action="store_true", help="also write <model>-lora.safetensors beside it")
    parser.add_argument("--out", required=True, type=Path, help="a .safetensors file, or a folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    is_file = options.out.suffix == ".safetensors"
    if is_file and (len(options.family) != 1 or options.vae):
        parser.error("--out must be a folder unless exactly one --family is asked for")

    use_comfyui(options.comfyui)
    for family in options.family:
        path = options.out if is_file else options.out / f"{family}.safetensors"
        shapes = make_tiny_model(family, path, options.seed)
        weights = sum(shape.numel() for shape in shapes.values())
        print(f"{path}: {weights / 1e6:.1f} M parameters, {path.stat().st_size / 1e6:.1f} MB")
        if options.lora:
            lora = path.with_name(f"{path.stem}-lora.safetensors")
            changed = make_tiny_lora(path, lora, seed=options.seed)
            print(f"{lora}: {len(changed)} layers, {lora.stat().st_size / 1e6:.1f} MB")
    for name in options.vae:
        for path in make_tiny_vae(options.out, name, options.seed):
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
