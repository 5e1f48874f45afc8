"""`normalize` and `arrange`: the canonical shapes, the identity of a problem, and what they mean."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import attention, flash_attention
from flash_attention_jax._api import _flash, _plain, attention_and_lse
from flash_attention_jax._arguments import normalize
from flash_attention_jax._attend import Call
from flash_attention_jax._problem import Operands, Problem, arrange

N, K, T, S, D, Dv = 4, 2, 3, 5, 2, 3


def floats(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def arrays(batch, order="BNTD", heads=True, sizes=(N, K, T, S)):
    """q, k and v of a batch shape, with as many axes as the order and `heads` say."""
    rng = np.random.default_rng(1)
    n, kv, t, s = sizes
    shapes = ((n, t, D), (kv, s, D), (kv, s, Dv))
    if not heads:
        shapes = tuple(shape[1:] for shape in shapes)
    elif order == "BTND":
        shapes = tuple((b, a, c) for a, b, c in shapes)
    return dict(zip("qkv", (floats(rng, *batch, *shape) for shape in shapes), strict=True))


def described(named, options=None, order="BNTD"):
    """The problem and the raw operands of a call whose operands are `named`."""
    named, options = dict(named), dict(options or {})
    segments = named.pop("segment_ids", None)
    problem, operands, _ = normalize(Operands(**named), segments, **options, order=order)
    return problem, operands


# Leading axes.

LEADING = {
    "two axes": ((), False, "BNTD"),
    "heads": ((), True, "BNTD"),
    "batch": ((6,), True, "BNTD"),
    "batch 1": ((1,), True, "BNTD"),
    "two batch axes": ((2, 3), True, "BNTD"),
    "three batch axes": ((2, 1, 3), True, "BNTD"),
    "BTND heads": ((), True, "BTND"),
    "BTND batch": ((6,), True, "BTND"),
    "BTND two batch axes": ((2, 3), True, "BTND"),
}


@pytest.mark.parametrize("name", LEADING)
def test_sizes_and_canonical_shapes_of_q_k_v(name):
    batch, heads, order = LEADING[name]
    problem, operands = described(arrays(batch, order, heads), order=order)
    n, kv, b = (N, K, math.prod(batch)) if heads else (1, 1, 1)
    p = problem
    assert (p.B, p.N, p.K, p.T, p.S, p.D, p.Dv, p.order) == (b, n, kv, T, S, D, Dv, order)
    assert (p.G, p.scale, p.dtype, p.accumulator) == (n // kv, D**-0.5, "float32", "float32")
    assert (p.masked, p.banded, p.empty) == (False, False, False)
    arranged = arrange(problem, operands)
    rows, cols = ((n, T), (kv, S)) if order == "BNTD" else ((T, n), (S, kv))
    assert arranged.q.shape == (b, *rows, D)
    assert arranged.k.shape == (b, *cols, D)
    assert arranged.v.shape == (b, *cols, Dv)
    assert arranged[3:] == (None,) * 6
    for x, raw in zip(arranged[:3], operands[:3], strict=True):
        assert np.array_equal(np.ravel(x), np.ravel(raw))


# (batch, the operand's own batch shape, the size of its canonical batch axis)
BATCHES = [
    ((), (), 1),
    ((6,), (), 1),
    ((6,), (1,), 1),
    ((6,), (6,), 6),
    ((1,), (1,), 1),
    ((2, 3), (), 1),
    ((2, 3), (1,), 1),
    ((2, 3), (3,), 6),
    ((2, 3), (1, 1), 1),
    ((2, 3), (1, 3), 6),
    ((2, 3), (2, 1), 6),
    ((2, 3), (2, 3), 6),
    ((2, 1, 3), (1, 1), 1),
    ((2, 1, 3), (2, 1, 1), 6),
    ((2, 1, 3), (1, 3), 6),
]
PAIRS = [(), (1,), (S,), (T, 1), (1, S), (T, S), (1, T, S), (N, 1, 1), (N, T, S)]


def canonical_equals_broadcast(x, raw, batch, tail):
    """Whether a canonical array is its raw one, broadcast to (*batch, *tail) and flattened to (B, *tail)."""
    flat = (math.prod(batch), *tail)
    return np.array_equal(np.broadcast_to(x, flat), np.broadcast_to(raw, (*batch, *tail)).reshape(flat))


@pytest.mark.parametrize("order", ["BNTD", "BTND"])
@pytest.mark.parametrize(("batch", "own", "lead"), BATCHES, ids=str)
def test_canonical_shapes_of_bias_and_mask(batch, own, lead, order):
    rng = np.random.default_rng(2)
    for pair in PAIRS:
        if own and len(pair) < 3:
            pair = (1,) * (3 - len(pair)) + pair
        raw = {"bias": floats(rng, *own, *pair), "mask": rng.random((*own, *pair)) < 0.5}
        problem, operands = described(arrays(batch, order) | raw, order=order)
        arranged = arrange(problem, operands)
        expected = (lead, *((1,) * (3 - len(pair)) + pair))
        assert (problem.bias, problem.mask, problem.bias_dtype) == (expected, expected, "float32")
        assert (arranged.bias.shape, arranged.mask.shape) == (expected, expected)
        for name in raw:
            assert canonical_equals_broadcast(getattr(arranged, name), raw[name], batch, (N, T, S))


def test_bias_and_mask_of_two_axes_count_one_head():
    for shape in ((), (S,), (T, 1), (T, S), (1, T, S)):
        raw = {"bias": np.ones(shape, np.float32), "mask": np.ones(shape, bool)}
        problem, operands = described(arrays((), heads=False) | raw)
        expected = (1,) * (4 - len(shape)) + shape
        assert (problem.bias, problem.mask) == (expected, expected)
        assert arrange(problem, operands).bias.shape == expected


@pytest.mark.parametrize(("batch", "own", "lead"), BATCHES, ids=str)
@pytest.mark.parametrize("dtype", ["bool", "int32", "float32"])
def test_canonical_shapes_of_key_mask(batch, own, lead, dtype):
    for length in (S, 1):
        raw = (np.random.default_rng(3).random((*own, length)) < 0.5).astype(dtype)
        problem, operands = described(arrays(batch) | {"key_mask": raw})
        x = arrange(problem, operands).key_mask
        assert problem.key_mask == x.shape == (lead, S)
        assert x.dtype == np.bool_
        assert canonical_equals_broadcast(x, raw != 0, batch, (S,))


@pytest.mark.parametrize("batch", [(), (6,), (2, 3)], ids=str)
def test_key_mask_that_is_a_scalar(batch):
    problem, operands = described(arrays(batch) | {"key_mask": np.array(1)})
    assert problem.key_mask == (1, S)
    assert arrange(problem, operands).key_mask.tolist() == [[True] * S]


@pytest.mark.parametrize("order", ["BNTD", "BTND"])
@pytest.mark.parametrize(("batch", "own", "lead"), BATCHES, ids=str)
def test_canonical_shapes_of_segments(batch, own, lead, order):
    rng = np.random.default_rng(4)
    for q_lead, kv_lead, q_own, kv_own in ((lead, 1, own, ()), (1, lead, (), own), (lead, lead, own, own)):
        raw = rng.integers(0, 3, (*q_own, T)), rng.integers(0, 3, (*kv_own, S))
        problem, operands = described(arrays(batch, order) | {"segment_ids": raw}, order=order)
        arranged = arrange(problem, operands)
        assert problem.segments == ((q_lead, T), (kv_lead, S))
        assert (arranged.q_segments.shape, arranged.kv_segments.shape) == problem.segments
        assert canonical_equals_broadcast(arranged.q_segments, raw[0], batch, (T,))
        assert canonical_equals_broadcast(arranged.kv_segments, raw[1], batch, (S,))


def test_one_array_of_segments_serves_both_sides():
    ids = np.array([0, 0, 1])
    problem, operands = described(arrays((2,), sizes=(N, K, 3, 3)) | {"segment_ids": ids})
    assert problem.segments == ((1, 3), (1, 3))
    arranged = arrange(problem, operands)
    assert np.array_equal(arranged.q_segments, arranged.kv_segments)


@pytest.mark.parametrize(("batch", "own", "lead"), BATCHES, ids=str)
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
def test_canonical_shapes_of_offsets(batch, own, lead, dtype):
    raw = np.random.default_rng(5).integers(0, 4, own).astype(dtype)
    problem, operands = described(arrays(batch) | {"q_offset": np.asarray(raw)}, {"causal": True})
    x = arrange(problem, operands).q_offset
    assert (problem.q_offset, problem.offsets, x.shape) == (None, (lead,), (lead,))
    assert x.dtype == np.int32
    assert canonical_equals_broadcast(x, raw, batch, ())


def test_arrange_moves_no_axis():
    for order in ("BNTD", "BTND"):
        named = arrays((2, 3), order) | {"bias": np.ones((2, 1, 1, T, S), np.float32)}
        problem, operands = described(named, order=order)
        equations = jax.make_jaxpr(lambda x, p=problem: arrange(p, x))(operands).eqns
        assert {e.primitive.name for e in equations} <= {"reshape", "broadcast_in_dim", "squeeze"}
        touching = [e.primitive.name for e in equations if e.outvars[0].aval.size == operands.q.size]
        assert touching == ["reshape"]


def test_present_and_given_are_inverse():
    segments = (np.zeros(T, np.int32), np.zeros(S, np.int32))
    table = {
        "bias": np.ones((T, S), np.float32),
        "mask": np.ones((T, S), bool),
        "key_mask": np.ones(S, bool),
        "segment_ids": segments,
        "q_offset": np.zeros(6, np.int32),
    }
    for left_out in (None, *table):
        named = {name: x for name, x in table.items() if name != left_out}
        problem, operands = described(arrays((6,)) | named, {"causal": True})
        again = Operands.given(problem, operands.present())
        assert all(a is b for a, b in zip(again, operands, strict=True))


# A problem's identity.

BASE = {"causal": True, "q_offset": 1}
VARIANTS = {
    "causal": {"causal": False, "window": 2},
    "window": {"window": 2},
    "window-left": {"window": (1, None)},
    "window-right": {"causal": False, "window": (None, 1)},
    "offset": {"q_offset": 0},
    "offset-array": {"q_offset": np.zeros((), np.int32)},
    "offset-per-batch": {"q_offset": np.zeros(6, np.int32)},
    "scale": {"scale": 0.5},
    "scale-negative": {"scale": -0.5},
    "softcap": {"softcap": 2.0},
    "softcap-other": {"softcap": 3.0},
    "precision": {"precision": "default"},
    "precision-high": {"precision": "high"},
    "bias": {"bias": np.ones((T, S), np.float32)},
    "bias-float16": {"bias": np.ones((T, S), np.float16)},
    "bias-full": {"bias": np.ones((6, N, T, S), np.float32)},
    "mask": {"mask": np.ones((T, S), bool)},
    "mask-of-keys": {"mask": np.ones((1, S), bool)},
    "key-mask": {"key_mask": np.ones(S, bool)},
    "key-mask-per-batch": {"key_mask": np.ones((6, S), bool)},
    "segments": {"segment_ids": (np.zeros(T, np.int32), np.zeros(S, np.int32))},
    "segments-per-batch": {"segment_ids": (np.zeros((6, T), np.int32), np.zeros(S, np.int32))},
    "float16": {name: x.astype(np.float16) for name, x in arrays((6,)).items()},
    "other-batch": arrays((5,)),
    "other-order": {"order": "BTND"} | arrays((6,), "BTND"),
    "other-heads": arrays((6,), sizes=(2, 2, T, S)),
    "other-groups": arrays((6,), sizes=(4, 4, T, S)),
    "other-queries": arrays((6,), sizes=(N, K, 4, S)),
    "other-keys": arrays((6,), sizes=(N, K, T, 6)),
}


def problem_of(**changes):
    named = arrays((6,)) | BASE | changes
    options = {n: named.pop(n) for n in tuple(named) if n not in (*Operands._fields, "segment_ids")}
    return described(named, options, options.pop("order", "BNTD"))[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_call_gives_an_equal_problem(name):
    one, other = problem_of(**VARIANTS[name]), problem_of(**VARIANTS[name])
    assert one == other
    assert hash(one) == hash(other)
    assert one is not other


def test_every_option_changes_the_problem():
    problems = [problem_of(), *(problem_of(**changes) for changes in VARIANTS.values())]
    assert len(set(problems)) == len(VARIANTS) + 1


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"q_offset": S - T}, {"q_offset": None}),
        ({"q_offset": np.int64(1)}, {}),
        ({"causal": np.True_}, {}),
        ({"causal": False, "window": (None, 0)}, {}),
        ({"window": (None, 7)}, {}),
        ({"window": (2**31, None)}, {}),
        ({"window": 2}, {"window": (2, 2)}),
        ({"window": [2, np.int8(2)]}, {"window": (2, 2)}),
        ({"scale": D**-0.5}, {}),
        ({"scale": np.float32(0.5)}, {"scale": 0.5}),
        ({"scale": 2}, {"scale": 2.0}),
        ({"softcap": np.int64(2)}, {"softcap": 2.0}),
        ({"precision": "highest"}, {}),
        ({"precision": jax.lax.Precision.HIGHEST}, {}),
        ({"precision": jax.lax.Precision.HIGH}, {"precision": "high"}),
        ({"precision": jax.lax.Precision.DEFAULT}, {"precision": "default"}),
        ({"key_mask": np.ones(S, np.float32)}, {"key_mask": np.ones((1, S), bool)}),
        ({"mask": np.ones((T, S), bool)}, {"mask": np.zeros((1, 1, T, S), bool)}),
    ],
    ids=lambda x: ",".join(x),
)
def test_calls_that_mean_the_same_give_an_equal_problem(changes, same):
    assert problem_of(**changes) == problem_of(**same)


def test_fields_are_plain_python():
    p = problem_of(
        scale=np.float32(2), softcap=np.int64(3), window=(np.int64(1), np.int8(0)), q_offset=np.int64(1)
    )
    values = {
        name: type(getattr(p, name))
        for name in ("scale", "softcap", "left", "right", "q_offset", "T", "dtype")
    }
    assert values == dict(scale=float, softcap=float, left=int, right=int, q_offset=int, T=int, dtype=str)
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.scale = 1.0


def test_stand_ins_give_the_problem_of_arrays():
    named = arrays((2, 3)) | {
        "bias": np.ones((2, 1, 1, T, S), np.float32),
        "mask": np.ones((3, N, 1, S), bool),
        "key_mask": np.ones((2, 1, S), np.int32),
        "q_offset": np.ones((2, 1), np.int32),
    }
    segments = (np.zeros((3, T), np.int32), np.zeros(S, np.int32))
    scale = np.float32([0.5])[0]

    def stand_in(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    abstract, _, abstract_scale = normalize(
        Operands(**jax.tree.map(stand_in, named)),
        jax.tree.map(stand_in, segments),
        causal=True,
        scale=jax.ShapeDtypeStruct((), "float32"),
        abstract=True,
    )
    problem, _, array_scale = normalize(Operands(**named), segments, causal=True, scale=jnp.asarray(scale))
    assert abstract == problem
    assert (abstract_scale.shape, array_scale.shape, problem.scale) == ((), (), 1.0)


def test_what_problems_say_of_themselves():
    p = problem_of()
    assert (p.G, p.accumulator, p.banded, p.masked, p.empty) == (2, "float32", True, True, False)
    p = problem_of(causal=False, q_offset=None)
    assert (p.banded, p.masked) == (False, False)
    for name in ("mask", "key-mask", "segments"):
        p = problem_of(causal=False, q_offset=None, **VARIANTS[name])
        assert (p.banded, p.masked) == (False, True)
    assert not problem_of(causal=False, q_offset=None, **VARIANTS["bias"]).masked
    for dtype in ("float16", "bfloat16"):
        assert (
            problem_of(**{n: jnp.asarray(x, dtype) for n, x in arrays((6,)).items()}).accumulator == "float32"
        )
    with jax.enable_x64(True):
        assert (
            problem_of(**{n: x.astype(np.float64) for n, x in arrays((6,)).items()}).accumulator == "float64"
        )
    for sizes in ((N, K, 0, S), (N, K, T, 0), (0, K, T, S)):
        assert problem_of(**arrays((6,), sizes=sizes)).empty
    assert problem_of(**arrays((0,))).empty


# The band.


def band(t, s, **options):
    p, _ = described(arrays((), heads=False, sizes=(1, 1, t, s)), options)
    return p


def test_causal_decoding_of_one_token_is_unmasked():
    p = band(1, S, causal=True)
    assert (p.left, p.right, p.q_offset, p.banded, p.masked) == (None, None, None, False, False)
    assert p == band(1, S)
    assert band(2, S, causal=True).masked


def test_causal_decoding_with_an_array_offset_stays_masked():
    p, operands = described(
        arrays((6,), sizes=(N, K, 1, S)) | {"q_offset": np.full(6, S - 1)}, {"causal": True}
    )
    assert (p.right, p.q_offset, p.offsets) == (0, None, (6,))
    assert operands.q_offset is not None


def test_a_band_is_dropped_just_where_it_hides_nothing():
    for t, s in ((1, 1), (1, 4), (3, 1), (3, 4), (4, 3)):
        distances = np.arange(s)[None, :] - np.arange(t)[:, None]
        for offset in range(-5, 6):
            for width in (0, 1, 3, 6):
                named = arrays((), heads=False, sizes=(1, 1, t, s)) | {"q_offset": offset}
                left, _ = described(named, {"window": (width, None)})
                right, _ = described(named, {"window": (None, width)})
                hides_left = (distances - offset < -width).any()
                hides_right = (distances - offset > width).any()
                assert (left.left, left.right) == (width if hides_left else None, None)
                assert (right.left, right.right) == (None, width if hides_right else None)
                assert left.q_offset == (offset if hides_left else None)


@pytest.mark.parametrize(
    "window", [100, 2**30 - 1, 2**30, 2**31, 2**63, 10**30, (None, None), (2**40, None)], ids=str
)
def test_huge_windows_are_no_windows(window):
    assert band(T, S, window=window) == band(T, S)
    assert band(T, S, window=window, causal=True) == band(T, S, causal=True)


@pytest.mark.parametrize("window", [2**31, (None, 2**40), (10**30, 10**30)], ids=str)
def test_huge_windows_take_an_offset(window):
    for offset in (3, np.zeros((), np.int32)):
        named = arrays((), heads=False) | {"q_offset": offset}
        problem, operands = described(named, {"window": window})
        assert problem == band(T, S)
        assert operands.q_offset is None


def test_window_zero_is_a_diagonal():
    p = band(T, T, window=0)
    assert (p.left, p.right, p.q_offset) == (0, 0, 0)
    named = arrays((), heads=False, sizes=(1, 1, T, T))
    for offset in (0, 1):
        out, lse = flash_attention(**named, window=0, q_offset=offset)
        expected = np.concatenate([named["v"][offset:], np.zeros((offset, Dv), np.float32)])
        np.testing.assert_allclose(out, expected, atol=1e-6)
        assert np.isneginf(lse).tolist() == [False] * (T - offset) + [True] * offset


def test_causal_and_window_meet():
    assert band(T, S, causal=True, window=(1, 4)) == band(T, S, window=(1, 0))
    assert band(T, S, causal=True, window=(1, None)) == band(T, S, window=(1, 0))
    assert band(T, S, causal=True, window=0).right == 0


@pytest.mark.parametrize("window", [2**30 - 1, 2**30])
def test_a_window_is_exact_far_away(window):
    # The last query stands beyond 2**30, so that the window hides the first keys from it.
    far = 2**30 - 1
    named = arrays((), heads=False)
    lse = flash_attention(**named, window=(window, None), q_offset=far).lse
    seen = [j for j in range(S) if far + T - 1 - j <= window]
    assert 0 < len(seen) < S
    x = (named["k"][seen] @ named["q"][T - 1]).astype(np.float64) * D**-0.5
    np.testing.assert_allclose(lse[T - 1], np.log(np.exp(x).sum()), atol=1e-5)


# What the broadcast shapes mean: nested loops in float64.


def brute(named, options, order):
    """out and lse, in the order of q, by the definition in DESIGN section 2."""
    q, k, v = (np.asarray(named[name], np.float64) for name in "qkv")
    if order == "BTND":
        q, k, v = (x.swapaxes(-3, -2) for x in (q, k, v))
    (*batch, heads, t, _), (groups, s) = q.shape, k.shape[-3:-1]
    pair = (*batch, heads, t, s)
    bias = np.broadcast_to(np.float64(named.get("bias", 0)), pair)
    mask = np.broadcast_to(named.get("mask", True), pair)
    key_mask = np.broadcast_to(named.get("key_mask", 1), (*batch, s))
    of_q, of_kv = named.get("segment_ids", (0, 0))
    of_q, of_kv = np.broadcast_to(of_q, (*batch, t)), np.broadcast_to(of_kv, (*batch, s))
    offset = np.broadcast_to(named.get("q_offset", s - t), batch)
    out, lse = np.zeros((*q.shape[:-1], v.shape[-1])), np.full(q.shape[:-1], -np.inf)
    for b in np.ndindex(*batch):
        for n in range(heads):
            g = n // (heads // groups)
            for i in range(t):
                terms = []
                for j in range(s):
                    causal = options.get("causal") and j > i + offset[b]
                    if causal or not mask[(*b, n, i, j)] or not key_mask[(*b, j)]:
                        continue
                    if of_q[(*b, i)] == of_kv[(*b, j)]:
                        logit = q[(*b, n, i)] @ k[(*b, g, j)] / math.sqrt(q.shape[-1])
                        terms.append((math.exp(logit + bias[(*b, n, i, j)]), j))
                total = sum(weight for weight, _ in terms)
                if terms:
                    lse[(*b, n, i)] = math.log(total)
                    out[(*b, n, i)] = sum(weight / total * v[(*b, g, j)] for weight, j in terms)
    return (out.swapaxes(-3, -2) if order == "BTND" else out), lse


def drawn(name, shape):
    rng = np.random.default_rng(6)
    if name == "bias":
        return floats(rng, *shape)
    if name in ("mask", "key_mask"):
        return rng.random(shape) < 0.6
    if name == "q_offset":
        return rng.integers(-2, 5, shape).astype(np.int32)
    return tuple(rng.integers(0, 2, x) for x in shape)


MEANT = [
    ((2, 3), "bias", (2, 1, 1, T, S)),
    ((2, 3), "mask", (3, N, 1, S)),
    ((2, 3), "key_mask", (2, 1, S)),
    ((2, 3), "q_offset", (2, 1)),
    ((2, 3), "segment_ids", ((2, 1, T), (3, S))),
    ((2, 3), "bias", (2, 3, 1, 1, 1)),
    ((2, 3), "bias", (1, 1, N, 1, S)),
    ((2, 3), "mask", (1, 3, 1, T, 1)),
    ((2, 3), "key_mask", (3, 1)),
    ((2, 3), "q_offset", (3,)),
    ((6,), "bias", (6, 1, T, S)),
    ((), "bias", (N, 1, S)),
]


def assert_equals_nested_loops(named, options, order):
    out, lse = brute(named, options, order)
    if order == "BNTD":
        results = flash_attention(**named, **options), attention_and_lse(**named, **options)
    else:
        problem, operands = described(named, options, order)
        results = _flash(Call(problem, None), operands, None), _plain(problem, operands, None)
    for actual in results:
        np.testing.assert_allclose(actual[0], out, atol=2e-6)
        np.testing.assert_allclose(actual[1], lse, atol=2e-6)


@pytest.mark.parametrize(("batch", "name", "shape"), MEANT, ids=str)
def test_results_equal_nested_loops(batch, name, shape):
    options = {"causal": True} if name == "q_offset" else {}
    assert_equals_nested_loops(arrays(batch) | {name: drawn(name, shape)}, options, "BNTD")


@pytest.mark.parametrize(("batch", "name", "shape"), MEANT[:5], ids=str)
def test_results_in_the_other_order_equal_nested_loops(batch, name, shape):
    options = {"causal": True} if name == "q_offset" else {}
    assert_equals_nested_loops(arrays(batch, "BTND") | {name: drawn(name, shape)}, options, "BTND")


@pytest.mark.parametrize("heads", [True, False])
def test_attention_is_the_out_of_nested_loops(heads):
    named = arrays((), heads=heads)
    shaped = named if heads else {name: x[None] for name, x in named.items()}
    out, _ = brute(shaped, {"causal": True}, "BNTD")
    np.testing.assert_allclose(attention(**named, causal=True), out if heads else out[0], atol=2e-6)


def test_everything_at_once_equals_nested_loops():
    shapes = {"bias": (2, 1, 1, T, S), "mask": (3, N, 1, S), "key_mask": (2, 1, S), "q_offset": (3,)}
    shapes["segment_ids"] = ((3, T), (2, 1, S))
    for order in ("BNTD", "BTND"):
        named = arrays((2, 3), order) | {name: drawn(name, shape) for name, shape in shapes.items()}
        _, lse = brute(named, {"causal": True}, order)
        assert np.isneginf(lse).any()
        assert np.isfinite(lse).any()
        assert_equals_nested_loops(named, {"causal": True}, order)


@pytest.mark.parametrize("shape", [(2, 1, 1, T, S), (3, N, 1, 1)], ids=str)
def test_gradient_of_a_broadcast_bias_is_the_sum_over_its_broadcast_axes(shape):
    named, full = arrays((2, 3)), (2, 3, N, T, S)
    bias = drawn("bias", shape)
    weights = floats(np.random.default_rng(7), 2, 3, N, T, Dv)

    def loss(bias):
        return (flash_attention(**named, bias=bias).out * weights).sum()

    own, of_full = jax.grad(loss)(bias), jax.grad(loss)(np.broadcast_to(bias, full).copy())
    assert own.shape == shape
    lead = len(full) - len(shape)
    axes = tuple(range(lead)) + tuple(lead + i for i, n in enumerate(shape) if n == 1)
    np.testing.assert_allclose(own, np.sum(of_full, axes).reshape(shape), atol=5e-6)


def test_problem_holds_no_array():
    leaves = dataclasses.asdict(problem_of(**VARIANTS["offset-per-batch"])).values()
    assert not any(isinstance(x, np.ndarray | jax.Array) for x in leaves)
    assert isinstance(problem_of(), Problem)
