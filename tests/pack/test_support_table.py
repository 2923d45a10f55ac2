"""What is made from the registry of formats is up to date: the documents' tables and the texts of the nodes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import support_table
from snug.quant_backends import registry

GGUF_TYPES = re.compile(r"GGUF \(\d+ types\)")


def test_the_documents_show_the_registry(root: Path) -> None:
    found = [str(path.relative_to(root)) for path in support_table.outdated()]
    assert found == [], "run: python scripts/support_table.py"


def test_an_outdated_document_is_rewritten() -> None:
    text = f"before\n{support_table.BEGIN}\n| old |\n{support_table.END}\nafter\n"
    new = support_table.updated(text, "| a |\n| b |\n\nwords " * 2)
    assert "old" not in new and new.startswith("before\n") and new.endswith("\nafter\n")
    assert support_table.updated(new, "| a |\n| b |\n\nwords " * 2) == new
    for broken in ("", text + text, text.replace(support_table.END, "")):
        with pytest.raises(ValueError, match="expected once"):
            support_table.updated(broken, "")


def test_the_command_reports_without_writing(root: Path) -> None:
    command = [sys.executable, str(root / "scripts" / "support_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_summary_names_every_kind() -> None:
    summary = registry.summary_for_tooltip()
    assert summary == "GGUF (27 types), NF4, FP4, INT8, FP8, quanto, torchao, diffusers folders"


def test_texts_of_nodes_that_list_formats_are_the_registrys(root: Path) -> None:
    locale = json.loads((root / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert registry.summary_for_tooltip() in " ".join(_texts(locale["SnugLoadDiffusionModel"]))
    for text in _texts(locale):
        assert not GGUF_TYPES.search(text) or registry.summary_for_tooltip() in text


def _texts(found: object) -> list[str]:
    if isinstance(found, dict):
        return [text for value in found.values() for text in _texts(value)]
    return [found] if isinstance(found, str) else []
