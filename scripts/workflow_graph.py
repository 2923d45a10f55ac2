"""Build a workflow as ComfyUI's page saves it: nodes in columns, none over another, links, values of widgets.

    graph = Graph(object_info)
    model = graph.add("SnugLoadDiffusionModel", 0, model_name="flux1-dev-Q4_K_S.gguf")
    graph.add("KSampler", 2, model=model, seed=1)     # further inputs keep their defaults
    workflow = graph.workflow()

`object_info` is what a ComfyUI server answers at /object_info: it says which inputs are widgets and in which order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
# In pixels of the page's canvas; a node's position is that of its body, with the title above.
LEFT, TOP = 40, 60
COLUMN_GAP, ROW_GAP, TITLE = 60, 44, 30
SLOT, WIDGET, TEXT = 22, 26, 120
WIDTH = 320


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a node of the graph."""

    node: int
    slot: int


@dataclass(slots=True)
class _Node:
    id: int
    type: str
    column: int
    size: tuple[int, int]
    title: str | None
    links: dict[str, Output]
    values: list[Any]
    inputs: list[tuple[str, str]] = field(default_factory=list)  # those that are no widgets: name, type
    outputs: list[tuple[str, str]] = field(default_factory=list)


class Graph:
    def __init__(self, object_info: Mapping[str, Any]) -> None:
        self._info = object_info
        self._nodes: list[_Node] = []

    def add(
        self,
        node_type: str,
        column: int,
        /,
        *,
        title: str | None = None,
        size: tuple[int, int] | None = None,
        **given: Any,
    ) -> Output:
        """Adds a node and returns its first output; `given`: an Output or the value of a widget, for each input.

        Raises KeyError for a node or input that ComfyUI does not have.
        """
        described = self._info[node_type]
        inputs = [
            (name, entry)
            for part in ("required", "optional")
            for name, entry in described["input"].get(part, {}).items()
        ]
        unknown = set(given) - {name for name, _ in inputs}
        if unknown:
            raise KeyError(f"{node_type} has no input {', '.join(sorted(unknown))}")
        links = {name: value for name, value in given.items() if isinstance(value, Output)}
        values: list[Any] = []
        slots = []
        for name, (kind, *options) in inputs:
            if not _is_widget(kind):
                slots.append((name, kind))
                continue
            settings = options[0] if options else {}
            values.append(given.get(name, _default(kind, settings)))
            if settings.get("control_after_generate"):
                values.append("fixed")
        outputs = list(zip(described["output_name"], described["output"], strict=True))
        texts = sum(bool(entry[1:] and entry[1].get("multiline")) for _, entry in inputs)
        height = SLOT * max(len(slots), len(outputs)) + WIDGET * len(values) + TEXT * texts + 10
        node = _Node(
            len(self._nodes) + 1,
            node_type,
            column,
            size or (WIDTH, height),
            title,
            links,
            values,
            slots,
            outputs,
        )
        self._nodes.append(node)
        return Output(node.id, 0)

    def note(self, text: str, column: int, size: tuple[int, int]) -> None:
        self._nodes.append(_Node(len(self._nodes) + 1, "MarkdownNote", column, size, "Note", {}, [text]))

    def workflow(self) -> dict[str, Any]:
        """The graph as JSON; nodes of a column stand below one another in the order they were added."""
        links = self._links()
        positions = self._positions()
        nodes = [self._node(node, order, positions[node.id], links) for order, node in enumerate(self._nodes)]
        return {
            "last_node_id": len(nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _links(self) -> list[list[Any]]:
        """[id, from node, its slot, to node, its slot, type] for each."""
        found: list[list[Any]] = []
        for node in self._nodes:
            for slot, (name, _) in enumerate(node.inputs):
                source = node.links.get(name)
                if source is not None:
                    kind = self._nodes[source.node - 1].outputs[source.slot][1]
                    found.append([len(found) + 1, source.node, source.slot, node.id, slot, kind])
        return found

    def _positions(self) -> dict[int, list[int]]:
        positions = {}
        left = LEFT
        for column in sorted({node.column for node in self._nodes}):
            members = [node for node in self._nodes if node.column == column]
            top = TOP
            for node in members:
                positions[node.id] = [left, top]
                top += node.size[1] + TITLE + ROW_GAP
            left += max(node.size[0] for node in members) + COLUMN_GAP
        return positions

    def _node(self, node: _Node, order: int, position: list[int], links: list[list[Any]]) -> dict[str, Any]:
        incoming = {link[4]: link[0] for link in links if link[3] == node.id}
        found = {
            "id": node.id,
            "type": node.type,
            "pos": position,
            "size": list(node.size),
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": [
                {"name": name, "type": kind, "link": incoming.get(slot)}
                for slot, (name, kind) in enumerate(node.inputs)
            ],
            "outputs": [
                {"name": name, "type": kind, "links": [k[0] for k in links if k[1:3] == [node.id, slot]]}
                for slot, (name, kind) in enumerate(node.outputs)
            ],
            "properties": {"Node name for S&R": node.type},
            "widgets_values": node.values,
        }
        return found | ({"title": node.title} if node.title else {})


def _is_widget(kind: Any) -> bool:
    """ComfyUI's older nodes give the list of choices in place of a type."""
    return isinstance(kind, list) or kind in WIDGET_TYPES


def _default(kind: Any, settings: Mapping[str, Any]) -> Any:
    if "default" in settings:
        return settings["default"]
    choices = kind if isinstance(kind, list) else settings.get("options", [])
    if choices:
        return choices[0]
    return {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(str(kind), "")
