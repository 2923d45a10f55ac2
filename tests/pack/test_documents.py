"""What the documents claim is so: figures, messages, links, nodes and workflows that they name."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import figure_tables
import pytest

# A row of a table of messages: what is quoted in its first column.
ROW = re.compile(r"^\| (\"[^|]+\") \|", re.MULTILINE)
QUOTE = re.compile(r'"([^"]+)"')
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
TEMPLATE = re.compile(r"Template \*(\w+)\*|› (snug_\w+)\*|\*(snug_[a-z_0-9]+)\*")


def documents(root: Path) -> list[Path]:
    return [*root.glob("*.md"), *(root / "docs").rglob("*.md"), *(root / "web" / "docs").glob("*.md")]


def test_figures_are_those_of_the_results(root: Path) -> None:
    found = [str(path.relative_to(root)) for path, _ in figure_tables.outdated()]
    assert found == [], "run: $SNUG_PYTHON scripts/figure_tables.py"


@pytest.mark.parametrize("name", sorted(figure_tables.COMMITS))
def test_results_are_of_the_commit_that_is_named(name: str, root: Path) -> None:
    path = f"benchmarks/results/{name}.json"
    command = ["git", "show", f"{figure_tables.COMMITS[name]}:{path}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("the history of the repository is not here")
    assert done.stdout == (root / path).read_text(encoding="utf-8"), f"name the new commit of {path}"


def test_a_changed_figure_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure_tables, "RESERVE", 99.0)
    assert [path.name for path, _ in figure_tables.outdated()] == ["choosing.md"]


@pytest.mark.parametrize("document", ["README.md", "docs/troubleshooting.md"])
def test_quoted_messages_are_in_the_code(document: str, root: Path) -> None:
    messages = set(message_parts(root))
    rows = ROW.findall((root / document).read_text(encoding="utf-8"))
    quoted = [message for row in rows for message in QUOTE.findall(row)]
    assert len(quoted) >= 5
    for message in quoted:
        for part in message.split("…"):
            wanted = part.strip()
            assert any(wanted in text for text in messages), (document, message, wanted)


def message_parts(root: Path) -> Iterator[str]:
    """Every literal of the code, those of f-strings as one text with … for values."""
    for folder in ("nodes", "quant_backends"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
                elif isinstance(node, ast.JoinedStr):
                    yield "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
                    )


def test_links_lead_somewhere(root: Path) -> None:
    for document in documents(root):
        for target in LINK.findall(document.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                assert (document.parent / target).exists(), (document.name, target)


def test_readme_lists_every_node(root: Path) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    nodes = json.loads((root / "node_list.json").read_text(encoding="utf-8"))
    assert [name for name in nodes if f"(web/docs/{name}.md)" not in text] == []


def test_workflows_that_are_named_exist(root: Path) -> None:
    named = {
        name
        for document in documents(root)
        for match in TEMPLATE.findall(document.read_text(encoding="utf-8"))
        for name in match
        if name
    }
    assert len(named) > 5
    assert {name for name in named if not (root / "example_workflows" / f"{name}.json").exists()} == set()
