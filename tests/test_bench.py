"""The command `bench`: what is counted, checked, timed, stored and drawn."""

import dataclasses
import functools
import itertools
import json
import math
import re
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax.__main__ import main
from flash_attention_jax._bench import jax_peers, machine, measure, peers, plot, timing, torch_peers, verify
from flash_attention_jax._bench.modes import MODES
from flash_attention_jax._bench.peers import Peer
from flash_attention_jax._bench.presets import PRESETS
from flash_attention_jax._bench.program import CannotRunError, Program, Where
from flash_attention_jax._bench.results import Cell, Report, Row
from flash_attention_jax._bench.workload import Inputs, Workload
from flash_attention_jax._dispatch import IMPLEMENTATIONS
from flash_attention_jax.testing import Verdict

CPU = Where("cpu", "cpu")
SMALL = Workload(24, 8, 2)
# One of each option, alone and with others.
ODD = [
    SMALL,
    Workload(24, 8, 2, window=(None, 3)),
    Workload(24, 8, 4, kv_heads=2, batch=3, causal=True, window=(5, 0)),
    Workload(24, 8, kv_length=31, causal=True),
    Workload(24, 8, 2, kv_length=15, causal=True, bias="NTS"),
    Workload(24, 8, 2, kv_length=31, window=(4, 2)),
    Workload(24, 8, 2, key_mask=0.3, window=(4, 2)),
    Workload(24, 8, 2, batch=2, segments=3, causal=True, key_mask=0.5),
    Workload(24, 8, 2, batch=2, bias="BS", causal=True),
]


def ids(workload):
    return workload.label if isinstance(workload, Workload) else None


# What is counted.


def brute_force(workload, inputs):
    """Visible pairs, by loops over the meaning in words."""
    w, seen = workload, np.zeros((workload.batch, workload.length, workload.S), bool)
    left, right = w.window or (None, None)
    for b, i, j in np.ndindex(*seen.shape):
        position = i + w.S - w.length
        seen[b, i, j] = (
            (not w.causal or j <= position)
            and (left is None or j >= position - left)
            and (right is None or j <= position + right)
            and (w.key_mask is None or j < max(1, math.floor(w.key_mask * w.S)))
            and (w.segments is None or inputs.segment_ids[b, i] == inputs.segment_ids[b, j])
        )
    return seen


@pytest.mark.parametrize("workload", ODD, ids=ids)
def test_flops_and_visibility_are_those_of_loops(workload):
    inputs = Inputs(workload)
    expected = brute_force(workload, inputs)
    seen = inputs.visible(np.arange(workload.length))
    shape = (workload.batch, 1, workload.length, workload.S)
    np.testing.assert_array_equal(np.broadcast_to(True if seen is None else seen, shape)[:, 0], expected)
    pairs = int(expected.sum()) * workload.N
    assert workload.pairs == pairs
    for mode, factor in (("forward", 1), ("forward+backward", 3.5), ("jvp", 3)):
        assert workload.flops(mode) == factor * 4 * pairs * workload.head_dim
    np.testing.assert_array_equal(verify.living(inputs), expected.any(-1).all(0))


def test_segments_are_sorted_and_none_is_empty():
    found = Inputs(Workload(9, 4, 1, batch=5, segments=9)).segment_ids
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(9), (5, 9)))
    found = Inputs(Workload(100, 4, 1, batch=3, segments=4)).segment_ids
    assert all(sorted(set(row)) == [0, 1, 2, 3] and (np.diff(row) >= 0).all() for row in found)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": None, "batch": 2}, "heads must be a number where there are batch elements"),
        ({"heads": None, "kv_heads": 2}, "heads must be a number"),
        ({"heads": 4, "kv_heads": 3}, "k must"),
        ({"bias": "XT"}, "bias must be letters of BNTS, each once, got 'XT'"),
        ({"bias": "TT"}, "bias must be letters of BNTS, each once, got 'TT'"),
        ({"key_mask": 0.0}, "key_mask must be a part of the keys, over 0 and up to 1, got 0.0"),
        ({"key_mask": 1.5}, "key_mask must be"),
        ({"segments": 3, "kv_length": 9}, "segments must be without a length of keys of their own"),
        ({"segments": 99}, "segments must be at most the length 24, got 99"),
        ({"window": (-1, 0)}, "window must be"),
    ],
)
def test_wrong_workloads(fields, message):
    with pytest.raises(ValueError, match=message):
        Workload(24, 8, **{"heads": 2} | fields)


def test_a_workload_in_which_nobody_sees_a_key():
    blind = Workload(8, 4, 1, kv_length=32, window=(1, 1), key_mask=0.25)
    with pytest.raises(ValueError, match=r"no query of .* sees a key"):
        verify.living(Inputs(blind))


