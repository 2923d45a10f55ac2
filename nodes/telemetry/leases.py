"""Who looks at the samples, and until when. No ComfyUI, no torch."""

from __future__ import annotations

import threading

MOST_CLIENTS = 32


class Leases:
    """By client. Times in seconds of a clock that only goes forward."""

    def __init__(self) -> None:
        self._ends: dict[str, tuple[float, bool]] = {}
        self._lock = threading.Lock()

    def renew(self, client_id: str, seconds: float, push: bool, now: float) -> None:
        """push: whether the client wants the samples sent. Raises ValueError when there are too many clients."""
        with self._lock:
            self._drop(now)
            if client_id not in self._ends and len(self._ends) >= MOST_CLIENTS:
                raise ValueError(f"{MOST_CLIENTS} clients look at the memory already; close one of them.")
            self._ends[client_id] = (now + seconds, push)

    def end(self, client_id: str) -> None:
        with self._lock:
            self._ends.pop(client_id, None)

    def clear(self) -> None:
        with self._lock:
            self._ends.clear()

    def active(self, now: float) -> bool:
        with self._lock:
            self._drop(now)
            return bool(self._ends)

    def receivers(self, now: float) -> list[str]:
        """The clients that samples are sent to."""
        with self._lock:
            self._drop(now)
            return [client_id for client_id, (_, push) in self._ends.items() if push]

    def _drop(self, now: float) -> None:
        self._ends = {client_id: entry for client_id, entry in self._ends.items() if entry[0] > now}
