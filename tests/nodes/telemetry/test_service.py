"""Sampling in one process with ComfyUI's progress registry and no server."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest


class Prompts:
    """Stands for ComfyUI's executor and queue."""

    def __init__(self) -> None:
        self.running: str | None = None
        self.failed: dict[str, Any] = {}
        self._count = 0

    def is_running(self, prompt: str) -> bool:
        return prompt == self.running

    def start(self) -> Any:
        from comfy_execution import progress
        from comfy_execution.graph import DynamicPrompt

        self._count += 1
        self.running = f"prompt {self._count}"
        nodes = {name: {"class_type": name.upper(), "inputs": {}} for name in "abcd"}
        progress.reset_progress_state(self.running, DynamicPrompt(nodes))
        progress.add_progress_handler(Quiet())
        return progress.get_progress_state()


def Quiet() -> Any:
    """In place of ComfyUI's own handler, under its name."""
    from comfy_execution.progress import ProgressHandler

    return ProgressHandler("webui")


@pytest.fixture
def prompts() -> Prompts:
    return Prompts()


@pytest.fixture
def sent() -> list[Any]:
    return []


@pytest.fixture
def service(prompts: Prompts, sent: list[Any]) -> Iterator[Any]:
    from snug.nodes.telemetry.service import Telemetry

    service = Telemetry(prompts.is_running, prompts.failed.get, lambda *sample: sent.append(sample))
    yield service
    prompts.running = None
    service.leases.clear()
    wait_until(lambda: not service.is_sampling)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run_node(registry: Any, name: str, megabytes: int) -> None:
    registry.start_progress(name)
    # Pages of its own: what earlier tests have freed is the process's still, and using it again would add nothing.
    values = mmap.mmap(-1, max(megabytes << 20, mmap.PAGESIZE))
    for offset in range(0, len(values), mmap.PAGESIZE):
        values[offset] = 1
    del values
    registry.finish_progress(name)


def test_nothing_runs_before_somebody_looks(service: Any) -> None:
    assert not service.is_sampling and service.take().devices
    assert not service.is_sampling


def test_monitor_records_to_the_end_of_the_prompt(service: Any, prompts: Prompts) -> None:
    for _ in range(2):
        registry = prompts.start()
        record = service.monitor()
        assert service.monitor() is record
        run_node(registry, "a", 100)
        assert service.is_sampling
        prompts.running = None
        wait_until(lambda: not service.is_sampling)
        assert record.ended is not None
        (node,) = record.nodes()
        assert node.added("cpu") == pytest.approx(100 << 20, rel=0.01)
    assert len(service.prompts) == 2
    count = threading.active_count()
    run_node(prompts.start(), "a", 1)  # nobody looks
    assert len(record.nodes()) == 1 and threading.active_count() == count


def test_a_lease_sees_prompts_from_their_first_node(service: Any, prompts: Prompts, sent: list[Any]) -> None:
    service.lease("client", 30, push=True)
    first = prompts.start()
    wait_until(lambda: service.running_record() is not None)
    run_node(first, "a", 1)
    before = service.running_record()
    second = prompts.start()  # ComfyUI tells the handlers of the one before
    assert before.ended is not None
    wait_until(lambda: service.running_record() is not None)
    run_node(second, "b", 100)
    (node,) = service.running_record().nodes()
    assert node.title == "B #b" and node.added("cpu") == pytest.approx(100 << 20, rel=0.01)
    wait_until(lambda: len(sent) >= 2)
    assert all(clients == ["client"] for *_, clients in sent)


def test_a_prompt_is_recorded_on_while_a_page_is_loaded_anew(
    service: Any, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from snug.nodes.telemetry import service as module

    registry = prompts.start()
    service.lease("tab", 30, push=False)
    wait_until(lambda: service.running_record() is not None)
    record = service.running_record()
    service.leases.end("tab")
    run_node(registry, "a", 0)
    service.lease("tab", 30, push=False)
    run_node(registry, "b", 0)
    assert service.running_record() is record
    assert [node.node_id for node in record.nodes()] == ["a", "b"]
    monkeypatch.setattr(module, "GRACE", 0.0)
    service.leases.end("tab")
    wait_until(lambda: not service.is_sampling)
    assert record.ended is not None
    # The prompt still runs: who looks later sees the rest of it.
    service.lease("tab", 30, push=False)
    wait_until(lambda: service.running_record() is not None)
    run_node(registry, "c", 0)
    assert [node.node_id for node in service.running_record().nodes()] == ["c"]
    assert list(service.prompts) == []


def test_a_handler_that_comes_late_sees_the_node_that_runs(service: Any, prompts: Prompts) -> None:
    registry = prompts.start()
    registry.start_progress("a")
    service.lease("client", 30, push=False)
    wait_until(lambda: service.running_record() is not None)
    registry.finish_progress("a")
    assert [node.state for node in service.running_record().nodes()] == ["done"]


def test_attaching_while_the_handlers_are_told(service: Any, prompts: Prompts) -> None:
    """A dictionary that grows while ComfyUI goes through it would end the prompt."""
    from snug.nodes.telemetry import progress

    registry = prompts.start()

    class Slow(progress.progress.ProgressHandler):
        def start_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
            if "snug_telemetry" not in registry.handlers:
                handler = progress.Handler(service, registry)
                assert progress.attach_from_outside(handler, registry)

    registry.register_handler(Slow("slow"))
    registry.start_progress("a")
    assert set(registry.handlers) == {"webui", "slow", "snug_telemetry"}


def test_errors_do_not_reach_the_prompt(
    service: Any, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from snug.nodes.telemetry.counters import Counters

    registry = prompts.start()
    service.monitor()

    def fail(_: Any) -> None:
        raise RuntimeError("no counters")

    monkeypatch.setattr(Counters, "read", fail)
    run_node(registry, "a", 1)
    run_node(registry, "b", 1)
    wait_until(lambda: not service.is_sampling)  # gives up
    assert "not recorded any further" in caplog.text
    assert service.running_record() is None
    monkeypatch.undo()
    record = (registry := prompts.start()) and service.monitor()
    run_node(registry, "a", 1)
    assert len(record.nodes()) == 1


def test_many_samples_leak_nothing(service: Any, prompts: Prompts) -> None:
    from snug.nodes.telemetry.service import HISTORY, PROMPTS

    for _ in range(PROMPTS + 3):
        registry = prompts.start()
        service.monitor()
        for name in "abcd":
            run_node(registry, name, 0)
    for client in range(5):
        service.lease(f"client {client}", 30, push=True)
    for _ in range(1000):
        service._sample()
    assert len(service.prompts) == PROMPTS
    assert len(service.history) <= HISTORY
    assert sum(thread.name == "snug-telemetry" for thread in threading.enumerate()) == 1


def test_peaks_of_a_block_whoever_reads_meanwhile(service: Any, prompts: Prompts) -> None:
    registry = prompts.start()
    record = service.monitor()
    registry.start_progress("a")
    with service.peaks() as peaks:
        before = service.read()["cpu"].current
        values = mmap.mmap(-1, 64 << 20)
        for offset in range(0, len(values), mmap.PAGESIZE):
            values[offset] = 1
        service.read()  # as the sampling thread does, which sets the peak back
        values.close()
    assert peaks["cpu"] - before == pytest.approx(64 << 20, rel=0.1)
    registry.finish_progress("a")
    (node,) = [node for node in record.nodes() if node.node_id == "a"]
    assert node.peak["cpu"] >= peaks["cpu"], "what the block read is lost to the record"
    with service.peaks() as peaks:
        pass
    assert peaks["cpu"] < before + (32 << 20)
