"""SnugTorchCompile: another image size or prompt length compiles nothing, in every family of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled_models import compiled, compiles, fresh_compiler, predict  # noqa: F401
from memory_states import load_whole
from narrow_models import accept_narrow_models

TOLERANCE = 1e-4
WHOLE = "whole model"
# Kinds of blocks, each with code of its own: SD3's last block has no second half; Z-Image's come with and without
# modulation, and with frequencies of different shapes. The tiny Flux repeats one kind of block alone.
KINDS = {
    "sd15": 1,
    "sdxl": 1,
    "sd3": 2,
    "flux": 1,
    "qwen_image": 1,
    "lumina2": 3,
    "wan": 1,
    "ltxv": 1,
    "hunyuan_video": 1,
}
# 64 tokens are as many as half of a head has features: equal sizes must not be taken for one another.
SIZES: list[dict[str, int]] = [
    {"side": 12},
    {"side": 10, "height": 16},
    {"side": 16},
    {"tokens": 64},
    {"side": 6, "tokens": 120},
]
# The whole model may be compiled for a size of its own (never more often) where positions are made of the sizes in
# Python.
SIZES_IN_CODE = {"wan"}


@pytest.fixture
def load(twins: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    accept_narrow_models(monkeypatch)
    return lambda family: twins(family, "Q4_0").load()[0]


def check(plain: Any, patcher: Any, family: str, at_most: int, **sizes: int) -> None:
    """The compiled prediction equals the plain one, and compiles at most so many graphs."""
    load_whole(patcher)
    with compiles(at_most):
        fast = predict(patcher, family, **sizes)
    load_whole(plain)
    slow = predict(plain, family, **sizes)
    assert torch.linalg.vector_norm(fast - slow) <= TOLERANCE * torch.linalg.vector_norm(slow), sizes


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS)
def test_sizes_compile_nothing(family: str, load: Any) -> None:
    plain = load(family)
    patcher = compiled(plain)
    check(plain, patcher, family, KINDS[family])
    for sizes in SIZES:
        check(plain, patcher, family, 0, **sizes)
    check(plain, patcher, family, KINDS[family], batch=2)
    check(plain, patcher, family, 0, batch=3, side=14)


# Larger ones take minutes to compile as a whole, at every size.
@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_whole_models_compile_at_most_once_by_size(family: str, load: Any) -> None:
    plain = load(family)
    patcher = compiled(plain, scope=WHOLE)
    check(plain, patcher, family, 1)
    for sizes in SIZES[:3]:
        check(plain, patcher, family, 1, **sizes)
    check(plain, patcher, family, 0, **SIZES[0])
    if family not in SIZES_IN_CODE:
        check(plain, patcher, family, 0, side=20)


@pytest.mark.slow
def test_constant_sizes_are_compiled_anew(load: Any) -> None:
    """What the tests above count, counts."""
    plain = load("wan")
    patcher = compiled(plain, dynamic="off")
    load_whole(patcher)
    for sizes in ({}, *SIZES[:2]):
        with pytest.raises(AssertionError), compiles(0):
            predict(patcher, "wan", **sizes)