# What is checked.


def results_of(workload, mode, function, dout):
    """The outputs of a JAX function of (q, k, v), differentiated, for a peer that is under test."""
    inputs = Inputs(workload)
    qkv = [jnp.asarray(inputs.normal(n)) for n in "qkv"]
    if mode == "forward":
        return {"out": np.asarray(function(*qkv))}
    if mode == "jvp":
        moved = [jnp.asarray(inputs.normal(n)) for n in MODES["jvp"].extras]
        return dict(zip(("out", "tangent"), map(np.asarray, jax.jvp(function, qkv, moved)), strict=True))
    out, pull = jax.vjp(function, *qkv)
    names = ("out", "dq", "dk", "dv")
    return dict(zip(names, map(np.asarray, (out, *pull(jnp.asarray(dout)))), strict=True))


def plain(q, k, v, scale=8**-0.5):
    return jax.nn.softmax(scale * q @ k.swapaxes(-1, -2), axis=-1) @ v


def slightly_wrong(q, k, v):
    return plain(q, k, v, scale=1.001 * 8**-0.5)


@jax.custom_jvp
def wrong_derivative(q, k, v):
    return plain(q, k, v)


@wrong_derivative.defjvp
def _(primals, tangents):
    # As if the scale were forgotten in one of the products.
    out, moved = jax.jvp(plain, primals, (1.01 * tangents[0], *tangents[1:]))
    return out, moved


@pytest.fixture(params=["all rows", "some rows"])
def rows_judged(request, monkeypatch):
    if request.param == "some rows":
        monkeypatch.setattr(verify, "_LOGITS", 2 * 24 * 10)
    return 24 if request.param == "all rows" else 10


@pytest.mark.parametrize("mode", MODES)
def test_verdicts_tell_right_from_wrong(mode, rows_judged):
    right = verify.truth(SMALL, mode, Inputs(SMALL))
    assert right.rows.size == rows_judged
    assert {0, 23} <= set(right.rows)

    def outside(function):
        found = right.judge(results_of(SMALL, mode, function, right.dout))
        return {v.quantity for v in found if not v.within}

    assert outside(plain) == set()
    assert "out" in outside(slightly_wrong)
    assert (
        outside(wrong_derivative) == {"forward": set(), "forward+backward": {"dq"}, "jvp": {"tangent"}}[mode]
    )
    assert outside(lambda q, k, v: plain(q, k, v).at[:, :, 23].set(jnp.nan)) >= {"out"}


def test_a_gradient_that_belongs_to_no_judged_query_must_be_zero(monkeypatch):
    monkeypatch.setattr(verify, "_LOGITS", 2 * 24 * 10)
    right = verify.truth(SMALL, "forward+backward", Inputs(SMALL))
    results = results_of(SMALL, "forward+backward", plain, right.dout)
    assert all(v.within for v in right.judge(results))
    stray = next(i for i in range(24) if i not in right.rows)
    results["dq"] = results["dq"].copy()
    results["dq"][0, 0, stray, 3] = 1e-3
    assert [v.quantity for v in right.judge(results) if not v.within] == ["dq"]
    results["dq"][0, 0, stray, 3] = np.nan
    assert [v.quantity for v in right.judge(results) if not v.within] == ["dq"]


def test_results_of_a_wrong_shape_are_wrong():
    right = verify.truth(SMALL, "forward", Inputs(SMALL))
    (verdict,) = right.judge({"out": np.zeros((1, 2, 25, 8), np.float32)})
    assert verdict.error == math.inf


def available():
    """Names of the peers that are installed and run on this machine."""
    return [p.name for p in peers.usual([SMALL], "forward", machine.here())]


right_of = functools.cache(lambda workload, mode: verify.truth(workload, mode, Inputs(workload)))


@pytest.mark.parametrize(
    ("mode", "workloads"), [("forward", ODD[2:3]), ("forward+backward", ODD[2:]), ("jvp", ODD[2:3])]
)
@pytest.mark.parametrize("name", available())
def test_every_peer_computes_the_same(name, mode, workloads):
    """Each option in the peer's own words: what it says that it can, it does."""
    peer = peers.everyone()[name]
    where = machine.here()
    for workload in workloads:
        if peer.refuses(workload, mode, where) is not None:
            continue
        right = right_of(workload, mode)
        program = peer.prepare(workload, mode, Inputs(workload), where)
        worst = Cell(name, "measured", verdicts=right.judge(program.results(right.dout))).worst
        assert worst <= verify.budgets_allowed(workload, peer.ours), workload.label


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("name", ["flash_attention", "attention"])
def test_other_dtypes(name, dtype):
    workload = dataclasses.replace(ODD[2], dtype=dtype)
    settings = measure.Settings(machine.here(), repeats=1, fill=0)
    row = measure.measure(workload, "forward+backward", [peers.everyone()[name]], Inputs(workload), settings)
    assert row.cells[0].status == "measured"
    assert row.cells[0].reason is None


