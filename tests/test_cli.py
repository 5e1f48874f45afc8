"""The command line, called in process."""

import dataclasses
import json
import math
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import explain, flash_attention
from flash_attention_jax.__main__ import main
from flash_attention_jax._arguments import normalize
from flash_attention_jax._cli import check, demo
from flash_attention_jax._dispatch import IMPLEMENTATIONS
from flash_attention_jax._impl.hopper import _refuses
from flash_attention_jax._mask import visible_pairs
from flash_attention_jax._problem import Operands
from flash_attention_jax.testing import CASES, Verdict


@pytest.fixture
def replaced(monkeypatch):
    """Replaces fields of the implementation `xla`, which is the one chosen on a CPU."""

    def replace(**fields):
        monkeypatch.setitem(IMPLEMENTATIONS, "xla", dataclasses.replace(IMPLEMENTATIONS["xla"], **fields))
        jax.clear_caches()

    yield replace
    jax.clear_caches()


def _slightly_wrong(problem, operands, device):
    out, lse = IMPLEMENTATIONS["reference"].forward(problem, operands, device)
    return out * 1.001, lse


@pytest.mark.parametrize(
    "options",
    [
        ["--length", "301", "--slices", "7"],
        ["--length", "301", "--slices", "7", "--causal"],
        ["--length", "5"],
        ["--length", "64", "--dtype", "bfloat16", "--causal"],
        ["--length", "64", "--dtype", "float64"],
    ],
)
def test_demo_is_within_its_budget(capsys, options):
    assert main(["demo", "--dim", "16", *options]) == 0
    captured = capsys.readouterr()
    assert "the error is within the budget" in captured.out
    assert "GFLOP/s" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("causal", [[], ["--causal"]])
def test_demo_finds_a_wrong_result(capsys, replaced, causal):
    replaced(forward=_slightly_wrong)
    assert main(["demo", "--length", "300", "--dim", "16", *causal]) == 1
    assert "OVER THE BUDGET" in capsys.readouterr().out


def test_demo_counts_nan_as_wrong():
    assert not demo.Accuracy(math.nan, 1.0, 8, 64).within
    assert not demo.Accuracy(0.0, math.nan, 8, 64).within


def test_demo_asks_an_accelerator_for_its_own_peak(monkeypatch):
    def having(stats):
        device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        return demo._peak_memory()

    assert having({"peak_bytes_in_use": 3 * 2**30}) == (3 * 2**30, "of the device")
    assert having({"bytes_in_use": 1}) is None
    assert having(None) is None


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (5 * 2**28, "1.25 GiB"), (2**42, "4096 GiB")],
)
def test_sizes_in_words(count, text):
    assert demo._size(count) == text


@pytest.mark.parametrize(("length", "count"), [(301, 7), (5, 4), (300, 20), (1, 20), (12, 12), (13, 1)])
def test_slices_hold_every_row_once(length, count):
    slices = demo.Slices.of(length, count)
    assert len(slices.starts) <= count
    assert [row for i in range(len(slices.starts)) for row in slices.fresh(i)] == list(range(length))
    for row in range(length):
        index, within = slices.place(row)
        assert 0 <= within < slices.size
        assert slices.starts[index] + within == row
        assert row in slices.fresh(index)


