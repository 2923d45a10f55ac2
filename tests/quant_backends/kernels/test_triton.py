"""The tests of the GPU kernels, run in Triton's interpreter: it has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "test_decoding_kernels.py",
        "test_product_kernels.py",
        "test_rounding_kernels.py",
        "test_first_results.py",
    ],
)
def test_in_the_interpreter(name: str, root: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    pytest_program = Path(sys.executable).with_name("pytest")
    command = [
        str(pytest_program),
        "-q",
        "-x",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        f"tests/gpu/{name}",
    ]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stdout[-8000:] + done.stderr[-2000:], pytrace=False)
    assert " passed" in done.stdout and "skipped" not in done.stdout