# What is timed.


class Clock:
    """Time that passes only where work is done, and how often it was."""

    def __init__(self):
        self.now, self.started, self.waited = 0.0, 0, 0

    def __call__(self):
        return self.now

    def program(self, start=0.0, work=1.0, **fields):
        """Starting a call takes `start`; the device then works for `work`, call after call."""
        free = [0.0]

        def begin():
            self.started += 1
            self.now += start
            free[0] = max(free[0], self.now) + work
            return free[0]

        def wait(done):
            self.waited += 1
            self.now = max(self.now, done)

        return Program(begin, wait, lambda dout: {}, **fields)


def test_the_host_timer_waits_for_each_call():
    clock = Clock()
    assert timing.HostTimer(clock)(clock.program(0.5, 2.0), 4) == 2.5
    assert (clock.started, clock.waited) == (4, 4)


def test_the_queue_hides_what_the_host_does():
    clock = Clock()
    assert timing.QueueTimer(clock)(clock.program(0.5, 2.0), 100) == pytest.approx(2.005)
    assert (clock.started, clock.waited) == (100, 1)
    # Where the host is the slower one it shows, and is seen.
    clock = Clock()
    slow = clock.program(3.0, 2.0)
    assert timing.QueueTimer(clock)(slow, 100) == pytest.approx(3.02)
    assert timing.host_seconds(slow, clock) == 3.0


def test_the_device_tells_its_own_time():
    program = Clock().program(events=lambda calls: 7.0 * calls)
    assert timing.EventTimer()(program, 3) == 7.0
    assert isinstance(timing.timer_for(program, "gpu"), timing.EventTimer)
    with pytest.raises(ValueError, match="no events"):
        timing.EventTimer()(Clock().program(), 3)


def test_timers_by_platform():
    program = Clock().program()
    assert isinstance(timing.timer_for(program, "cpu"), timing.HostTimer)
    assert isinstance(timing.timer_for(program, "gpu"), timing.QueueTimer)


@pytest.mark.parametrize(
    ("start", "work", "fill", "calls"),
    [(0.0, 2.0, 1.0, 1), (0.0, 0.01, 1.0, 100), (0.09, 0.01, 1.0, 12), (0.0, 1e-9, 1.0, 10_000)],
)
def test_calls_fill_a_sample(start, work, fill, calls):
    clock = Clock()
    found, seconds = timing.calls_to_fill(timing.QueueTimer(clock), clock.program(start, work), fill)
    assert found == pytest.approx(calls, abs=1)
    assert seconds == pytest.approx(max(start, work), rel=0.2)