@pytest.mark.parametrize("causal", [False, True])
def test_slices_put_together_are_the_whole(causal):
    q, k, v = (jax.random.normal(x, (43, 8)) for x in jax.random.split(jax.random.key(0), 3))
    slices = demo.Slices.of(43, 4)
    outs = [demo._slice(q, k, v, start, size=slices.size, causal=causal) for start in slices.starts]
    whole = flash_attention(q, k, v, causal=causal).out
    np.testing.assert_allclose(demo._gather(outs, slices, np.arange(43)), whole, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_pairs_are_those_that_are_visible(causal):
    x = jax.ShapeDtypeStruct((43, 8), jnp.float32)
    problem, _, _ = normalize(Operands(x, x, x), None, causal=causal, abstract=True)
    assert demo.visible_pairs(range(43), 43, causal) == visible_pairs(problem, Operands(x, x, x))
    assert sum(demo.visible_pairs(range(i, i + 1), 43, causal) for i in range(7, 20)) == demo.visible_pairs(
        range(7, 20), 43, causal
    )


def test_exact_rows_are_the_textbook_formula():
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((3, 6, 4))
    with jax.enable_x64(True):
        expected = [flash_attention(q, k, v, causal=c, implementation="reference").out for c in (False, True)]
    for causal in (False, True):
        actual = demo.exact_rows(q, k, v, np.arange(6), causal)
        np.testing.assert_allclose(actual, expected[causal], rtol=1e-12)


def test_check_as_json(capsys):
    assert main(["check", "--case", "one-token", "--json"]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert captured.err == ""
    assert answer["passed"] is True
    assert answer["platform"] == jax.default_backend()
    assert answer["jax"] == jax.__version__
    assert [r["implementation"] for r in answer["results"]] == list(IMPLEMENTATIONS)
    refused = {r["implementation"] for r in answer["results"] if r["refused"]}
    assert refused == {"hopper"}
    for result in answer["results"]:
        assert result["case"] == "one-token"
        if result["refused"]:
            assert result["verdicts"] == []
            continue
        assert {v["quantity"] for v in result["verdicts"]} == {"out", "lse", "dq", "dk", "dv"}
        assert all(v["within"] and v["error"] <= v["budget"] for v in result["verdicts"])


def test_check_takes_all_cases_in_a_dtype(capsys):
    assert (
        main(["check", "--case", "long", "--dtype", "bfloat16", "--implementation", "hopper", "--json"]) == 0
    )
    found = {r["case"]: r["refused"] for r in json.loads(capsys.readouterr().out)["results"]}
    expected = {c.name for c in CASES if "long" in c.name and c.dtype in ("float32", "bfloat16")}
    assert set(found) == expected
    turned = check._in_dtype(CASES, "bfloat16")
    assert {c.dtype for c in turned} == {"bfloat16"}
    taken = [c for c in turned if not why_not_bfloat16(c)]
    assert len(taken) > 30


def why_not_bfloat16(case):
    arguments = case.arguments()
    operands = Operands(**{n: arguments.pop(n) for n in Operands._fields if n in arguments})
    problem, _, _ = normalize(operands, arguments.pop("segment_ids", None), **arguments)
    return _refuses.of_problem(problem)


def test_parts_of_check_share_the_table(capsys):
    names = []
    for part in ("1/2", "2/2"):
        assert main(["check", "--case", "one-", "--implementation", "hopper", "--part", part, "--json"]) == 0
        names += [r["case"] for r in json.loads(capsys.readouterr().out)["results"]]
    assert sorted(names) == sorted(c.name for c in CASES if "one-" in c.name)


@pytest.mark.parametrize(
    "options", [["--case", "one-", "--part", "9/9"], ["--case", "float64", "--dtype", "bfloat16"]]
)
def test_check_of_no_case_is_an_error(capsys, options):
    assert main(["check", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: no case of that name and dtype is in that part\n"
    assert captured.out == ""


def test_check_finds_a_wrong_result(capsys, replaced):
    replaced(forward=_slightly_wrong)
    assert main(["check", "--case", "two-axes"]) == 1
    shown = capsys.readouterr().out
    # The backward pass reads out, so that dq and dk are wrong too.
    assert "3 of 10 results are over their error budgets." in shown
    assert main(["check", "--case", "two-axes", "--implementation", "reference"]) == 0
    assert "All 5 results are within their error budgets." in capsys.readouterr().out
    assert main(["check", "--case", "two-axes", "--implementation", "xla", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["passed"] is False
    wrong = {v["quantity"] for v in answer["results"][0]["verdicts"] if not v["within"]}
    assert wrong == {"out", "dq", "dk"}


def test_check_reports_nan_in_valid_json(capsys, replaced):
    def nan(problem, operands, device):
        out, lse = IMPLEMENTATIONS["reference"].forward(problem, operands, device)
        return out * jnp.nan, lse

    replaced(forward=nan)
    assert main(["check", "--case", "one-token", "--implementation", "xla", "--json"]) == 1
    (result,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["results"]
    verdict = result["verdicts"][0]
    assert verdict["quantity"] == "out"
    assert verdict["error"] is None
    assert verdict["within"] is False


def test_check_shows_a_refusal_with_its_reason(capsys, replaced):
    replaced(refuses=lambda problem, device: "takes more than one token" if problem.T == 1 else None)
    assert main(["check", "--case", "one-token", "--json"]) == 0
    results = {r["implementation"]: r for r in json.loads(capsys.readouterr().out)["results"]}
    assert results["xla"]["refused"] == "takes more than one token"
    assert results["xla"]["verdicts"] == []
    assert results["reference"]["refused"] is None
    assert main(["check", "--case", "one-token"]) == 0
    shown = capsys.readouterr().out
    assert "takes more than one token" in shown
    assert "All 5 results are within" in shown
    passed, over_budget, refused = next(
        x.split()[1:4] for x in shown.splitlines() if x.split()[:1] == ["xla"]
    )
    assert (passed, over_budget, refused) == ("0", "0", "1")
    assert main(["check", "--case", "one-token", "--implementation", "xla"]) == 0
    assert "Nothing was judged" in capsys.readouterr().out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_can_be_asked_about(case):
    elsewhere = "it runs on CUDA devices of compute capability 9.0, not on cpu"
    assert check.refusals_of(case) == {"xla": None, "reference": None, "hopper": elsewhere}


def test_ratio_of_a_budget_of_zero():
    assert check.ratio(Verdict("out", 0.0, 0.0)) == 0
    assert check.ratio(Verdict("out", 1e-9, 0.0)) == math.inf
    assert check.ratio(Verdict("out", 1.0, 4.0)) == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--case", "nope"], "no case has 'nope' in its name"),
        (["check", "--implementation", "nope"], "invalid choice: 'nope'"),
        (["check", "--dtype", "int32"], "invalid choice: 'int32'"),
        *((["check", "--part", x], f"must be I/N with 1 <= I <= N, got '{x}'") for x in ("3/2", "0/1", "1")),
        (["demo", "--length", "0"], "must be a positive integer, was '0'"),
        (["explain"], "--q"),
        (["explain", "--q", "8,x"], "must be a shape such as 1,8,4096,64, was '8,x'"),
        (["explain", "--q", "8,8", "--window", "a"], "must be made of whole numbers, was 'a'"),
        ([], "COMMAND"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


_OPTIONS = ["--causal", "--window", "1024,0", "--softcap", "30", "--scale", "0.5", "--precision", "high"]
_SHAPES = ["--q", "1,8,4096,64", "--k", "1,2,512,64", "--v", "1,2,512,32", "--bias", "8,4096,512"]


def test_explain_is_the_librarys_answer(capsys):
    masks = ["--mask", "4096,1", "--key-mask", "512", "--segments", "--q-offset", "5", "--platform", "cuda"]
    assert main(["explain", *_SHAPES, *masks, *_OPTIONS, "--dtype", "bfloat16"]) == 0

    def struct(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    expected = explain(
        struct((1, 8, 4096, 64)),
        struct((1, 2, 512, 64)),
        struct((1, 2, 512, 32)),
        struct((512,), bool),
        bias=struct((8, 4096, 512)),
        mask=struct((4096, 1), bool),
        segment_ids=(struct((1, 4096), jnp.int32), struct((1, 512), jnp.int32)),
        causal=True,
        window=(1024, 0),
        q_offset=5,
        scale=0.5,
        softcap=30.0,
        precision="high",
        platform="cuda",
    )
    assert capsys.readouterr().out == f"{expected}\n"
    assert main(["explain", *_SHAPES, *masks, *_OPTIONS, "--dtype", "bfloat16", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["problem"] == json.loads(json.dumps(dataclasses.asdict(expected.problem)))
    assert answer["device"]["platform"] == "cuda"
    assert answer["refusals"] == expected.refusals
    assert answer["chosen"] == expected.chosen


def test_explain_by_default(capsys):
    assert main(["explain", "--q", "40,8", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["device"]["platform"] == explain(*[np.zeros((40, 8), np.float32)] * 3).device.platform
    problem = {
        name: answer["problem"][name] for name in ("T", "S", "D", "Dv", "dtype", "bias", "left", "right")
    }
    assert problem == {
        "T": 40,
        "S": 40,
        "D": 8,
        "Dv": 8,
        "dtype": "float32",
        "bias": None,
        "left": None,
        "right": None,
    }


@pytest.mark.parametrize(
    ("window", "band"), [("7", (7, 7)), ("none,3", (None, 3)), ("9,none", (9, None)), ("none", (None, None))]
)
def test_explain_windows(capsys, window, band):
    assert main(["explain", "--q", "2,40,8", "--window", window, "--json"]) == 0
    problem = json.loads(capsys.readouterr().out)["problem"]
    assert (problem["left"], problem["right"]) == band


@pytest.mark.parametrize("options", [["--dtype", "float64"], ["--bias", "40,40", "--bias-dtype", "float64"]])
def test_explain_of_64_bits(capsys, options):
    assert main(["explain", "--q", "2,40,8", *options, "--json"]) == 0
    problem = json.loads(capsys.readouterr().out)["problem"]
    assert "float64" in (problem["dtype"], problem["bias_dtype"])


def test_explain_negative_offset(capsys):
    assert main(["explain", "--q", "2,40,8", "--causal", "--q-offset", "-5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problem"]["q_offset"] == -5


def test_explain_offset_of_each_batch_element(capsys):
    assert main(["explain", "--q", "3,2,40,8", "--causal", "--q-offset", "array", "--json"]) == 0
    problem = json.loads(capsys.readouterr().out)["problem"]
    assert problem["offsets"] == [3]
    assert problem["q_offset"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--q", "8"], "error: q must be an array of shape (*batch, [N,] T, D), got shape (8,)\n"),
        (
            ["--q", "8", "--segments"],
            "error: q must be an array of shape (*batch, [N,] T, D), got shape (8,)\n",
        ),
        (["--q", "8,64", "--k", "8,32"], "error: k must be of q's head dim D = 64, got shape (8, 32)\n"),
        (["--q", "8,64", "--softcap", "-1"], "error: softcap must be None or a positive number, got -1.0\n"),
        (["--q", "8,64", "--window=-1,0"], "error: window must be"),
        (["--q", "8,64", "--window", "1,2,3"], "error: window must be"),
        (["--q", "8,64", "--platform", "abacus"], "error: platform must be"),
    ],
)
def test_explain_passes_on_the_librarys_error(capsys, arguments, message):
    assert main(["explain", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_without_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["explain", "--q", "8,8"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "pip install 'flash_attention_jax[cli]'" in captured.err
    assert captured.out == ""


def test_the_package_imports_no_rich():
    program = "import sys, flash_attention_jax.__main__; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_as_a_module():
    command = [sys.executable, "-m", "flash_attention_jax", "explain", "--q", "8"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: q must be an array")
