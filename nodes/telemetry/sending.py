"""Sending samples to those who asked for them, without waiting for those who do not read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from .leases import Leases

# Type of the messages.
EVENT = "snug.telemetry"
# A client for which so many bytes wait gets no samples. ComfyUI sends all messages one after the other; from 64 KB on
# it would wait for the client.
MOST_BYTES = 16 << 10
# Nobody gets samples while so many messages wait for their turn.
MOST_MESSAGES = 100
PATIENCE = 10.0  # seconds until a client that does not read is forgotten


class Sender:
    """Puts samples into ComfyUI's queue of messages, if their receivers can take them.

    server: ComfyUI's PromptServer.
    """

    def __init__(self, server: Any, leases: Leases) -> None:
        self._server = server
        self._leases = leases
        self._late: dict[str, float] = {}

    def send(self, data: Mapping[str, Any], client_ids: list[str]) -> None:
        """From any thread; never waits."""
        self._server.loop.call_soon_threadsafe(self._enqueue, data, client_ids)

    def _enqueue(self, data: Mapping[str, Any], client_ids: list[str]) -> None:
        """On the thread of the server. A client that is gone is forgotten, and one that has not read for long."""
        self._late = {client_id: since for client_id, since in self._late.items() if client_id in client_ids}
        for client_id in client_ids:
            socket = self._server.sockets.get(client_id)
            if socket is None:
                self._leases.end(client_id)
            elif waiting_bytes(socket) > MOST_BYTES:
                since = self._late.setdefault(client_id, time.monotonic())
                if time.monotonic() - since > PATIENCE:
                    self._leases.end(client_id)
            else:
                self._late.pop(client_id, None)
                if self._server.messages.qsize() <= MOST_MESSAGES:
                    self._server.send_sync(EVENT, data, client_id)


def waiting_bytes(socket: Any) -> int:
    """Bytes for a websocket that the system has not taken yet, as its receiver does not read; 0 where aiohttp does not
    tell."""
    transport = getattr(getattr(socket, "_req", None), "transport", None)
    return 0 if transport is None else transport.get_write_buffer_size()
