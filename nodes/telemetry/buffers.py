"""Memory of fixed size for what is sampled over time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Numbers:
    """Counts from 1 on what is added to the buffers that share it, so that one number says how far somebody has read
    all of them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.last = 0


class RingBuffer(Generic[T]):
    """The last `capacity` values that were added, with rising numbers. Safe to use from several threads."""

    def __init__(self, capacity: int, numbers: Numbers | None = None) -> None:
        self._values: deque[tuple[int, T]] = deque(maxlen=capacity)
        self._numbers = numbers or Numbers()

    def add(self, value: T) -> int:
        """Returns the value's number."""
        with self._numbers.lock:
            self._numbers.last += 1
            self._values.append((self._numbers.last, value))
            return self._numbers.last

    def since(self, number: int = 0) -> list[tuple[int, T]]:
        """(number, value) of those after `number` that are still there, the oldest first."""
        with self._numbers.lock:
            return [entry for entry in self._values if entry[0] > number]

    def __len__(self) -> int:
        return len(self._values)


class Timeline(Generic[T]):
    """Values over a time of unknown length: when `capacity` of them are there, every two become the larger one.

    size: what makes a value the larger one, so that peaks survive. Not safe to use from several threads.
    """

    def __init__(self, capacity: int, size: Callable[[T], float]) -> None:
        self._capacity = capacity
        self._size = size
        self._values: list[T] = []
        self._pending: list[T] = []
        self._stride = 1

    def add(self, value: T) -> None:
        self._pending.append(value)
        if len(self._pending) >= self._stride:
            self._values.append(self._largest(self._pending))
            self._pending = []
        if len(self._values) >= self._capacity:
            pairs = range(0, len(self._values), 2)
            self._values = [self._largest(self._values[at : at + 2]) for at in pairs]
            self._stride *= 2

    def values(self) -> list[T]:
        """The oldest first."""
        return [*self._values, *([self._largest(self._pending)] if self._pending else [])]

    def _largest(self, values: Iterable[T]) -> T:
        return max(values, key=self._size)