def test_rounds_interleave_and_begin_with_another_each_time():
    clock = Clock()
    programs = {name: clock.program(work=work) for name, work in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    entries = {n: timing.prepare(p, timing.HostTimer(clock), 0) for n, p in programs.items()}
    order = list(timing.rounds(entries, 4))
    assert "".join(name for name, _ in order) == "abc" + "bca" + "cab" + "abc"
    assert {name: {s for n, s in order if n == name} for name in "abc"} == {
        "a": {1.0},
        "b": {2.0},
        "c": {4.0},
    }


def test_short_calls_are_preceded_by_one_that_does_not_count():
    clock = Clock()
    short, long = clock.program(work=0.1), clock.program(work=1.0)
    for program, calls in ((short, 2), (long, 1)):
        entry = timing.prepare(program, timing.HostTimer(clock), 0)
        clock.started = 0
        entry.sample()
        assert clock.started == calls


def test_a_peer_that_fails_in_a_round_takes_part_no_more():
    clock = Clock()
    calls = itertools.count()

    def breaks():
        if next(calls) == 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory left")
        clock.now += 1.0

    broken = dataclasses.replace(clock.program(), start=breaks, wait=lambda _: None)
    found = list(
        timing.rounds(
            {
                name: timing.Entry(p, timing.HostTimer(clock), 1, 1.0)
                for name, p in (("bad", broken), ("good", clock.program()))
            },
            5,
        )
    )
    assert sum(name == "good" for name, _ in found) == 5
    assert [isinstance(s, Exception) for name, s in found if name == "bad"] == [False, False, True]


# What is measured.


def injected(name, function=plain, refuses=None, raises=None, **fields):
    """A peer around a JAX function of (q, k, v)."""

    def call(workload, q, k, v, extras):
        if raises is not None:
            raise raises
        return function(q, k, v)

    inner = jax_peers.Function(call, "BNTD", lambda workload, mode, where: refuses)
    return Peer(name, inner.refuses, inner.prepare, **fields)


def measured(*chosen, mode="forward+backward", repeats=2, **fields):
    settings = measure.Settings(CPU, repeats=repeats, fill=0, **fields)
    return measure.measure(SMALL, mode, chosen, Inputs(SMALL), settings)


def test_a_wrong_peer_is_shown_as_wrong_and_not_timed():
    row = measured(injected("right"), injected("wrong", lambda q, k, v: 1.01 * plain(q, k, v)))
    right, wrong = row.cells
    assert right.status == "measured"
    assert len(right.samples) == 2
    assert all(s > 0 for s in right.samples)
    assert wrong.status == "wrong"
    assert wrong.samples == ()
    assert "out errs by" in wrong.reason
    assert "dq errs by" in wrong.reason
    assert wrong.worst > 4


@pytest.mark.parametrize("factor", [1.0, 1 + 1.6e-6])
def test_others_may_err_by_a_few_budgets_and_ours_by_one(factor):
    def slightly(q, k, v):
        return plain(q, k, v) * factor

    row = measured(injected("other", slightly), injected("ours", slightly, ours=True), mode="forward")
    other, ours = row.cells
    assert (other.worst > 1) == (factor > 1)
    assert other.worst < 4
    assert other.status == "measured"
    assert ours.status == ("wrong" if factor > 1 else "measured")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotImplementedError("only even lengths\nand more"), "only even lengths"),
        (CannotRunError("out of memory: needs 9 GiB"), "out of memory: needs 9 GiB"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes"), "out of memory"),
        (MemoryError(), "out of memory"),
        (ValueError(""), "ValueError"),
        (ValueError("x" * 500), "x" * 197 + "..."),
    ],
)
def test_a_peer_that_cannot_says_why(error, reason):
    row = measured(injected("broken", raises=error), injected("right"))
    assert row.cells[0] == Cell("broken", "cannot run", reason)
    assert row.cells[1].status == "measured"


def test_a_peer_that_refuses_is_not_tried():
    row = measured(injected("refusing", refuses="needs a GPU", raises=AssertionError("tried")))
    assert row.cells[0] == Cell("refusing", "cannot run", "needs a GPU")


def test_a_mode_that_a_peer_lacks_is_its_own_matter():
    @jax.custom_vjp
    def reverse_only(q, k, v):
        return plain(q, k, v)

    reverse_only.defvjp(lambda *x: jax.vjp(plain, *x), lambda pull, dout: pull(dout))
    assert measured(injected("reverse", reverse_only)).cells[0].status == "measured"
    cell = measured(injected("reverse", reverse_only), mode="jvp").cells[0]
    assert cell.status == "cannot run"
    assert "custom_vjp" in cell.reason


def test_what_would_not_fit_is_not_run(monkeypatch):
    fits = measured(injected("dense"), mode="forward").cells[0]
    # The logits, the weights and out are 2 * 24 * (24 + 8) floats at least.
    assert fits.memory >= 4 * 2 * 24 * (24 + 8)
    monkeypatch.setattr(jax_peers, "free_memory", lambda where: fits.memory - 1)
    cell = measured(injected("dense"), mode="forward").cells[0]
    assert cell.status == "cannot run"
    assert cell.reason.startswith("out of memory: needs ")


def test_progress_is_told_whatever_happens():
    steps = []
    chosen = (injected("a"), injected("b", refuses="no"), injected("c", lambda q, k, v: v))
    measured(*chosen, advance=steps.append, repeats=3)
    assert sum(steps) == len(chosen) * measure.Settings(CPU, repeats=3).steps


def test_a_queue_is_timed_in_both_ways(monkeypatch):
    monkeypatch.setattr(measure, "_LOOP_BELOW", math.inf)
    settings = measure.Settings(Where("gpu", "some GPU"), repeats=2, fill=0)
    row = measure.measure(SMALL, "forward+backward", [injected("a")], Inputs(SMALL), settings)
    (cell,) = row.cells
    assert cell.status == "measured", cell.reason
    assert cell.host_seconds > 0
    assert cell.loop_seconds > 0
    assert measured(injected("a")).cells[0].loop_seconds is None


def test_a_loop_makes_every_call():
    """That the compiler leaves none of them out: twenty times the calls take several times as long."""
    workload = Workload(256, 32, 4)
    program = peers.everyone()["attention"].prepare(workload, "forward", Inputs(workload), CPU)
    seconds = []
    for calls in (2, 40):
        looped = program.loop(calls)
        looped.wait(looped.start())
        seconds.append(min(timing.HostTimer()(looped, 1) for _ in range(3)))
    assert seconds[1] > 4 * seconds[0]


