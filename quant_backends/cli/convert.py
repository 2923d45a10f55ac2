"""`snug convert IN OUT`: the same weights in another container."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..core.packed import PackedTensor
from ..memory.plan import size_text
from .console import note, progress
from .opening import Weight, check_target, decoded, open_model, spilled
from .text_encoders import add_tokenizer_option
from .writing import check_encoder, holds, source_description, write_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "convert",
        help="the same weights in another container: .gguf or .safetensors",
        description=(
            "Writes the weights of a file or folder into another container. Weights that the container can hold as "
            "they are keep every bit (GGUF types in .gguf; NF4, FP4, INT8, FP8, quanto and torchao in .safetensors); "
            "others are decoded. Nothing is quantized: that is what quantize does."
        ),
    )
    parser.add_argument("input", metavar="IN", help="a .gguf or .safetensors file, or a folder of diffusers")
    parser.add_argument("output", metavar="OUT", help="the .gguf or .safetensors file to write")
    parser.add_argument(
        "--decode-to",
        choices=DTYPES,
        default="bf16",
        help="what weights are decoded to that OUT cannot hold as they are (default: %(default)s)",
    )
    parser.add_argument("--decode", action="store_true", help="decode all quantized weights")
    add_tokenizer_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when it exists")
    return parser


def run(options: argparse.Namespace) -> int:
    model = open_model(options.input)
    target = check_target(options.output, options.input, options.overwrite)
    encoder = check_encoder(target, model, options.input, options.tokenizer)
    dtype = DTYPES[options.decode_to]
    tensors: dict[str, Weight] = {}
    decoded_count = 0
    with progress("decoding", "tensors") as update:
        for done, (name, value) in enumerate(model.tensors.items()):
            update(done, len(model.tensors))
            if isinstance(value, PackedTensor) and (options.decode or not holds(target, value)):
                value = spilled(decoded(value, dtype), target.parent)
                decoded_count += 1
            tensors[name] = value
    provenance = {"sources": [source_description(options.input)], "recipes": []}
    convention = model.contents.convention.partition("-")[0]
    write_model(target, tensors, model, provenance, convention, encoder)
    kept = sum(isinstance(value, PackedTensor) for value in tensors.values())
    note(
        f"{target}: {size_text(target.stat().st_size)}; {kept} quantized weights as they were, {decoded_count} decoded "
        f"to {options.decode_to}"
    )
    return 0
