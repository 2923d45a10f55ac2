"""Clients on real websockets of ComfyUI's own server, in this process: they come, leave, and do not read."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import socket
import sys
import threading
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from aiohttp import web

CLIENTS, TICKS, ROUND, AT_ONCE = 5, 1000, 50, 10
TIMEOUT = 60


class Server:
    """ComfyUI's PromptServer with its queue of messages, on a thread of its own, and a Telemetry that sends there."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True, name="server").start()
        self.port = self.run(self._start())

    async def _start(self) -> int:
        from server import PromptServer
        from snug.nodes.telemetry.report import pushed_data
        from snug.nodes.telemetry.sending import Sender
        from snug.nodes.telemetry.service import Telemetry

        self.server = PromptServer(self.loop)
        self.server.add_routes()
        self.telemetry = Telemetry(lambda _: False, lambda _: None, self._send)
        self.sender = Sender(self.server, self.telemetry.leases)
        self._pushed_data = pushed_data
        self._publishing = self.loop.create_task(self.server.publish_loop())
        self._runner = web.AppRunner(self.server.app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return self._runner.addresses[0][1]

    def _send(self, number: int, sample: Any, events: Any, clients: list[str]) -> None:
        self.sender.send(self._pushed_data(number, sample, events), clients)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(TIMEOUT)

    async def connect(self, session: aiohttp.ClientSession, name: str) -> Any:
        client = await session.ws_connect(f"http://127.0.0.1:{self.port}/ws?clientId={name}")
        self.telemetry.leases.renew(name, 1e6, True, 0.0)
        await client.receive()  # ComfyUI says hello
        return client

    def tick(self) -> None:
        self.telemetry._sample()

    def settle(self) -> None:
        """Until everything that was sent before has been handled."""

        async def empty() -> None:
            while self.server.messages.qsize():
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)

        self.run(empty())

    def stop(self) -> None:
        self._publishing.cancel()
        self.run(self._runner.cleanup())
        self.loop.call_soon_threadsafe(self.loop.stop)


@pytest.fixture(scope="module")
def server(comfyui_path: Path) -> Iterator[Server]:
    # ComfyUI's nodes.py puts a folder with a utils.py before its own package of that name.
    sys.path.insert(0, str(comfyui_path))
    importlib.import_module("utils.install_util")
    from server import PromptServer

    before = getattr(PromptServer, "instance", None)
    made = Server()
    yield made
    made.stop()
    sys.path.remove(str(comfyui_path))
    if before is None:
        del PromptServer.instance
    else:
        PromptServer.instance = before


async def samples_of(client: Any, count: int) -> list[dict[str, Any]]:
    """The next samples that come."""
    found: list[dict[str, Any]] = []
    while len(found) < count:
        message = await asyncio.wait_for(client.receive(), TIMEOUT)
        data = json.loads(message.data)
        if data["type"] == "snug.telemetry":
            found.append(data["data"])
    return found


def count_everything() -> tuple[int, int, int, int]:
    """(traced bytes, objects, threads, sockets)"""
    gc.collect()
    traced, _ = tracemalloc.get_traced_memory()
    sockets = len(psutil.Process().net_connections("inet"))
    return traced, len(gc.get_objects()), threading.active_count(), sockets


def test_clients_that_come_and_leave_leak_nothing(server: Server) -> None:
    """Every round of ticks has five connections, of which some take leave and some are just gone. They use the same
    names, as the client library remembers addresses."""
    from snug.nodes.telemetry.buffers import RingBuffer

    async def round_of(number: int) -> None:
        async with aiohttp.ClientSession() as session:
            clients = [await server.connect(session, f"client{place}") for place in range(CLIENTS)]
            for _ in range(0, ROUND, AT_ONCE):
                await asyncio.get_running_loop().run_in_executor(None, ticks, AT_ONCE)
                for client in clients:
                    await samples_of(client, AT_ONCE)
            for client in clients[: number % CLIENTS]:
                await client.close()

    def ticks(count: int) -> None:
        for _ in range(count):
            server.tick()

    def gone() -> None:
        """The samples after the clients have left: they are forgotten."""
        server.settle()
        server.tick()
        server.settle()
        assert server.server.sockets == {} and not server.telemetry.leases.active(1.0)

    def rounds(numbers: range) -> None:
        for number in numbers:
            server.run(round_of(number))
            gone()

    server.telemetry.history = RingBuffer(ROUND)  # full after a round
    tracemalloc.start()
    try:
        rounds(range(3))
        before = count_everything()
        rounds(range(TICKS // ROUND))
        after = count_everything()
    finally:
        tracemalloc.stop()
    traced, objects, threads, sockets = (new - old for new, old in zip(after, before, strict=True))
    assert (threads, sockets) == (0, 0)
    # Samples have a kilobyte, and a client has more than ten objects.
    assert traced < 100 * TICKS and objects < TICKS // 2, (traced, objects)


def test_a_client_that_does_not_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it, what waits for it is bounded, its lease ends, and the others get every sample."""
    from snug.nodes.telemetry import sending

    monkeypatch.setattr(sending, "PATIENCE", 0.2)
    stuck = socket.socket()
    stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stuck.connect(("127.0.0.1", server.port))
    head = (
        "GET /ws?clientId=stuck HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    )
    key = "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    stuck.sendall((head + key).encode())

    async def both(is_over: Callable[[], bool]) -> int:
        async with aiohttp.ClientSession() as session:
            client = await server.connect(session, "reader")
            while "stuck" not in server.server.sockets:
                await asyncio.sleep(0.01)
            end_of_system_buffers(server.server.sockets["stuck"])
            server.telemetry.leases.renew("stuck", 1e6, True, 0.0)
            ticks, most = 0, 0
            while not is_over():
                await asyncio.get_running_loop().run_in_executor(None, server.tick)
                await samples_of(client, 1)  # comes at once, whatever the other one does
                ticks += 1
                waiting = sending.waiting_bytes(server.server.sockets["stuck"])
                most = max(most, waiting)
            assert 0 < most < 4 * sending.MOST_BYTES and server.server.messages.qsize() == 0
            # What ComfyUI itself sends to all goes through as well.
            server.server.send_sync("status", {})
            while json.loads((await client.receive()).data)["type"] != "status":
                pass
            await client.close()
            return ticks

    try:
        ticks = server.run(both(lambda: server.telemetry.leases.receivers(0.0) == ["reader"]))
    finally:
        stuck.close()
    assert ticks > 10


def end_of_system_buffers(websocket: Any) -> None:
    """The system takes little for this client, so that few samples suffice."""
    taken = websocket.get_extra_info("socket")
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