def test_events_and_peak_of_torch():
    events, memory = [], {"now": 100, "peak": 0}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            events.append(len(calls))

        def synchronize(self):
            events.append("synchronized")

        def elapsed_time(self, end):
            return 1500.0

    cuda = types.SimpleNamespace(
        Event=Event,
        synchronize=lambda: None,
        reset_peak_memory_stats=lambda: memory.update(peak=memory["now"]),
        memory_allocated=lambda: memory["now"],
        max_memory_allocated=lambda: memory["peak"],
    )
    torch, calls = types.SimpleNamespace(cuda=cuda), []

    def run(more):
        calls.append(more)
        memory["peak"] = 175

    assert torch_peers._events(torch, run, ("dout",), 3) == 1.5
    assert calls == [("dout",)] * 3
    assert events == [0, 3, "synchronized"]
    program = Clock().program()
    assert torch_peers._peak(torch, program.session, run, ("dout",)) == 75


def test_torch_refuses_what_it_cannot():
    def refuses(how, mode="forward", platform="gpu"):
        return torch_peers.refusal(how)(SMALL, mode, Where(platform, platform))

    assert refuses("cudnn") is None
    assert refuses("cudnn", platform="cpu") == "needs a GPU"
    assert refuses("flash", platform="tpu") == "torch does not run on tpu"
    assert refuses("flash", mode="jvp") == "has no forward-mode derivative"
    assert refuses("math", mode="jvp") is None


def test_dense_matrices_of_torch_are_foreseen(monkeypatch):
    monkeypatch.setattr(torch_peers, "free_memory", lambda where: 2**30)
    long = Workload(131072, 64, 8)
    with pytest.raises(CannotRunError, match=r"out of memory: needs 1\.15 TiB, 1 GiB are free"):
        torch_peers._check_memory("math", long, "forward", Inputs(long), CPU)
    torch_peers._check_memory("flash", long, "forward", Inputs(long), CPU)
    masked = dataclasses.replace(long, window=(100, 0))
    with pytest.raises(CannotRunError, match=r"out of memory: needs 16 GiB"):
        torch_peers._check_memory("flash", masked, "forward", Inputs(masked), CPU)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("CUDA out of memory. Tried to allocate 2 GiB", "out of memory"),
        ("No available kernel.", "No available kernel; Flash attention needs half precision"),
    ],
)
def test_reasons_of_torch(said, reason):
    def run(more):
        warnings.warn("Flash attention needs half precision. (Triggered internally at a.cpp:1)", stacklevel=1)
        raise RuntimeError(said)

    def prepare(*_):
        torch_peers._first(run, ())

    peer = Peer("torch:flash", lambda *_: None, prepare)
    assert measured(peer).cells[0] == Cell("torch:flash", "cannot run", reason)


def test_cudnn_of_jax_needs_nvidia():
    cudnn = peers.everyone()["jax.nn:cudnn"]
    assert cudnn.refuses(SMALL, "forward", CPU) == "needs an NVIDIA GPU"
    assert cudnn.refuses(SMALL, "forward", Where("gpu", "AMD Instinct")) == "needs an NVIDIA GPU"
    assert cudnn.refuses(SMALL, "forward", Where("gpu", "NVIDIA H200")) is None


def test_peers_by_name(monkeypatch):
    assert [p.name for p in peers.asked_for(["attention", "jax.nn"])] == [
        "attention",
        "jax.nn:xla",
        "jax.nn:cudnn",
    ]
    assert [p.name for p in peers.asked_for(["flash_attention"])] == ["flash_attention"]
    assert [p.name for p in peers.asked_for(["jax.nn:xla", "jax.nn"])] == ["jax.nn:xla", "jax.nn:cudnn"]
    with pytest.raises(ValueError, match=r"peers must be of flash_attention, .*, got 'jax'"):
        peers.asked_for(["jax"])
    monkeypatch.setattr(peers, "installed", lambda module: module == "jax")
    with pytest.raises(ValueError, match="peers must be installed, got 'torch' without torch"):
        peers.asked_for(["torch"])
    assert {p.module for p in peers.usual([SMALL], "forward", CPU)} == {"jax"}


def test_every_implementation_is_a_peer():
    names = set(peers.everyone())
    assert {f"flash_attention:{n}" for n in IMPLEMENTATIONS if n != "reference"} <= names
    assert "flash_attention:reference" not in names  # It is `attention`.


# What is stored and shown.


def cell(peer, samples, memory=2**20, **fields):
    return Cell(peer, "measured", None, (Verdict("out", 1e-7, 1e-6),), 3, samples, memory, 0.5, **fields)


