"""Inputs that several nodes share: what to quantize to, and what to leave out."""

from __future__ import annotations

from collections.abc import Sequence

from comfy_api.latest import io

from .adapter.quantize_on_load import AS_IN_FILE

DEFAULT_SKIP = "default"
_PREFERRED = ("GGUF Q8_0", "FP8 e4m3fn per row")


def target_input(targets: Sequence[str]) -> io.Combo.Input:
    return io.Combo.Input(
        "target",
        options=list(targets),
        default=next((name for name in _PREFERRED if name in targets), targets[0]),
        tooltip=(
            "What weights are stored as. The number in a GGUF type is its bits per weight: Q8_0 cannot be told apart "
            "from the original, Q6_K to Q4_K are good, below that it shows. bitsandbytes NF4 takes 4 bits, FP8 and "
            "INT8 take 8. The help page of this node has a table."
        ),
    )


def skip_input(defaults: str, does: str = "quantizes") -> io.String.Input:
    """defaults: what "default" stands for; does: what becomes of the other layers."""
    return io.String.Input(
        "skip_patterns",
        default=DEFAULT_SKIP,
        tooltip=(
            f"Layers that keep their precision: parts of their names (regular expressions) between commas. 'default' "
            f"stands for {defaults}; 'default, attn2' adds to it, and nothing at all {does} every layer."
        ),
    )


def on_load_input(name: str, targets: Sequence[str], what: str) -> io.Combo.Input:
    """An optional input of a loader: what to quantize to while loading."""
    return io.Combo.Input(
        name,
        options=[AS_IN_FILE, *targets],
        default=AS_IN_FILE,
        optional=True,
        tooltip=(
            f"Quantizes {what} while loading, one tensor at a time: memory for the whole of it unquantized is "
            "never needed. Layers that are quantized in the file stay as they are. 'as in the file' changes nothing."
        ),
    )
