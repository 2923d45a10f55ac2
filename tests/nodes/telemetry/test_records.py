"""Buffers of fixed size, the parts of a device's memory, and the peaks of nodes, without any device."""

from __future__ import annotations

import random
from typing import Any

import pytest

CPU = "cpu"


@pytest.fixture
def record() -> Any:
    from snug.nodes.telemetry.record import PromptRecord

    return PromptRecord("prompt", CPU, started=0.0)


def counters(current: int, peak: int | None = None) -> dict[str, Any]:
    from snug.nodes.telemetry.record import Counter

    return {CPU: Counter(current, current if peak is None else peak)}


def test_ring_buffer_keeps_the_last_ones() -> None:
    from snug.nodes.telemetry.buffers import RingBuffer

    buffer = RingBuffer(3)
    assert [buffer.add(value) for value in "abcde"] == [1, 2, 3, 4, 5]
    assert buffer.since() == [(3, "c"), (4, "d"), (5, "e")]
    assert buffer.since(4) == [(5, "e")] and buffer.since(9) == []
    assert len(buffer) == 3


@pytest.mark.parametrize("count", [1, 7, 64, 1000])
def test_timeline_is_bounded_and_keeps_the_peak(count: int) -> None:
    from snug.nodes.telemetry.buffers import Timeline

    values = [random.Random(number).random() for number in range(count)]
    timeline: Timeline[tuple[int, float]] = Timeline(16, lambda entry: entry[1])
    for entry in enumerate(values):
        timeline.add(entry)
    kept = timeline.values()
    assert len(kept) <= 16
    assert max(value for _, value in kept) == max(values)
    assert [at for at, _ in kept] == sorted(at for at, _ in kept)
    if count < 16:
        assert len(kept) == count


def test_parts_are_the_total_whatever_the_counters_say() -> None:
    from snug.nodes.telemetry.accounting import DeviceReading, split

    chance = random.Random(5)
    for _ in range(2000):
        total, *others = (chance.choice([0, chance.randrange(1000)]) for _ in range(6))
        free, allocated, reserved, weights, pages = others
        parts = split(DeviceReading("d", "D", total, free, allocated, reserved, weights, pages))
        values = (parts.weights, parts.pages, parts.activations, parts.cache, parts.other, parts.free)
        assert sum(values) == total and min(values) >= 0


def test_parts_of_a_gpu() -> None:
    from snug.nodes.telemetry.accounting import DeviceReading, dynamic_pages, split

    # The library of dynamic VRAM counts torch's 50 as well: 20 are its own.
    pages = dynamic_pages(total=70, reserved=50)
    parts = split(DeviceReading("cuda:0", "GPU", 100, 20, allocated=40, reserved=50, weights=25, pages=pages))
    assert (parts.weights, parts.activations, parts.cache, parts.pages) == (25, 15, 10, 20)
    assert (parts.other, parts.free) == (10, 20)
    assert dynamic_pages(total=40, reserved=50) == 0


def test_peaks_belong_to_the_nodes_that_were_open(record: Any) -> None:
    record.open("a", "A #a", 1.0, counters(100, 900))  # the peak was before the node
    record.observe(1.5, counters(120, 300))
    record.close("a", 2.0, counters(110, 250))
    record.open("b", "B #b", 2.0, counters(110))
    record.open("c", "C #c", 2.5, counters(130, 140))  # while b waits
    record.close("c", 3.0, counters(90, 400))
    record.close("b", 3.5, counters(100))
    record.close("cached", 3.5, counters(100, 5000))
    a, b, c = record.nodes()
    assert [(node.added(CPU), node.kept(CPU)) for node in (a, b, c)] == [(200, 10), (290, -10), (270, -40)]
    assert record.highest() is b and a.ended == 2.0
    assert {node.state for node in record.nodes()} == {"done"}


def test_a_node_that_waited_for_its_inputs_starts_anew(record: Any) -> None:
    record.open("lazy", "L", 1.0, counters(100))
    record.open("input", "I", 2.0, counters(100))
    record.close("input", 3.0, counters(200, 800))
    record.open("lazy", "L", 3.0, counters(200))
    record.close("lazy", 4.0, counters(210, 220))
    _, lazy = record.nodes()
    assert lazy.started == 3.0 and lazy.added(CPU) == 20


def test_what_is_open_at_the_end_was_stopped(record: Any) -> None:
    record.open("a", "A", 1.0, counters(1))
    record.finish(2.0, counters(2))
    record.finish(9.0, counters(2))
    record.open("late", "L", 3.0, counters(1))
    (node,) = record.nodes()
    assert node.state == "stopped" and record.ended == 2.0


def test_a_window_shows_what_comes_after(record: Any) -> None:
    record.open("a", "A", 1.0, counters(1))
    record.close("a", 2.0, counters(1))
    record.start_window(2.0)
    record.open("b", "B", 2.5, counters(1))
    record.leave_out("nothing")
    assert [node.node_id for node in record.nodes()] == ["b"]
    assert len(record.nodes(from_start=True)) == 2
    record.leave_out("b")
    assert record.nodes() == []


def test_a_record_is_bounded(record: Any) -> None:
    from snug.nodes.telemetry.accounting import DeviceReading, split
    from snug.nodes.telemetry.record import MOST_NODES, MOST_STEPS, POINTS

    parts = split(DeviceReading(CPU, "RAM", 100, 50, 40, 40, 10, is_gpu=False))
    for number in range(MOST_NODES + 50):
        record.open(str(number), "N", number, counters(1))
        record.sample(number, parts)
        record.close(str(number), number, counters(1))
    assert len(record.nodes()) == MOST_NODES and len(record.points()) < POINTS
    record = type(record)("other", CPU, 0.0)
    record.open("a", "A", 0.0, counters(1))
    for number in range(MOST_STEPS + 9):
        record.step("a", number)
    assert len(record.nodes()[0].steps) == MOST_STEPS


def test_leases_end_and_are_limited() -> None:
    from snug.nodes.telemetry.leases import MOST_CLIENTS, Leases

    leases = Leases()
    leases.renew("a", 10, True, now=0)
    leases.renew("b", 20, False, now=0)
    assert leases.receivers(5) == ["a"] and leases.active(15)
    assert leases.receivers(15) == [] and not leases.active(25)
    for number in range(MOST_CLIENTS):
        leases.renew(str(number), 10, True, now=30)
    leases.renew("0", 10, True, now=31)
    with pytest.raises(ValueError, match="clients look"):
        leases.renew("one more", 10, True, now=31)
    leases.renew("one more", 10, True, now=45)
