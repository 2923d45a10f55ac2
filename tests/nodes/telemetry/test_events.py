"""Events by comparing what is there with what was, and the numbers that they share with samples."""

from __future__ import annotations

from typing import Any

import pytest

GPU = "cuda:0"


@pytest.fixture
def events() -> Any:
    from snug.nodes.telemetry.buffers import Numbers
    from snug.nodes.telemetry.events import Events

    return Events(Numbers())


def holdings(**models: int) -> dict[Any, Any]:
    from snug.nodes.telemetry.events import Holding

    return {(name, GPU): Holding(name, GPU, nbytes) for name, nbytes in models.items()}


def failures(retries: int, ooms: int) -> dict[str, Any]:
    from snug.nodes.telemetry.record import Counter

    return {GPU: Counter(0, 0, retries, ooms)}


def found(events: Any) -> list[tuple[Any, ...]]:
    return [
        (event.kind, event.model, event.bytes, event.node)
        for _, event in events.ring.since()
        if event.device == GPU
    ]


def test_loads_and_unloads(events: Any) -> None:
    events.note(1.0, holdings(flux=100), {}, "Before #1")  # was there already
    events.note(2.0, holdings(flux=100, clip=50), {}, "Encode #2")
    events.note(3.0, holdings(flux=30, clip=50), {}, "Sample #3")  # a part of it had to go
    events.note(4.0, holdings(flux=30, clip=50), {}, "Sample #3")
    events.note(5.0, holdings(vae=7), {}, None)
    assert found(events) == [
        ("load", "clip", 50, "Encode #2"),
        ("unload", "flux", 70, "Sample #3"),
        ("unload", "flux", 30, None),
        ("unload", "clip", 50, None),
        ("load", "vae", 7, None),
    ]
    assert [event.time for event in events.between(2.5, 4.5)] == [3.0]


def test_failures(events: Any) -> None:
    events.note(1.0, {}, failures(4, 1), None)  # before anybody looked
    events.note(2.0, {}, failures(6, 1), "Sample #3")
    events.note(3.0, {}, failures(6, 2), "Decode #4")
    kinds = [(kind, node) for kind, _, _, node in found(events)]
    assert kinds == [("retry", "Sample #3"), ("retry", "Sample #3"), ("oom", "Decode #4")]
    assert events.counters() == {GPU: {"retries": 6, "ooms": 2}}


def test_a_prompt_that_ran_out_is_counted_once(events: Any) -> None:
    events.note(1.0, {}, failures(0, 0), None)
    events.note(3.0, {}, failures(0, 1), "Sample #3")
    events.prompt_ran_out(2.0, 4.0, GPU, "Sample #3")  # torch told of it
    assert len(found(events)) == 1
    events.prompt_ran_out(5.0, 6.0, "cpu", "Load #1")  # where nobody counts
    assert events.counters() == {GPU: {"retries": 0, "ooms": 1}, "cpu": {"retries": 0, "ooms": 1}}


def test_what_happened_while_nobody_looked_is_no_event(events: Any) -> None:
    events.note(1.0, holdings(flux=100), failures(0, 0), None)
    events.forget()
    events.note(9.0, holdings(clip=50), failures(3, 1), None)
    assert found(events) == [] and events.counters() == {GPU: {"retries": 3, "ooms": 1}}
    events.note(10.0, holdings(), failures(3, 1), None)
    assert found(events) == [("unload", "clip", 50, None)]


def test_events_are_bounded(events: Any) -> None:
    from snug.nodes.telemetry.events import EVENTS

    events.note(0.0, {}, failures(0, 0), None)
    events.note(1.0, {}, failures(10**9, 0), None)  # a counter gone mad
    for number in range(2 * EVENTS):
        events.note(2.0, holdings(flux=1 + number % 2), {}, None)
    assert len(events.ring) == EVENTS


def test_one_number_for_samples_and_events() -> None:
    from snug.nodes.telemetry.buffers import Numbers, RingBuffer

    numbers = Numbers()
    samples, events = RingBuffer[str](9, numbers), RingBuffer[str](9, numbers)
    order = [samples.add("a"), events.add("b"), events.add("c"), samples.add("d")]
    assert order == [1, 2, 3, 4]
    assert samples.since(2) == [(4, "d")] and events.since(2) == [(3, "c")]
