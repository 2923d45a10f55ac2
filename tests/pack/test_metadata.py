"""What the ComfyUI registry and ComfyUI-Manager read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from bootstrap import pyproject


@pytest.fixture
def project() -> dict[str, Any]:
    return pyproject()["project"]


def test_project_fields(project: dict[str, Any], root: Path) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_-]*", project["name"])
    assert "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["urls"]["Repository"].startswith("https://")
    assert "Apache License" in (root / project["license"]["file"]).read_text(encoding="utf-8")


def test_comfy_fields() -> None:
    comfy = pyproject()["tool"]["comfy"]
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    assert comfy["requires-comfyui"].startswith(">=")
    assert "web" not in comfy  # ComfyUI would load the scripts a second time beside WEB_DIRECTORY


def test_requirements_are_the_project_dependencies(project: dict[str, Any], root: Path) -> None:
    lines = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines == project["dependencies"]


def test_requirements_pin_nothing(project: dict[str, Any]) -> None:
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", requirement) for requirement in project["dependencies"])


def test_changelog_names_the_version(project: dict[str, Any], root: Path) -> None:
    assert f"## [{project['version']}]" in (root / "CHANGELOG.md").read_text(encoding="utf-8")


def test_node_list_is_json_by_node_id(root: Path) -> None:
    nodes = json.loads((root / "node_list.json").read_text(encoding="utf-8"))
    assert nodes
    assert all(name.startswith("Snug") and isinstance(text, str) for name, text in nodes.items())
