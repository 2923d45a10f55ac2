from __future__ import annotations

import itertools
import random

import pytest
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.quantization.allocation import Option, allocate, lower_hull


def layer(rng: random.Random, weights: int) -> list[Option]:
    """Rate and distortion as of real formats: the error falls to about a quarter with every bit."""
    sensitivity, base = rng.uniform(0.1, 10), rng.uniform(0.5, 2)
    return [
        Option(f"{bits}", weights * bits // 8, sensitivity * base * rng.uniform(0.8, 1.2) * 4.0**-bits)
        for bits in (2, 3, 4, 6, 8)
    ] + [Option("", weights * 2, 0.0)]


def total(chosen: dict[str, Option]) -> tuple[int, float]:
    return sum(option.nbytes for option in chosen.values()), sum(option.error for option in chosen.values())


@pytest.mark.parametrize("seed", range(20))
def test_close_to_the_best_of_all_mixes(seed: int) -> None:
    rng = random.Random(seed)
    options = {f"layer{number}": layer(rng, rng.choice([800, 1600, 3200])) for number in range(6)}
    mixes = [
        (sum(option.nbytes for option in mix), sum(option.error for option in mix))
        for mix in itertools.product(*options.values())
    ]
    smallest, largest = min(size for size, _ in mixes), max(size for size, _ in mixes)
    for share in (0.1, 0.3, 0.5, 0.8):
        budget = int(smallest + share * (largest - smallest))
        nbytes, error = total(allocate(options, budget))
        best = min(found for size, found in mixes if size <= budget)
        # What a step of the hull leaves over is the only loss: with more room, that best error would be reached.
        step = max(
            b.nbytes - a.nbytes
            for hull in map(lower_hull, options.values())
            for a, b in itertools.pairwise(hull)
        )
        best_with_less = min(found for size, found in mixes if size <= max(smallest, budget - step))
        assert nbytes <= budget
        assert best <= error <= best_with_less * (1 + 1e-9)


def test_all_the_room_is_used() -> None:
    options = {
        "a": [Option("4", 100, 1.0), Option("8", 200, 0.1)],
        "b": [Option("4", 10, 0.5), Option("8", 20, 0.4)],
    }
    assert {name: option.format for name, option in allocate(options, 125).items()} == {"a": "4", "b": "8"}
    assert {name: option.format for name, option in allocate(options, 10_000).items()} == {"a": "8", "b": "8"}


def test_options_off_the_hull_fill_what_is_left() -> None:
    options = {"a": [Option("2", 100, 1.0), Option("3", 150, 0.9), Option("8", 400, 0.0)]}
    assert [option.format for option in lower_hull(options["a"])] == ["2", "8"]
    assert allocate(options, 200)["a"].format == "3"


def test_worse_options_at_more_bytes_are_never_taken() -> None:
    options = {"a": [Option("bad", 300, 2.0), Option("good", 100, 1.0)]}
    assert allocate(options, 1000)["a"].format == "good"


def test_a_size_that_cannot_be_reached() -> None:
    with pytest.raises(SnugError, match="at least 0.3 GB .* only 0.2 GB .* larger size"):
        allocate({"a": [Option("2", 300 << 20, 1.0)]}, 200 << 20)
