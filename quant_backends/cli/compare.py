"""`snug compare A B`: how far the weights of two files are apart, tensor by tensor."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..core.errors import SnugError
from .console import progress, show
from .opening import Weight, decoded, format_name, open_tensors

# Lines of the table, unless all are asked for; names of what only one file has.
SHOWN = 25
NAMED = 5
# Weights that are compared at a time.
CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one tensor. error: L2 norm of the difference beside the first file's; largest: of the differences.

    bits: per weight, scales included.
    """

    name: str
    shape: tuple[int, ...]
    format_a: str
    format_b: str
    bits_a: float
    bits_b: float
    error: float
    largest: float


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "compare",
        help="how far two files' weights are apart, as a table",
        description=(
            "Decodes the weights of two files, whatever they are stored in, two tensors at a time, and prints how far "
            "those of B are from those of A: the relative error of each tensor and of all together."
        ),
    )
    parser.add_argument("a", help="the reference: a .gguf or .safetensors file, or a folder of diffusers")
    parser.add_argument("b", help="the file that is compared with it")
    parser.add_argument(
        "--all", action="store_true", help=f"print every tensor, not the {SHOWN} that differ most"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--max-error",
        type=float,
        metavar="X",
        help="fail (exit code 1) when the relative error of all weights is above X, or names or shapes differ",
    )
    return parser


def run(options: argparse.Namespace) -> int:
    first, second = open_tensors(options.a), open_tensors(options.b)
    names = [
        name for name in first if name in second and tuple(first[name].shape) == tuple(second[name].shape)
    ]
    reshaped = [name for name in first if name in second and name not in set(names)]
    only = ([name for name in first if name not in second], [name for name in second if name not in first])
    if not names:
        raise SnugError(
            f"{options.a} and {options.b} have no tensor of one name and shape; are they one model?"
        )
    found, squares = [], [0.0, 0.0]
    with progress("comparing", "tensors") as update:
        for done, name in enumerate(names):
            update(done, len(names))
            error, size, largest = distance(first[name], second[name])
            squares = [squares[0] + error, squares[1] + size]
            found.append(_difference(name, first, second, _ratio(error, size), largest))
    overall = _ratio(*squares)
    differs = bool(reshaped or only[0] or only[1])
    if options.json:
        tensors = [asdict(difference) for difference in found]
        result = {
            "error": overall,
            "only_a": only[0],
            "only_b": only[1],
            "other_shape": reshaped,
            "tensors": tensors,
        }
        show(json.dumps(result, indent=2))
    else:
        show("\n".join(_table(found, None if options.all else SHOWN)))
        show(f"\nall {len(found)} tensors: relative error {overall:.6f}")
        for what, missing in ((f"only in {options.a}", only[0]), (f"only in {options.b}", only[1])):
            if missing:
                show(f"{len(missing)} tensors {what}: {_names(missing)}")
        if reshaped:
            show(f"{len(reshaped)} tensors have other shapes: {_names(reshaped)}")
    return int(options.max_error is not None and (differs or not overall <= options.max_error))


def distance(first: Weight, second: Weight) -> tuple[float, float, float]:
    """(sum of squared differences, sum of the first's squares, largest difference), summed in float64."""
    a, b = decoded(first).reshape(-1), decoded(second).reshape(-1)
    error = size = largest = 0.0
    for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True):
        difference = y - x
        error += torch.linalg.vector_norm(difference, dtype=torch.float64).item() ** 2
        size += torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2
        largest = max(largest, difference.abs().amax().item())
    return error, size, largest


def _difference(
    name: str, first: Mapping[str, Weight], second: Mapping[str, Weight], error: float, largest: float
) -> Difference:
    a, b = first[name], second[name]
    weights = max(1, math.prod(a.shape))
    formats = format_name(a), format_name(b)
    return Difference(
        name, tuple(a.shape), *formats, 8 * a.nbytes / weights, 8 * b.nbytes / weights, error, largest
    )


def _ratio(error: float, size: float) -> float:
    return math.sqrt(error / size) if size else math.inf if error else 0.0


def _table(found: list[Difference], limit: int | None) -> list[str]:
    rows = sorted(found, key=lambda difference: -difference.error)
    width = max(len(difference.name) for difference in rows[:limit])
    formats = max(len(f"{difference.format_a} → {difference.format_b}") for difference in rows[:limit])
    lines = [
        f"{'tensor':<{width}}  {'stored as':<{formats}}  {'bits/weight':>13}  {'error':>9}  {'largest':>9}"
    ]
    for difference in rows[:limit]:
        stored = f"{difference.format_a} → {difference.format_b}"
        bits = f"{difference.bits_a:.2f} → {difference.bits_b:.2f}"
        lines.append(
            f"{difference.name:<{width}}  {stored:<{formats}}  {bits:>13}  {difference.error:>9.6f}  "
            f"{difference.largest:>9.3g}"
        )
    if limit is not None and len(rows) > limit:
        lines.append(f"… and {len(rows) - limit} that differ less (--all shows them)")
    return lines


def _names(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
