"""`bench --devices`: every strategy beside one device at its part of the length."""

import json

import jax
import pytest

from flash_attention_jax.__main__ import main

# Before the command asks for as many as it divides over.
jax.devices()

COMMAND = ("bench", "--devices", "2", "--lengths", "32", "--head-dims", "8", "--heads", "2", "--repeats", "1")


def test_bench_over_devices(capsys, tmp_path):
    stored = tmp_path / "a.json"
    assert main([*COMMAND, "--causal", "--json", str(stored)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "share of 2 times flash_attention on one device at 1/2 of the length" in shown
    rows = json.loads(stored.read_text())["rows"]
    found = [(r["workload"]["length"], r["mode"], [c["peer"] for c in r["cells"]]) for r in rows]
    ways = ["ring:zigzag", "ring:contiguous", "all_to_all", "all_gather"]
    modes = ("forward", "forward+backward")
    assert found == [(n, m, who) for n, who in ((16, ["flash_attention"]), (32, ways)) for m in modes]
    assert all(c["status"] == "measured" for r in rows for c in r["cells"])
    # Each rate is that of all devices, and its share that of two alone.
    alone, together = (r["cells"][0]["flops_per_second"] for r in (rows[0], rows[2]))
    assert f"{together / (2 * alone):.2f}x" in shown
    assert main(["bench", "--from", str(stored)]) == 0
    assert f"{together / (2 * alone):.2f}x" in capsys.readouterr().out


def test_heads_that_do_not_divide(capsys):
    assert main([*COMMAND, "--kv-heads", "1", "--modes", "forward", "--peers", "all_to_all,ring:zigzag"]) == 0
    assert "the head count K = 1 of k and v is not divided by 2 devices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lengths", "30"), "--lengths must be multiples of twice the number of devices, 4, got 30"),
        (("--devices", "16"), "--devices must be at most the devices there are, 8, got 16"),
        (("--bias", "NTS"), "must be without --devices"),
        (("--baseline", "attention"), "--baseline cannot be given with --devices"),
        (("--plot", "a.png"), "--plot cannot be given with --devices"),
        (("--peers", "torch"), "peers must be of ring:zigzag"),
    ],
)
def test_what_cannot_be_measured(capsys, options, message):
    assert main([*COMMAND, *options]) == 2
    assert message in capsys.readouterr().err
