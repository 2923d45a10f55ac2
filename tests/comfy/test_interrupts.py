"""Interrupting a running server in the middle of sampling, and queueing again, many times in a row."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_server import ComfyServer, WorkflowError
from feature_nodes import LORA, add_features
from tiny import make_tiny_lora
from workflows import Workflow, build_workflow, saved_latent

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

TIMES = 50
STEPS = 2000


def test_interrupting_and_queueing_again(
    comfy_server: ComfyServer, twins: Any, source: Callable[[str], Path]
) -> None:
    folder = comfy_server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    make_tiny_lora(source("sd3"), folder / LORA, seed=3)
    pair = twins("sd3", "Q4_K")

    def workflow(steps: int, seed: int, features: tuple[str, ...]) -> Workflow:
        base = build_workflow("sd3", "snug", pair.gguf.name, steps=steps, seed=seed)
        return add_features(base, features)

    def latent(features: tuple[str, ...]) -> torch.Tensor:
        return saved_latent(comfy_server, comfy_server.run(workflow(1, 1, features)))

    chains = [("offload",), ("lora", "offload"), ("casting", "offload", "compile")]
    wanted = {chain: latent(chain) for chain in chains}
    delays = random.Random(0)
    for number in range(TIMES):
        chain = chains[number % len(chains)]
        # A seed of its own, so that ComfyUI has no result of it.
        start = comfy_server.log.stat().st_size
        prompt = comfy_server.queue(workflow(STEPS, 100 + number, chain))
        wait_for_steps(comfy_server, start)
        time.sleep(delays.uniform(0, 0.1))
        comfy_server.interrupt()
        with pytest.raises(WorkflowError, match="interrupted") as interrupted:
            comfy_server.wait(prompt, timeout=30)
        assert interrupted.value.node_type == "KSampler"
        # The next one is that of another chain in two of three times.
        assert torch.equal(
            latent(chains[number // 2 % len(chains)]), wanted[chains[number // 2 % len(chains)]]
        )


def wait_for_steps(server: ComfyServer, start: int) -> None:
    """Until the progress bar that the sampler writes to the log, from byte `start` on, shows a step."""
    deadline = time.monotonic() + 60
    while not re.search(rf"[1-9]\d*/{STEPS}".encode(), server.log.read_bytes()[start:]):
        assert time.monotonic() < deadline, server.log_tail()
        time.sleep(0.01)
