"""Threads that share the work on one tensor of the CPU, each of which runs torch's operations alone.

torch itself lets all its threads do a part of each operation. With operations as short as those on a chunk that stays
in the cache, waking and awaiting them takes longer than they save; here each thread has chunks of its own instead.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from queue import Empty, SimpleQueue

import torch

# Elements up to which torch's operations take one thread anyway (at::internal::GRAIN_SIZE).
ALONE = 1 << 15
# Threads that share a tensor at most: each has memory of its own for a chunk.
MOST = 16

_starting = threading.Lock()


def share(work: Callable[[int], None], parts: Sequence[int], weights: int, device: torch.device) -> None:
    """Calls `work` with each of `parts`; on a CPU on as many threads as torch has, in any order.

    weights: of a part. In `work`, gradients and inference mode are as they are for the caller. What one call raises
    comes out when the calls that run at that time have ended; no more are made.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1 or (len(parts) == 1 and weights <= ALONE):
        for part in parts:
            work(part)
        return
    waiting: SimpleQueue[int] = SimpleQueue()
    for part in parts:
        waiting.put(part)
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    stop = threading.Event()

    def run() -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            while not stop.is_set():
                try:
                    part = waiting.get_nowait()
                except Empty:
                    return
                try:
                    work(part)
                except BaseException:
                    stop.set()
                    raise

    running = [workers().submit(run) for _ in range(min(threads, MOST, len(parts)))]
    try:
        for each in running:
            each.result()
    finally:
        stop.set()
        wait(running)


@lru_cache
def workers() -> ThreadPoolExecutor:
    """Threads that run torch's operations alone. They are started when they are needed and end with Python."""
    most = max(MOST, os.cpu_count() or 1)
    return ThreadPoolExecutor(most, thread_name_prefix="snug-weights", initializer=_run_alone)


def _run_alone() -> None:
    """This thread's share of torch's threads becomes one.

    torch.set_num_threads is about the thread that calls it and, besides, about those that begin later. For them a
    thread that ends at once puts the number back.
    """
    with _starting:  # or one of two workers would take the other's 1 for the usual number
        usual = torch.get_num_threads()  # asked first, as torch sets it when a thread asks for the first time
        torch.set_num_threads(1)
        restore = threading.Thread(target=torch.set_num_threads, args=(usual,))
        restore.start()
        restore.join()
