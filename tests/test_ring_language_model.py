"""The example trains alike in one process and in two."""

import json
import pathlib
import socket
import subprocess
import sys

import numpy as np

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "ring_language_model.py"
SMALL = ("--steps", "6", "--batch", "2", "--length", "64")


def started(losses, *options):
    command = [sys.executable, str(SCRIPT), *SMALL, "--losses", str(losses), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    where = ("--coordinator", f"localhost:{port}", "--processes", "2", "--process")
    both = [started(tmp_path / "two.json", *where, str(i)) for i in range(2)]
    outputs = [finished(process) for process in both]
    assert "step 6:" in outputs[0]
    assert "step" not in outputs[1].replace("steps", "")
    finished(started(tmp_path / "one.json"))
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert len(one) == 6
    assert one[-1] < one[0] - 0.5
    np.testing.assert_allclose(two, one, rtol=1e-4)
