"""Being told by ComfyUI which node runs: a handler of its progress registry, of which there is one per prompt."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from comfy_execution import progress
from comfy_execution.progress import ProgressRegistry as Registry

logger = logging.getLogger("snug")

NAME = "snug_telemetry"


class Listener(Protocol):
    """Called on the thread that runs the prompt."""

    def node_started(self, node_id: str, title: str) -> None: ...

    def node_stepped(self, node_id: str) -> None: ...

    def node_finished(self, node_id: str) -> None: ...

    def prompt_ended(self) -> None: ...


class Handler(progress.ProgressHandler):
    """ComfyUI lets a handler's error end the prompt: here one is logged, and nothing more is recorded of the prompt."""

    def __init__(self, listener: Listener, registry: Registry) -> None:
        super().__init__(NAME)
        self._listener = listener
        self._registry = registry

    def start_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        self._tell(lambda: self._listener.node_started(node_id, title(self._registry, node_id)))

    def update_handler(
        self, node_id: str, value: float, max_value: float, state: Any, prompt_id: str, image: Any = None
    ) -> None:
        self._tell(lambda: self._listener.node_stepped(node_id))

    def finish_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        self._tell(lambda: self._listener.node_finished(node_id))

    def reset(self) -> None:
        """ComfyUI is about to begin with the next prompt."""
        self._tell(self._listener.prompt_ended)
        self.disable()

    def _tell(self, call: Callable[[], None]) -> None:
        if not self.enabled:
            return
        try:
            call()
        except Exception:
            self.disable()
            logger.warning("The memory of this prompt is not recorded any further.", exc_info=True)


def of_this_thread() -> Registry:
    """Of the prompt that this thread runs."""
    return progress.get_progress_state()


def current() -> Registry | None:
    """Of the prompt that runs or ran last."""
    return progress.global_progress_registry


def title(registry: Registry, node_id: str) -> str:
    """The node as people know it: its title in the workflow, or its type where a program queued it, and its id."""
    node = registry.dynprompt.get_node(node_id)
    return f"{(node.get('_meta') or {}).get('title') or node['class_type']} #{node_id}"


def running(registry: Registry) -> list[str]:
    """Ids of the nodes that have started."""
    return [
        node_id
        for node_id, entry in list(registry.nodes.items())
        if entry["state"] is progress.NodeState.Running
    ]


def attach(handler: Handler) -> None:
    """To the registry of the prompt that this thread runs."""
    progress.add_progress_handler(handler)


def attach_from_outside(handler: Handler, registry: Registry) -> bool:
    """To the registry of a prompt that another thread runs; False while that is too early.

    The other thread may be in the middle of telling the handlers, and a dictionary must not grow then. So it is
    replaced, once ComfyUI's own handler is in it.
    """
    before = registry.handlers
    if "webui" not in before:
        return False
    registry.handlers = {**before, handler.name: handler}
    late = {name: other for name, other in list(before.items()) if name not in registry.handlers}
    if late:
        registry.handlers = {**registry.handlers, **late}
    return True