def a_report(rows=None):
    if rows is None:
        rows = [
            Row(
                Workload(n, 64, 8, causal=causal),
                mode,
                n * n,
                4e9 * (n / 512) ** 2,
                n,
                (
                    cell("torch:flash", tuple(1e-3 * n * x for x in (1.0, 1.1, 1.2)), None),
                    cell(
                        "flash_attention", tuple(2e-3 * n * x for x in (1.0, 1.1, 1.2)), 2**10 * n, note="xla"
                    ),
                    Cell("jax.nn:cudnn", "cannot run", "needs an NVIDIA GPU"),
                    Cell("odd", "wrong", "out errs", (Verdict("out", math.inf, 1e-6),)),
                ),
            )
            for causal in (False, True)
            for mode in ("forward", "jvp")
            for n in (512, 1024, 2048)
        ]
    about = {"device": "A chip", "versions": {"jax": "1.2", "torch": "3.4"}, "python": "3.11"}
    return Report(about, ("bench", "--json", "x"), "2020-01-01T00:00:00+00:00", 3, "torch:flash", tuple(rows))


def test_json_round_trip():
    report = a_report()
    text = report.to_json()
    assert Report.from_json(text) == report
    document = json.loads(text, parse_constant=pytest.fail)
    first = document["rows"][0]
    assert first["workload"]["length"] == 512
    assert first["cells"][0]["samples"] == [0.512, pytest.approx(0.5632), pytest.approx(0.6144)]
    assert first["cells"][0]["flops_per_second"] == pytest.approx(4e9 / 0.5632)
    assert first["cells"][3]["verdicts"][0]["error"] is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "rows": [{}]}'])
def test_what_is_no_report(text):
    with pytest.raises(ValueError, match="not a result of this benchmark"):
        Report.from_json(text)


def test_statistics():
    row = a_report().rows[0]
    slow, fast = cell("a", (2.0, 4.0, 3.0)), cell("b", (1.0, 1.0, 1.0))
    row = dataclasses.replace(row, cells=(slow, fast), flops=12.0)
    assert slow.seconds == 3.0
    assert slow.quartiles == (2.5, 3.5)
    assert cell("c", (2.0,)).quartiles == (2.0, 2.0)
    assert row.rate(slow) == 4.0
    assert row.ratio(slow, "b") == pytest.approx(1 / 3)
    assert row.ratio(fast, "a") == 3.0
    assert row.ratio(slow, "nobody") is None
    assert not slow.host_bound
    assert dataclasses.replace(slow, host_seconds=2.9).host_bound
    assert dataclasses.replace(slow, loop_seconds=1.0).host_bound
    assert not dataclasses.replace(slow, host_seconds=0.1, loop_seconds=2.9).host_bound


def test_a_plot_has_what_a_reader_needs():
    rows = [r for r in a_report().rows if not r.workload.causal]
    figure = plot.figure_of(a_report(rows))
    assert "A chip" in figure.get_suptitle()
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == [
        "torch:flash (memory not reported)",
        "flash_attention",
        "the T x S matrix of all heads",
    ]
    assert len(figure.axes) == 4
    for axis, label in zip(
        figure.axes, ["time of a call (ms)", "memory beside the inputs (MiB)"] * 2, strict=True
    ):
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        assert axis.get_ylabel() == label
        assert axis.get_xlabel() == "length of queries and keys"
        assert [t.get_text() for t in axis.get_xticklabels()] == ["512", "1,024", "2,048"]
    time, memory = figure.axes[:2]
    assert time.get_title(loc="left") == "forward, batch 1, 8 heads of 64, float32"
    assert [line.get_label() for line in time.lines] == ["torch:flash", "flash_attention"]
    np.testing.assert_allclose(time.lines[1].get_ydata(), [2.2 * n for n in (512, 1024, 2048)])
    np.testing.assert_allclose(memory.lines[0].get_ydata(), [0.5, 1, 2])
    np.testing.assert_allclose(memory.lines[1].get_ydata(), [8, 32, 128])


