"""What the ComfyUI registry and ComfyUI-Manager read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from bootstrap import pyproject
from PIL import Image
from snug.quant_backends import registry


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


def test_pictures_of_the_registry(root: Path) -> None:
    """The addresses are those of files of this repository, of the size that it asks for."""
    comfy, address = pyproject()["tool"]["comfy"], pyproject()["project"]["urls"]["Repository"]
    base = address.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
    for name, largest, ratio in (("Icon", (400, 400), 1), ("Banner", (1600, 800), 21 / 9)):
        assert comfy[name].startswith(base)
        with Image.open(root / comfy[name].removeprefix(base)) as picture:
            assert picture.width <= largest[0] and picture.height <= largest[1]
            assert picture.width / picture.height == pytest.approx(ratio, rel=0.01)


def test_classifiers_name_systems_and_gpus(project: dict[str, Any]) -> None:
    kinds = {classifier.partition(" :: ")[0] for classifier in project["classifiers"]}
    assert kinds == {"Operating System", "Environment"}


def test_the_version_is_written_once(project: dict[str, Any], root: Path) -> None:
    """In pyproject.toml; the changelog heads its section with it."""
    code = [
        path
        for folder in ("nodes", "quant_backends", "web", "scripts")
        for path in (root / folder).rglob("*")
    ]
    code += [root / "__init__.py", root / "README.md", root / "node_list.json"]
    pattern = re.compile(rf"(?<![\d.]){re.escape(project['version'])}(?![\d.])")
    found = [
        str(path.relative_to(root))
        for path in code
        if path.suffix in {".py", ".js", ".mjs", ".json", ".md"} and pattern.search(path.read_text("utf-8"))
    ]
    assert found == []


def test_libraries_of_backends_are_extras(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    for backend in registry.BACKENDS.values():
        if backend.package is not None and backend.package not in project["dependencies"]:
            assert any(found == [backend.package] for found in extras.values()), backend.package


def test_requirements_are_the_project_dependencies(project: dict[str, Any], root: Path) -> None:
    lines = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines == project["dependencies"]


def test_requirements_pin_nothing(project: dict[str, Any]) -> None:
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", requirement) for requirement in project["dependencies"])


def test_changelog_names_the_version(project: dict[str, Any], root: Path) -> None:
    assert f"## [{project['version']}]" in (root / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_publish_workflow_is_the_registrys(root: Path) -> None:
    text = (root / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    assert "Comfy-Org/publish-node-action@v1" in text and "secrets.REGISTRY_ACCESS_TOKEN" in text


def test_node_list_is_json_by_node_id(root: Path) -> None:
    nodes = json.loads((root / "node_list.json").read_text(encoding="utf-8"))
    assert nodes
    assert all(name.startswith("Snug") and isinstance(text, str) for name, text in nodes.items())
