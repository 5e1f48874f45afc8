"""Runs the tests of `eight_devices/`, each module in a process that has eight CPU devices."""

import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent / "eight_devices"
MODULES = sorted(path.name for path in FOLDER.glob("*.py") if path.name != "conftest.py")


@pytest.mark.parametrize("module", MODULES)
def test_module(module):
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(FOLDER / module)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
