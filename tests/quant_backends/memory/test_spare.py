"""What is kept in spare memory: the dearest first, as much as fits."""

from __future__ import annotations

from snug.quant_backends.formats import FORMATS
from snug.quant_backends.formats.scaled import scaled_format
from snug.quant_backends.memory.spare import Candidate, choose, decoding_cost


def test_the_dearest_that_fit() -> None:
    cheap, dear, large = Candidate(10, 1.0), Candidate(10, 3.0), Candidate(100, 2.0)
    assert choose([cheap, dear, large], 1000) == [dear, large, cheap]
    assert choose([cheap, dear, large], 25) == [dear, cheap]
    assert choose([cheap, dear, large], 15) == [dear]
    assert choose([cheap, dear], 0) == choose([cheap], -5) == []


def test_every_format_has_a_cost() -> None:
    costs = {name: decoding_cost(fmt) for name, fmt in FORMATS.items()}
    assert min(costs.values()) > 0
    assert costs["F16"] < costs["Q8_0"] < costs["Q4_0"] < costs["Q5_K"]
    assert decoding_cost(scaled_format("int8-rows")) > costs["F16"]
