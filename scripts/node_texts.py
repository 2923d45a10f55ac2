"""Write the texts of the nodes for ComfyUI's page and Manager from where each is written once.

    python scripts/node_texts.py            # rewrites what is out of date, and lists what is to be translated
    python scripts/node_texts.py --check    # only says what is, and fails

English is written in the node classes: `locales/en/nodeDefs.json` and `node_list.json` follow from them. Other
languages are tables from the English text to its translation, `scripts/translations/<language>.json`, so that a
changed text has no translation until somebody has looked at it; `locales/<language>/*.json` follow from them.
Needs ComfyUI: `eval "$(python3 scripts/bootstrap.py --print-env)"`, then `$SNUG_PYTHON scripts/node_texts.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from snug_path import ROOT, register_snug

Texts: TypeAlias = "dict[str, str | Texts]"

ENGLISH = "en"
# Written by hand in English: what the page's own code shows in ComfyUI's menus and settings.
WRITTEN_IN_ENGLISH = ("commands.json", "main.json", "settings.json")
NODES = "nodeDefs.json"


@dataclass
class Translation:
    """The table of one language, and how it was used: `missing` English texts, and those that nothing has any more."""

    language: str
    table: Mapping[str, str]
    used: set[str] = field(default_factory=set)
    missing: dict[str, None] = field(default_factory=dict)

    def of(self, texts: Texts) -> Texts:
        """`texts` with every text translated; what has no translation stays English."""
        return {
            key: self.of(value) if isinstance(value, dict) else self._text(value)
            for key, value in texts.items()
        }

    @property
    def stale(self) -> list[str]:
        return [text for text in self.table if text not in self.used]

    def _text(self, text: str) -> str:
        if is_a_type(text):
            return text
        self.used.add(text)
        if text not in self.table:
            self.missing[text] = None
        return self.table.get(text, text)


def is_a_type(text: str) -> bool:
    """Names of ComfyUI's types (MODEL, CLIP) are the same in every language."""
    return text.isupper()


def node_classes() -> list[Any]:
    """The pack's nodes, without what starting it does besides: its routes want ComfyUI's server."""
    register_snug()
    from snug.nodes import SnugExtension
    from snug.nodes.adapter import folders

    folders.register()
    return asyncio.run(SnugExtension().get_node_list())


def english_texts() -> Texts:
    """`nodeDefs.json` in English, from the node classes; ComfyUI must be importable."""
    schemas = [node.GET_SCHEMA() for node in node_classes()]
    return {
        schema.node_id: _texts_of(schema) for schema in sorted(schemas, key=lambda schema: schema.node_id)
    }


def node_list(texts: Texts) -> dict[str, str]:
    """`node_list.json`, by which ComfyUI-Manager knows what the pack has: each node with what it does."""
    return {node_id: texts["description"] for node_id, texts in texts.items()}  # type: ignore[index,misc]


def languages() -> list[str]:
    return sorted(path.stem for path in (ROOT / "scripts" / "translations").glob("*.json"))


def translation(language: str) -> Translation:
    return Translation(language, _read(ROOT / "scripts" / "translations" / f"{language}.json"))


def wanted_files(nodes: Texts) -> tuple[dict[Path, Any], list[Translation]]:
    """What each generated file should hold, and how far the translations go."""
    locales = ROOT / "locales"
    english = {NODES: nodes}
    english |= {
        name: _read(locales / ENGLISH / name)
        for name in WRITTEN_IN_ENGLISH
        if (locales / ENGLISH / name).exists()
    }
    files: dict[Path, Any] = {locales / ENGLISH / NODES: nodes, ROOT / "node_list.json": node_list(nodes)}
    translations = [translation(language) for language in languages()]
    for found in translations:
        for name, texts in english.items():
            files[locales / found.language / name] = found.of(texts)
    return files, translations


def outdated(files: Mapping[Path, Any]) -> Iterator[Path]:
    for path, content in files.items():
        if not path.exists() or path.read_text(encoding="utf-8") != _written(content):
            yield path


def _texts_of(schema: Any) -> Texts:
    inputs: Texts = {
        entry.id: _named(entry.display_name or entry.id, entry.tooltip) for entry in schema.inputs
    }
    outputs: Texts = {
        str(number): _named(entry.display_name or entry.io_type, entry.tooltip)
        for number, entry in enumerate(schema.outputs)
    }
    texts: Texts = {"display_name": schema.display_name, "description": schema.description}
    if inputs:
        texts["inputs"] = inputs
    if outputs:
        texts["outputs"] = outputs
    return texts


def _named(name: str, tooltip: str | None) -> Texts:
    return {"name": name, "tooltip": tooltip} if tooltip else {"name": name}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _written(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--comfyui", default=os.environ.get("SNUG_COMFYUI_PATH"), metavar="PATH")
    options = parser.parse_args()
    if not options.comfyui:
        parser.error("ComfyUI is needed: give --comfyui PATH or set SNUG_COMFYUI_PATH")
    from tiny import use_comfyui

    use_comfyui(options.comfyui)
    files, translations = wanted_files(english_texts())
    failed = False
    for path in list(outdated(files)):
        failed = True
        print(f"{path.relative_to(ROOT)} is out of date" + ("" if options.check else ": rewritten"))
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_written(files[path]), encoding="utf-8")
    for found in translations:
        for what, texts in (("missing", found.missing), ("not used", found.stale)):
            failed = failed or bool(texts)
            for text in texts:
                print(
                    f"scripts/translations/{found.language}.json, {what}: {json.dumps(text, ensure_ascii=False)}"
                )
    if options.check and failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
