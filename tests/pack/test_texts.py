"""Texts of the nodes are complete, in every language: what ComfyUI's page, its help and its Manager show."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import node_texts
import pytest
from tiny import use_comfyui

pytestmark = pytest.mark.comfy

# The page's translations are messages of vue-i18n, to which these are syntax.
SYNTAX = re.compile(r"[{}@|]")
# In help pages: what is typed or chosen; beginnings of headings and rows of tables.
LITERAL = re.compile(r"`[^`\n]+`")
BLOCK = re.compile(r"^ *(?:#+ |\|)", re.MULTILINE)
# Named by ComfyUI itself, in every language.
COMFYUI_CATEGORIES = {"loaders"}


@pytest.fixture(scope="module")
def schemas(comfyui_path: Path) -> list[Any]:
    use_comfyui(comfyui_path)
    return [node.GET_SCHEMA() for node in node_texts.node_classes()]


@pytest.fixture(scope="module")
def texts(schemas: list[Any]) -> node_texts.Texts:
    return node_texts.english_texts()


def test_nodes_and_their_inputs_are_described(schemas: list[Any]) -> None:
    missing = []
    for schema in schemas:
        assert re.fullmatch(r"Snug[A-Za-z]+", schema.node_id)
        assert schema.display_name.endswith("(Snug)")
        if not schema.description:
            missing.append(schema.node_id)
        entries = [(entry.id, entry) for entry in schema.inputs]
        entries += [(f"output {number}", entry) for number, entry in enumerate(schema.outputs)]
        missing += [f"{schema.node_id}: {name}" for name, entry in entries if not entry.tooltip]
    assert missing == [], "have no description or tooltip"


def test_generated_files_are_up_to_date_and_translated(texts: node_texts.Texts, root: Path) -> None:
    files, translations = node_texts.wanted_files(texts)
    found = [str(path.relative_to(root)) for path in node_texts.outdated(files)]
    assert found == [], "run: $SNUG_PYTHON scripts/node_texts.py"
    assert [found.language for found in translations] == ["ja", "zh"]
    for translation in translations:
        assert list(translation.missing) == [], (
            f"scripts/translations/{translation.language}.json lacks these"
        )
        assert translation.stale == [], (
            f"scripts/translations/{translation.language}.json has them for nothing"
        )


def test_each_language_has_the_same_files(root: Path) -> None:
    english = {path.name for path in (root / "locales" / "en").iterdir()}
    for folder in (root / "locales").iterdir():
        assert {path.name for path in folder.iterdir()} == english


@pytest.mark.parametrize("heading", ["When to use it", "Inputs", "Outputs?", "Trade-offs", "Example"])
def test_help_pages_have(heading: str, schemas: list[Any], root: Path) -> None:
    missing = [
        schema.node_id
        for schema in schemas
        if not re.search(rf"^## {heading}$", _help(root, schema.node_id), re.MULTILINE)
    ]
    assert missing == []


def test_help_pages_name_the_node_and_every_input(schemas: list[Any], root: Path) -> None:
    for schema in schemas:
        text = _help(root, schema.node_id)
        assert text.startswith(f"# {schema.display_name}\n")
        # "`positive_2` to `positive_4`" and the like stand for those between as well.
        ranges = set(re.findall(r"`(\w+_)\d`(?: to |–| … )`\1\d`", text))
        for entry in schema.inputs:
            assert f"`{entry.id}`" in text or entry.id.rstrip("0123456789") in ranges, (
                schema.node_id,
                entry.id,
            )


def test_translated_help_pages_say_what_the_english_ones_do(root: Path) -> None:
    """ComfyUI's page asks for docs/<node>/<language>.md, and where there is none for docs/<node>.md, which is English.

    Headings and tables have as many lines, every input is named, and nothing is typed or chosen that the English page
    does not have; nodes are called what they are called in that language.
    """
    pages = sorted((root / "web" / "docs").glob("*/*"))
    assert pages
    for page in pages:
        node_id, language = page.parent.name, page.stem
        names = {
            found: node["display_name"]
            for found, node in json.loads(
                (root / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8")
            ).items()
        }
        text, english = page.read_text(encoding="utf-8"), _help(root, node_id)
        assert text.startswith(f"# {names[node_id]}\n"), page
        assert set(LITERAL.findall(text)) <= set(LITERAL.findall(english)), page
        inputs = text.split("\n## ")[2], english.split("\n## ")[2]
        assert len(set(map(frozenset, map(LITERAL.findall, inputs)))) == 1, page
        assert BLOCK.findall(text) == BLOCK.findall(english), page
        assert set(re.findall(r"[“「]([^“「]+\(Snug\))[”」]", text)) <= set(names.values()), page


def test_texts_are_no_syntax_of_the_page(root: Path) -> None:
    for path in (root / "locales").rglob("*.json"):
        for text in _texts(json.loads(path.read_text(encoding="utf-8"))):
            assert not SYNTAX.search(text), (path, text)


def test_numbers_and_names_survive_translation() -> None:
    """What must be typed or is measured is the same in every language: numbers, options, folders, names of formats."""
    kept = re.compile(r"%\w+%|[\w./]*\d[\w./]*|--[\w-]+|models/\w+")
    for language in node_texts.languages():
        for english, translated in node_texts.translation(language).table.items():
            if " " not in english:  # the name of an input
                continue
            wanted = {part.strip("./").lower() for part in kept.findall(english)}
            lost = {part for part in wanted if part not in translated.lower()}
            assert lost == set(), (language, english)


def test_categories_are_named(schemas: list[Any], root: Path) -> None:
    named = json.loads((root / "locales" / "en" / "main.json").read_text(encoding="utf-8"))["nodeCategories"]
    used = {part for schema in schemas for part in schema.category.split("/")[1:]}
    assert used - COMFYUI_CATEGORIES == set(named)


def test_what_is_missing_or_stale_is_found() -> None:
    translation = node_texts.Translation("xx", {"one": "eins", "gone": "weg"})
    texts: node_texts.Texts = {
        "Node": {"display_name": "one", "inputs": {"a": {"name": "MODEL", "tooltip": "two"}}}
    }
    before = copy.deepcopy(texts)
    made = translation.of(texts)
    assert made == {"Node": {"display_name": "eins", "inputs": {"a": {"name": "MODEL", "tooltip": "two"}}}}
    assert texts == before
    assert list(translation.missing) == ["two"] and translation.stale == ["gone"]


def _help(root: Path, node_id: str) -> str:
    return (root / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")


def _texts(found: Any) -> list[str]:
    return (
        [text for value in found.values() for text in _texts(value)] if isinstance(found, dict) else [found]
    )
