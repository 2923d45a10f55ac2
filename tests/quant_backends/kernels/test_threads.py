"""Threads that share a tensor: the same results as one, its errors, and no trace left in torch's settings."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.kernels import dequantize as kernel
from snug.quant_backends.kernels import threads
from snug.quant_backends.kernels.dequantize import quantize, quantize_packed
from snug.quant_backends.quantization import LayerInfo, targets

CPU = torch.device("cpu")
WRITABLE = [name for name, fmt in FORMATS.items() if fmt.can_quantize]
SCALED = [name for name, target in targets().items() if target.backend != "gguf" and not target.unavailable]
THREADS = 3


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "weights_per_chunk", lambda device: 1 << 14)
    monkeypatch.setattr(threads, "ALONE", 0)


def _weights() -> torch.Tensor:
    return torch.randn(48, 512, generator=torch.Generator().manual_seed(0)) / 30


def _importance() -> torch.Tensor:
    return torch.rand(512, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", WRITABLE)
def test_ggml_types_are_the_same_bytes(name: str) -> None:
    shared = quantize(_weights(), FORMATS[name], _importance())
    torch.set_num_threads(1)
    assert torch.equal(shared, quantize(_weights(), FORMATS[name], _importance()))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", SCALED)
def test_scaled_formats_are_the_same_tensors(name: str) -> None:
    target, weights = targets()[name], _weights().bfloat16()
    fmt = target.format_for(LayerInfo("layer", tuple(weights.shape)))
    assert fmt is not None
    shared = target.encode(weights, fmt, _importance())
    torch.set_num_threads(1)
    alone = target.encode(weights, fmt, _importance())
    assert shared.parts.keys() == alone.parts.keys()
    for found, expected in (
        (shared.data, alone.data),
        *zip(shared.parts.values(), alone.parts.values(), strict=True),
    ):
        assert torch.equal(found.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))


@pytest.mark.usefixtures("small_chunks")
def test_each_thread_runs_operations_alone_and_others_keep_their_share() -> None:
    together, seen = threading.Barrier(THREADS, timeout=60), set()

    def work(part: int) -> None:
        together.wait()  # nobody gets past it but as many threads
        seen.add((threading.get_ident(), torch.get_num_threads()))

    threads.share(work, range(THREADS), 1, CPU)
    assert len(seen) == THREADS
    assert {count for _, count in seen} == {1}
    assert threading.get_ident() not in {ident for ident, _ in seen}
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (torch.get_num_threads(), later) == (THREADS, [THREADS])


def test_few_weights_and_one_thread_stay_with_the_caller() -> None:
    seen: list[int] = []

    def work(part: int) -> None:
        seen.append(threading.get_ident())

    threads.share(work, [0], threads.ALONE, CPU)
    torch.set_num_threads(1)
    threads.share(work, range(5), 1 << 20, CPU)
    assert seen == [threading.get_ident()] * 6


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_comes_out_and_ends_the_work(error: type[BaseException]) -> None:
    done: list[int] = []

    def work(part: int) -> None:
        done.append(part)
        if part == 7:
            raise error("part 7")

    with pytest.raises(error, match="part 7"):
        threads.share(work, range(10_000), 1, CPU)
    count = len(done)
    assert count < 10_000
    again: list[int] = []
    threads.share(again.append, range(100), 1, CPU)
    assert sorted(again) == list(range(100))
    assert len(done) == count, "nothing ran on behind the caller's back"


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "int8-rows"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_of_the_caller_hold(name: str, mode: type) -> None:
    """Workflows run in inference mode, and parameters require a gradient."""
    fmt = FORMATS.get(name) or targets()["INT8 per row"].format_for(LayerInfo("layer", (48, 512)))
    assert fmt is not None
    plain = quantize_packed(_weights(), fmt)
    with mode():
        found = quantize_packed(torch.nn.Parameter(_weights()), fmt)
        assert torch.equal(found.data, plain.data)
        assert not any(part.requires_grad for part in found.parts.values())
        assert torch.equal(quantize_packed(_weights(), fmt).data, plain.data)


def test_idle_threads_let_python_end() -> None:
    code = (
        "import torch; torch.set_num_threads(2); from snug_path import register_snug; register_snug(); "
        "from snug.quant_backends.kernels.threads import share; "
        "share(lambda part: torch.zeros(9).add_(1), range(8), 1, torch.device('cpu')); print('done')"
    )
    scripts = str(kernel.__file__).replace("quant_backends/kernels/dequantize.py", "scripts")
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=scripts, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout.strip()) == (0, "done"), result.stderr
