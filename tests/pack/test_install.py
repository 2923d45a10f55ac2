"""The pack as people get it: cloned, through ComfyUI-Manager's command line, and from the registry's archive.

ComfyUI-GGUF is started beside it where SNUG_COMFYUI_GGUF names a checkout.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from comfy_server import ComfyServer
from install_tools import tools_folder

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

MOST_BYTES = 3_000_000
PEER = os.environ.get("SNUG_COMFYUI_GGUF")


@pytest.fixture(scope="module")
def clone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `git clone` gives: what was committed last."""
    if not (root / ".git").exists():
        pytest.skip("this is not a git checkout")
    place = tmp_path_factory.mktemp("clone") / "ComfyUI-Snug"
    subprocess.run(["git", "clone", "--quiet", str(root), str(place)], check=True)
    return place


@pytest.fixture(scope="module")
def archive(clone: Path) -> Path:
    """What comfy-cli would upload to the registry."""
    comfy = [tools_folder() / "comfy", "--skip-prompt", "node"]
    checked = run([*comfy, "validate"], clone)
    assert "passed successfully" in checked and "warning" not in checked.lower(), checked
    run([*comfy, "pack"], clone)
    return clone / "node.zip"


def run(command: list[str | Path], folder: Path, **variables: str) -> str:
    home = folder.parent / "home"  # where these programs keep their settings
    home.mkdir(exist_ok=True)
    settings = {**os.environ, "HOME": str(home), "DO_NOT_TRACK": "1", "COLUMNS": "200", **variables}
    done = subprocess.run(
        command,
        cwd=folder,
        env=settings,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def published(checkout: Path) -> set[str]:
    """Tracked files that .comfyignore does not leave out."""

    def listed(*options: str) -> set[str]:
        command = ["git", "ls-files", "-z", *options]
        return set(subprocess.check_output(command, cwd=checkout, text=True).split("\0")) - {""}

    return listed() - listed("--cached", "--ignored", "--exclude-from=.comfyignore")


def test_size(clone: Path) -> None:
    files = published(clone)
    assert sum((clone / name).stat().st_size for name in files) < MOST_BYTES
    assert not any(name.startswith(("tests/", "benchmarks/", "scripts/")) for name in files)
    assert {"__init__.py", "requirements.txt", "web/snug.js", "locales/zh/nodeDefs.json"} <= files


def test_manager_installs_it(clone: Path, comfyui_path: Path, tmp_path: Path) -> None:
    """It clones, installs the requirements (which are there), and leaves ComfyUI as it was."""
    command = tools_folder() / "cm-cli"
    comfyui = tmp_path / "ComfyUI"
    skipped = shutil.ignore_patterns("models", "output", "tests*", "__pycache__", ".git")
    shutil.copytree(comfyui_path, comfyui, ignore=skipped)
    subprocess.run(["git", "init", "--quiet", str(comfyui)], check=True)
    source = f"file://localhost{clone.as_posix()}"
    said = run([command, "install", source, "--exit-on-fail"], comfyui, COMFYUI_PATH=str(comfyui))
    assert "Installation was successful" in said
    installed = comfyui / "custom_nodes" / "ComfyUI-Snug"
    assert published(installed) == published(clone)


def test_archive_works_beside_comfyui_gguf(
    archive: Path, clone: Path, comfyui_path: Path, tmp_path: Path
) -> None:
    """Everything that is needed is in it, and nothing of either pack is in the other's way."""
    place = tmp_path / "unpacked" / "ComfyUI-Snug"
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(place)
        assert set(packed.namelist()) - {"node.zip"} == published(clone)
    assert archive.stat().st_size < MOST_BYTES
    packs = {"ComfyUI-Snug": place} | ({"ComfyUI-GGUF": Path(PEER)} if PEER else {})
    with ComfyServer(Path(sys.executable), comfyui_path, tmp_path / "base", packs) as server:
        assert server.failed_imports() == [], server.log_tail()
        info = server.object_info()
        origin = {name: node["python_module"].rpartition(".")[2] for name, node in info.items()}
        ours = {name for name, pack in origin.items() if pack == "ComfyUI-Snug"}
        assert ours == set(json.loads((place / "node_list.json").read_text(encoding="utf-8")))
        assert {"en", "ja", "zh"} <= set(server.json("/i18n"))
        assert "snug_gguf" in server.json("/workflow_templates")["ComfyUI-Snug"]
        for node in sorted(ours):
            assert server.request(f"/extensions/ComfyUI-Snug/docs/{node}.md").startswith(b"# ")
        if PEER:
            theirs = {name for name, pack in origin.items() if pack == "ComfyUI-GGUF"}
            assert {"UnetLoaderGGUF", "CLIPLoaderGGUF"} <= theirs
