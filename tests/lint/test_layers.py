"""Who may import whom. ruff's banned-api covers ComfyUI and torch.cuda; this covers the pack's own rooms."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp
import pytest

# What a module of the core may import from outside the pack and the standard library. Everything but torch is
# optional and imported where it is used.
CORE_MAY_IMPORT = {
    "torch",
    "gguf",
    "libgguf",
    "triton",
    "comfy_kitchen",
    "bitsandbytes",
    "torchao",
    "optimum",
    "tqdm",
}
ROOMS_OF_NODES = ("snug.nodes.adapter", "snug.nodes.measure", "snug.nodes.telemetry")


@pytest.fixture
def imports(snug_folder: Path, monkeypatch: pytest.MonkeyPatch) -> grimp.ImportGraph:
    monkeypatch.syspath_prepend(snug_folder)
    monkeypatch.delitem(sys.modules, "snug")  # grimp asks the import system where the package is
    return grimp.build_graph(
        "snug", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )


def test_layer_contracts(root: Path, snug_folder: Path, tool_environment: dict[str, str]) -> None:
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    command = (
        [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code]
    )
    command += ["--config", str(root / "pyproject.toml"), "--no-cache"]
    environment = {**tool_environment, "PYTHONPATH": str(snug_folder)}
    done = subprocess.run(command, cwd=snug_folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_core_imports_only_torch_and_optional_libraries(imports: grimp.ImportGraph) -> None:
    found = {
        f"{importer} imports {imported}"
        for importer in imports.find_descendants("snug.quant_backends")
        for imported in imports.find_modules_directly_imported_by(importer)
        if not imported.startswith("snug.")
        and imported not in CORE_MAY_IMPORT
        and imported not in sys.stdlib_module_names
    }
    assert found == set()


def test_nodes_reach_the_backends_only_through_the_adapter(imports: grimp.ImportGraph) -> None:
    found = {
        f"{importer} imports {imported}"
        for importer in imports.find_descendants("snug.nodes")
        if not importer.startswith(ROOMS_OF_NODES)
        for imported in imports.find_modules_directly_imported_by(importer)
        if imported.startswith("snug.quant_backends")
    }
    assert found == set()
