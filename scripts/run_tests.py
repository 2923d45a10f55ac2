#!/usr/bin/env python3
"""The whole test suite, linters included, in the environment that bootstrap.py prepares.

./test [--comfyui PATH] [pytest arguments]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from bootstrap import ROOT, prepare
from console import ScriptError, say


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Run the tests; every other argument goes to pytest.", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--comfyui", metavar="PATH")
    own, pytest_arguments = parser.parse_known_args()
    try:
        environment = prepare(own.comfyui)
    except ScriptError as error:
        say(f"error: {error}")
        return 1
    variables = {
        **os.environ,
        **environment.variables(),
        "OMP_WAIT_POLICY": "passive",
        "RUFF_CACHE_DIR": str(environment.cache / "ruff"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(environment.cache / "hypothesis"),
    }
    # The pytest program, not "python -m pytest", which would put the checkout on sys.path.
    pytest = environment.python.with_name("pytest.exe" if os.name == "nt" else "pytest")
    command = [str(pytest), "-o", f"cache_dir={environment.cache / 'pytest'}", *pytest_arguments]
    return subprocess.run(command, cwd=ROOT, env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())
