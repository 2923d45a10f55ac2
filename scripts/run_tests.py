#!/usr/bin/env python3
"""The whole test suite, linters included, in the environment that bootstrap.py prepares.

./test [--comfyui PATH] [pytest arguments]

Test files run side by side, one process for each core; `-n 0` runs them in one process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from bootstrap import ROOT, prepare, prepare_node_packages
from console import ScriptError, say

# A process with ComfyUI and a server of its own take about 3 GB.
MOST_PROCESSES = 4


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Run the tests; every other argument goes to pytest.", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--comfyui", metavar="PATH")
    own, pytest_arguments = parser.parse_known_args()
    try:
        environment = prepare(own.comfyui)
        prepare_node_packages(environment)
    except ScriptError as error:
        say(f"error: {error}")
        return 1
    processes = min(os.cpu_count() or 1, MOST_PROCESSES)
    variables = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        **os.environ,
        **environment.variables(),
        "OMP_WAIT_POLICY": "passive",
        "RUFF_CACHE_DIR": str(environment.cache / "ruff"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(environment.cache / "hypothesis"),
    }
    # The pytest program, not "python -m pytest", which would put the checkout on sys.path.
    pytest = environment.python.with_name("pytest.exe" if os.name == "nt" else "pytest")
    command = [str(pytest), "-o", f"cache_dir={environment.cache / 'pytest'}", "-n", str(processes)]
    # Tests of one file share what they have set up.
    command += ["--dist", "loadfile", *pytest_arguments]
    return subprocess.run(command, cwd=ROOT, env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())