def test_a_sweep_of_constant_tokens_is_one_line():
    rows = [
        Row(Workload(n, 64, 8, batch=4096 // n), "forward", 1, 1.0, 1, (cell("a", (1.0,)),))
        for n in (512, 2048, 1024)
    ]
    (group,) = plot.groups(rows)
    assert [r.workload.length for r in group.rows] == [512, 1024, 2048]
    assert group.title == "forward, 4096 tokens, 8 heads of 64, float32"
    assert len(plot.groups([*rows, dataclasses.replace(rows[0], workload=Workload(512, 64, 8))])) == 4


def test_the_committed_presets_can_be_drawn_where_they_are_sweeps():
    rows = [Row(w, m, 0, 0, 0, ()) for w in PRESETS["cpu-lengths"].on("cpu") for m in PRESETS["cpu"].modes]
    plot.check("a.png", rows)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole(name):
    preset = PRESETS[name]
    for platform in ("cpu", "gpu"):
        assert len(set(preset.on(platform))) == len(preset.on(platform))
    assert set(preset.modes) <= set(MODES)
    assert set(preset.peers or ()) <= set(peers.everyone())
    assert preset.baseline in (preset.peers or peers.everyone())


def test_flops_of_the_hopper_tables():
    """FlashAttention-3's count: 4 * length^2 * head dim * heads * batch, halved for causal."""
    for w in PRESETS["hopper"].on("gpu"):
        assert w.batch * w.length == 16384
        assert w.N * w.head_dim == 2048
        full = 4 * w.length * 16384 * 2048
        if not w.causal:
            assert w.flops("forward") == full
        elif w.length <= 1024:
            assert w.flops("forward") == pytest.approx(full / 2, rel=2 / w.length)
    assert len(PRESETS["hopper"].on("gpu")) == 36


# The command.


OPTIONS = ["bench", "--head-dims", "8", "--heads", "2", "--repeats", "2"]


def test_bench_measures_stores_and_draws(capsys, tmp_path):
    stored, drawn, again = (tmp_path / name for name in ("a.json", "a.png", "b.svg"))
    command = [*OPTIONS, "--lengths", "16,32", "--peers", "flash_attention,attention,jax.nn"]
    assert main([*command, "--json", str(stored), "--plot", str(drawn)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for text in ("(1, 2, 16, 8)", "forward+backward", "GFLOP/s", "cannot run [1]", "[1] needs an NVIDIA GPU"):
        assert text in shown.out
    assert "flash_attention chose xla." in shown.out
    document = json.loads(stored.read_text())
    assert document["command"] == [*command, "--json", str(stored), "--plot", str(drawn)]
    assert document["machine"]["versions"]["jax"] == jax.__version__
    assert "threads" in document["machine"]
    assert document["baseline"] == "jax.nn:xla"  # Of the usual ones the first that runs here.
    assert [(r["workload"]["length"], r["mode"]) for r in document["rows"]] == [
        (16, "forward"),
        (16, "forward+backward"),
        (32, "forward"),
        (32, "forward+backward"),
    ]
    cells = {c["peer"]: c for c in document["rows"][1]["cells"]}
    assert {v["quantity"] for v in cells["flash_attention"]["verdicts"]} == {"out", "dq", "dk", "dv"}
    assert len(cells["attention"]["samples"]) == 2
    assert cells["attention"]["memory"] > 0
    assert drawn.read_bytes().startswith(b"\x89PNG")

    choice = ["--modes", "forward", "--lengths", "32", "--peers", "flash_attention,jax.nn"]
    assert main(["bench", "--from", str(stored), *choice, "--plot", str(again)]) == 0
    shown = capsys.readouterr().out
    assert "(1, 2, 32, 8)" in shown
    for text in ("backward", "(1, 2, 16, 8)"):
        assert text not in shown
    assert re.search(r"\n  mode +flash_attention +xla +cudnn", shown)
    assert "<svg" in again.read_text()


def test_bench_finds_a_wrong_result(capsys, replaced_implementation):
    def slightly(problem, operands, device):
        out, lse = IMPLEMENTATIONS["reference"].forward(problem, operands, device)
        return out * 1.001, lse

    replaced_implementation("xla", forward=slightly)
    command = [*OPTIONS, "--lengths", "16", "--modes", "forward", "--peers", "flash_attention,attention"]
    assert main(command) == 1
    shown = capsys.readouterr().out
    assert "WRONG [1]" in shown
    assert "[1] out errs by" in shown


def test_bench_of_every_option(capsys):
    options = [
        "--kv-heads",
        "1",
        "--batch",
        "2",
        "--dtype",
        "bfloat16",
        "--causal",
        "--full",
        "--window",
        "9,0",
    ]
    options += ["--bias", "NTS", "--key-mask", "0.75", "--segments", "2", "--modes", "jvp"]
    assert main([*OPTIONS, "--lengths", "16", *options, "--peers", "attention"]) == 0
    shown = capsys.readouterr().out
    words = "window 9,0, bias NTS, key mask 0.75, 2 segments"
    assert f"bfloat16, {words}" in shown
    assert f"bfloat16, causal, {words}" in shown
    assert "(2, 2, 16, 8), 1 kv heads" in shown


def test_bench_without_heads(capsys):
    options = [
        "--heads",
        "none",
        "--lengths",
        "16",
        "--head-dims",
        "8",
        "--repeats",
        "1",
        "--modes",
        "forward",
    ]
    assert main(["bench", *options, "--peers", "attention", "--precision", "default"]) == 0
    shown = capsys.readouterr().out
    assert "(16, 8)" in shown
    assert "float32, default precision" in shown


@pytest.mark.parametrize(
    "options", [["--window", "0"], ["--kv-length", "1"], ["--key-mask", "0.001"]], ids=lambda x: x[0]
)
def test_gradients_that_cancel_are_right(options):
    common = ["--lengths", "16", "--heads", "2", "--head-dims", "8", "--repeats", "1"]
    modes = ["--modes", "forward+backward", "--peers", "flash_attention,attention"]
    assert main(["bench", *common, *options, *modes]) == 0


def test_an_interrupt_keeps_what_was_measured(capsys, monkeypatch, tmp_path):
    real = measure.measure

    def once(workload, *rest):
        if workload.length == 32:
            raise KeyboardInterrupt
        return real(workload, *rest)

    monkeypatch.setattr("flash_attention_jax._cli.bench.measure", once)
    stored = tmp_path / "a.json"
    command = [*OPTIONS, "--lengths", "16,32", "--modes", "forward", "--peers", "attention"]
    assert main([*command, "--json", str(stored)]) == 0
    shown = capsys.readouterr()
    assert "interrupted" in shown.err
    assert "(1, 2, 16, 8)" in shown.out
    assert len(Report.from_json(stored.read_text()).rows) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "must be a positive integer, was '0'"),
        (["--lengths", "8,8"], "must be different numbers, was '8,8'"),
        (["--heads", "no"], "must be a positive integer, was 'no'"),
        (["--modes", "forward,sideways"], "must be of forward, forward+backward, jvp, was 'sideways'"),
        (["--peers", "a,,b"], "must be names with commas between, each once, was 'a,,b'"),
        (["--window", "x"], "must be made of whole numbers, was 'x'"),
        (["--preset", "none"], "invalid choice: 'none'"),
        (["--repeats", "0"], "must be a positive integer, was '0'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_arguments_that_are_no_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "nobody"], "peers must be of flash_attention, "),
        (["--peers", "attention", "--baseline", "jax.nn:xla"], "baseline must be one of attention, got 'jax"),
        (["--heads", "4", "--kv-heads", "3"], "k must"),
        (["--window=-1,0"], "window must be"),
        (["--bias", "Q"], "bias must be letters of BNTS, each once, got 'Q'"),
        (["--key-mask", "2"], "key_mask must be a part of the keys, over 0 and up to 1, got 2.0"),
        (["--preset", "cpu", "--heads", "2"], "--heads cannot be given with --preset, which has its own"),
        (["--preset", "cpu", "--lengths", "7"], "the options leave none of the problems of the preset cpu"),
        (["--from", "x", "--repeats", "2"], "--repeats cannot be given with --from, which has its own"),
        (["--from", "x", "--preset", "cpu"], "--preset cannot be given with --from"),
        (["--from", "/nowhere/x.json"], "[Errno 2]"),
        (["--plot", "a.bmp"], "plot must end in .png, .svg, .pdf, got 'a.bmp'"),
        (["--plot", "/nowhere/a.png"], "the directory of /nowhere/a.png must exist"),
        (["--json", "/nowhere/a.json"], "the directory of /nowhere/a.json must exist"),
        (["--preset", "hopper", "--plot", "a.png"], "plot must be of at most 6 kinds of problems"),
        (["--lengths", "8", "--kv-length", "32", "--window", "1", "--key-mask", "0.25"], "no query of"),
    ],
)
def test_wrong_inputs_end_before_any_work(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("flash_attention_jax._cli.bench.measure", pytest.fail)
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_what_a_stored_result_does_not_have(capsys, tmp_path):
    stored = tmp_path / "a.json"
    stored.write_text(a_report().to_json())
    for options, message in (
        (["--head-dims", "7"], "the options leave none of the problems"),
        (["--peers", "nobody"], "peers must be of torch:flash, "),
        (["--baseline", "nobody"], "baseline must be one of torch:flash, "),
        (["--json", "b"], "--json cannot be given with --from"),
    ):
        assert main(["bench", "--from", str(stored), *options]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    stored.write_text("{}")
    assert main(["bench", "--from", str(stored)]) == 2
    assert "not a result of this benchmark" in capsys.readouterr().err


def test_no_framework_is_imported_unasked():
    program = (
        "import sys; from flash_attention_jax.__main__ import _parser; _parser();"
        "print([m for m in ('torch', 'tokamax', 'matplotlib') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
