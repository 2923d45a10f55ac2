"""The telemetry of this process, and what it needs of ComfyUI's server."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from .report import pushed_data
from .sending import Sender
from .service import OutOfMemory, Telemetry


@lru_cache
def telemetry() -> Telemetry:
    """The one of this process."""
    return Telemetry(
        is_running,
        out_of_memory,
        lambda number, sample, events, client_ids: _sender().send(
            pushed_data(number, sample, events), client_ids
        ),
    )


def prompt_server() -> Any:
    """ComfyUI's, None where the pack is imported without one."""
    from server import PromptServer

    return getattr(PromptServer, "instance", None)


@lru_cache
def _sender() -> Sender:
    return Sender(prompt_server(), telemetry().leases)


def is_running(prompt_id: str) -> bool:
    server = prompt_server()
    running, _ = server.prompt_queue.get_current_queue_volatile() if server is not None else ((), ())
    return any(item[1] == prompt_id for item in running)


def out_of_memory(prompt_id: str) -> OutOfMemory | None:
    """By ComfyUI's history of prompts."""
    found = prompt_server().prompt_queue.get_history(
        prompt_id, map_function=lambda entry: entry.get("status")
    )
    status = found.get(prompt_id) or {}
    for kind, details in status.get("messages") or ():
        if kind != "execution_error":
            continue
        text = str(details.get("exception_message", ""))
        name = str(details.get("exception_type", "")).rpartition(".")[2]
        is_ram = name == "MemoryError" or "DefaultCPUAllocator" in text
        if is_ram or name == "OutOfMemoryError" or "out of memory" in text.lower():
            return OutOfMemory(str(details.get("node_id")), is_ram)
    return None
