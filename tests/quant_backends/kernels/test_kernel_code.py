"""Every GPU kernel compiles for every generation, without a GPU, to the wide accesses that it is written for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from compiled_kernels import Code, compiled, decoding_launch, product_launches, rounding_launch
from random_packed import random_packed
from snug.quant_backends.core.device import triton_version
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.kernels.dispatch import ROUNDING_TRITON
from snug.quant_backends.kernels.gpu import launch

CAPABILITIES = (80, 86, 89, 90)
# Shared memory that a block of threads may have, in bytes.
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448}
GGML = [name for name, fmt in FORMATS.items() if fmt.dtype is None]
SCALED = [
    "bnb-nf4-64",
    "bnb-nf4-64-nested-256",
    "int8-rows-scb",
    "int8-1x32-zero",
    "float8_e4m3fn-tensor",
    "float8_e5m2-rows",
    "quanto-int4-128",
    "int8-rows-rotated-256",
]
SHAPE = (64, 3072)


def assert_sound(code: Code, capability: int) -> None:
    assert code.shared <= SHARED[capability]
    assert "ftz" not in code.ptx  # subnormal numbers are numbers
    assert not code.spilled


@pytest.mark.parametrize("name", [*GGML, *SCALED])
def test_decoding(name: str) -> None:
    # A generation each, in turn: they differ little, and compiling takes most of a second.
    place = [*GGML, *SCALED].index(name)
    capability, dtype = CAPABILITIES[place % 4], (torch.bfloat16, torch.float16)[place // 4 % 2]
    code = compiled(decoding_launch(random_packed(name, SHAPE), dtype), capability)
    assert_sound(code, capability)
    # Eight neighbours at a time; one weight for each thread takes about a hundred instructions.
    assert set(code.stores) == {16}
    assert code.per_weight < 24
    if name not in GGML:
        # No product may be rounded together with a sum.
        assert "fma" not in code.ptx


@pytest.mark.parametrize(
    ("name", "tokens", "capability"),
    [*(("Q4_K", 128, capability) for capability in CAPABILITIES), ("Q4_K", 1, 90), ("bnb-nf4-64", 4, 80)],
)
def test_products(name: str, tokens: int, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    launch._product_plan.cache_clear()
    launches = product_launches(random_packed(name, SHAPE), tokens, torch.bfloat16)
    launch._product_plan.cache_clear()
    assert [item.kernel.__name__ for item in launches[1:]] == ["combine"]
    assert_sound(compiled(launches[0], capability), capability)


@pytest.mark.parametrize("name", ["Q6_K", "int8-rows-rotated-256"])
def test_low_rank_changes(name: str) -> None:
    code = compiled(decoding_launch(random_packed(name, SHAPE), torch.bfloat16, rank=32), 86)
    assert_sound(code, 86)
    assert "mma.sync" in code.ptx


def test_low_rank_changes_of_the_widest_tiles() -> None:
    """Factors in float32 take the most shared memory, of which desktop cards have least."""
    launched = decoding_launch(random_packed("int8-rows-rotated-1024", SHAPE), torch.float32, rank=32)
    assert_sound(compiled(launched, 86), 86)


@pytest.mark.skipif(
    triton_version() < ROUNDING_TRITON, reason="this Triton compiles the kernel for minutes: it is not used"
)
@pytest.mark.parametrize(
    ("name", "columns", "stored", "capability"),
    [
        ("Q6_K", 3072, "int8", 80),  # two tiles of a row, two rows
        ("IQ3_S", 15360, "int8", 86),  # one tile
        ("bnb-nf4-64-nested-256", 3072, "float8_e4m3fn", 89),
        ("Q8_0", 24576, "int8", 90),  # the longest row
        ("BF16", 12288, "int8", 86),
    ],
)
def test_rounding(name: str, columns: int, stored: str, capability: int) -> None:
    packed = random_packed(name, (64, columns))
    code = compiled(rounding_launch(packed, stored, 256 if stored == "int8" else 1), capability)
    assert_sound(code, capability)
    # Sixteen neighbours at a time, and the scale of the row.
    assert set(code.stores) == {16, 4} and code.stores[4] == 1
    assert code.per_weight < 64


def test_no_kernel_calls_what_older_triton_takes_for_another_function() -> None:
    """Before 3.5 Python's min and max are those of tensors there, also for constants."""
    folder = Path(launch.__file__).parent
    for path in folder.glob("*.py"):
        if "import triton" in path.read_text(encoding="utf-8"):
            calls = re.findall(r"(?<![\w.])(?:min|max)\(", path.read_text(encoding="utf-8"))
            assert not calls, path.name
