"""`snug inspect FILE`: what a model file is made of, from its header."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ..core.errors import SnugError
from ..inspection.header import architecture_of, read_header
from ..inspection.report import report
from ..inspection.summary import Summary, summarize, to_json
from ..memory.plan import size_text
from .console import show


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "inspect",
        help="what a file is made of: architecture, formats and why, bytes of blocks, metadata",
        description="Reports what a model file or folder is made of. Only its header is read.",
    )
    parser.add_argument("file", help="a .gguf or .safetensors file, or a folder of diffusers")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes, instead of text")
    return parser


def run(options: argparse.Namespace) -> int:
    summary = summarize_file(options.file)
    show(to_json([summary]) if options.json else report(summary))
    return 0


def summarize_file(path: str) -> Summary:
    """What the header says."""
    if not os.path.exists(path):
        raise SnugError(f"{path} does not exist; check the path.")
    contents = read_header(path)
    facts = {
        "file": f"{contents.container}, {contents.kind}, quantization {contents.convention}",
        "size": size_text(contents.file_bytes),
    }
    if contents.companions:
        nbytes = sum(weight.nbytes for weight in contents.companions)
        facts["beside it"] = f"{size_text(nbytes)} of text encoders, VAE and the like, not counted below"
    return summarize(
        f"File: {os.path.basename(path.rstrip('/'))}",
        contents.weights,
        architecture_of(contents),
        facts=facts,
        metadata=contents.metadata,
        no_match="not compared with ComfyUI's model, which is not there on the command line",
    )
