"""On a CUDA device: weights streamed through slots are the right ones whenever they are computed with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from snug.quant_backends.memory.executor import GroupOffload
from snug.quant_backends.memory.plan import Block, OffloadPlan, make_plan
from snug.quant_backends.memory.slab import host_bytes_in_use
from snug.quant_backends.memory.transfer import DiskTransfer, StreamTransfer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZE = 1024
BLOCKS = 24


@pytest.fixture(scope="module")
def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5 for _ in range(BLOCKS)]


@pytest.fixture(
    params=[(StreamTransfer, True), (StreamTransfer, False), (DiskTransfer, True)],
    ids=["pinned", "pageable", "disk"],
)
def offload(request: pytest.FixtureRequest, weights: list[torch.Tensor]) -> Iterator[GroupOffload]:
    kind, pin = request.param
    transfer = kind(torch.device("cuda", torch.cuda.current_device()), pin)
    offload = GroupOffload(plan(weights), lambda block: [weights[block]], transfer)
    assert transfer.is_pinned == pin
    yield offload
    offload.close()
    assert host_bytes_in_use() == 0


def plan(weights: list[torch.Tensor]) -> OffloadPlan:
    blocks = [Block(str(index), (weight.nbytes,)) for index, weight in enumerate(weights)]
    return make_plan(blocks, keep=4 * weights[0].nbytes, blocks_per_group=2)


def step(offload: GroupOffload, x: torch.Tensor, blocks: int = BLOCKS) -> torch.Tensor:
    for block in range(blocks):
        weight = offload.acquire(block)[0].to(x.device)  # blocks that stay are the source's own
        for _ in range(4):  # enough work that copies overtake whoever does not wait for them
            x = x @ weight
        x = x / x.norm()
        offload.release(block)
    return x


def test_steps_give_what_resident_weights_give(offload: GroupOffload, weights: list[torch.Tensor]) -> None:
    x = torch.randn(2048, SIZE, device="cuda")
    wanted = x
    for weight in weights:
        for _ in range(4):
            wanted = wanted @ weight.cuda()
        wanted = wanted / wanted.norm()
    for _ in range(50):
        assert torch.equal(step(offload, x), wanted)


def test_steps_broken_off_50_times(offload: GroupOffload) -> None:
    x = torch.randn(2048, SIZE, device="cuda")
    wanted = step(offload, x)
    for broken in range(50):
        step(offload, x, blocks=broken % BLOCKS)
        offload.acquire(broken % BLOCKS)
        assert torch.equal(step(offload, x), wanted)


def test_pinned_and_device_memory_are_given_back(weights: list[torch.Tensor]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        offload = GroupOffload(plan(weights), lambda block: [weights[block]], StreamTransfer(device))
        assert host_bytes_in_use(pinned_only=True) == offload.plan.slab_bytes
        step(offload, torch.randn(64, SIZE, device="cuda"))
        offload.close()
        assert host_bytes_in_use() == 0
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
