"""The README: its code runs, its commands exist, its table is what `explain` says."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from flash_attention_jax import explain
from flash_attention_jax._dispatch import IMPLEMENTATIONS

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def run(block, length):
    if re.search(r"^import torch\b", block, re.M):
        pytest.importorskip("torch", reason="PyTorch is not installed: the README's example of it is not run")
    names = {}
    exec(compile(block.replace("131072", str(length)), "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_code_runs(index):
    run(BLOCKS[index], 1536)


def test_the_seeds_first_example_gives_the_shape_it_promises():
    assert run(BLOCKS[0], 1536)["out"].shape == (1536, 512)


def test_the_seeds_second_example_keeps_its_bounds(capsys):
    names = run(BLOCKS[1], 1536)
    assert names["diff"] < 1e-4
    for name in ("dq_diff", "dk_diff", "dv_diff"):
        assert names[name] < 1e-6
    assert "shows differences" in capsys.readouterr().out


def test_both_commands_of_the_set_up_are_there():
    commands = re.findall(r"```sh\n(.*?)\n```", README, re.S)
    assert [command.split(" && ")[1] for command in commands] == [
        "python -m flash_attention_jax demo",
        "python -m pytest -n 2",
    ]


def test_the_table_of_support_is_what_explain_says():
    rows = re.findall(r"^\| `(\w+)`.*\| all \| nothing \| \w+ \|$", README, re.M)
    q = np.ones((4, 8, 16), np.float32)
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        said = explain(
            q, q, q, bias=q[:, :, :8], mask=q[0, 0, :8] > 0, window=3, softcap=2.0, platform=platform
        )
        assert [name for name in IMPLEMENTATIONS if said.refusals[name] is None] == rows


def test_the_readme_is_short():
    assert README.count("\n") <= 150
    assert (ROOT / "CONTRIBUTING.md").read_text().count("\n") <= 40


def test_importing_imports_neither_torch_nor_kernels_nor_the_command_line():
    code = (
        "import sys, flash_attention_jax; "
        "print([m for m in ('torch', 'rich', 'matplotlib', 'jax.experimental.pallas') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"
