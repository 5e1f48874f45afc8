"""`dot_product_attention` against `jax.nn`'s, and where it goes beyond."""

import functools
import inspect
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attention_jax import Unsupported, dot_product_attention, flash_attention
from flash_attention_jax._api import attention_and_lse
from flash_attention_jax._dot_product import _within_lengths
from flash_attention_jax._mask import Cover, Masks, block_map, visible
from flash_attention_jax._problem import Problem
from flash_attention_jax.testing import Case, judge

theirs = jax.nn.dot_product_attention
B, T, S, N, K, D = 2, 9, 13, 4, 2, 8
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (
    RNG.standard_normal(s).astype(np.float32) for s in ((B, T, N, D), (B, S, K, D), (B, S, K, D))
)


def i32(*values):
    return np.array(values, np.int32)


def test_the_signature_is_that_of_jax_nn_and_more_by_keyword():
    ours = list(inspect.signature(dot_product_attention).parameters.values())
    expected = list(inspect.signature(theirs).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[: len(expected)]] == [
        (p.name, p.kind, p.default) for p in expected
    ]
    more = [(p.name, p.kind, p.default) for p in ours[len(expected) :]]
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = ("softcap", None), ("precision", None), ("deterministic", False)
    assert more == [(name, keyword, default) for name, default in options]


ARGUMENTS = {
    "nothing": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (3, 1)},
    "window as an int": {"local_window_size": 2},
    "causal window": {"is_causal": True, "local_window_size": (4, 4)},
    "query lengths": {"query_seq_lengths": i32(4, 9)},
    "key lengths": {"key_value_seq_lengths": i32(13, 5)},
    "both lengths": {"query_seq_lengths": i32(4, 9), "key_value_seq_lengths": i32(1, 11)},
    "lengths beyond": {"query_seq_lengths": i32(99, -3), "key_value_seq_lengths": i32(14, 2**31 - 1)},
    "scale": {"scale": 0.2},
    "integer scale": {"scale": 1},
    "bias": {"bias": RNG.standard_normal((B, N, T, S)).astype(np.float32)},
    "bias of heads and keys": {"bias": RNG.standard_normal((1, N, 1, S)).astype(np.float32)},
    "bias of three axes": {"bias": RNG.standard_normal((N, T, S)).astype(np.float32)},
    "bias in float16": {"bias": RNG.standard_normal((1, 1, T, S)).astype(np.float16)},
    "mask": {"mask": RNG.random((B, N, T, S)) < 0.7},
    "mask of keys": {"mask": RNG.random((B, 1, 1, S)) < 0.7},
    "mask of two axes": {"mask": RNG.random((T, S)) < 0.7},
}


def same(actual, expected, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(np.float64(x), np.float64(y), **({"atol": 2e-6} | tolerance))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_each_argument_means_what_it_does_in_jax_nn(name):
    same(
        dot_product_attention(QUERY, KEY, VALUE, **ARGUMENTS[name]),
        theirs(QUERY, KEY, VALUE, **ARGUMENTS[name]),
    )


ONE = {
    "nothing": {},
    "bias": {"bias": ARGUMENTS["bias"]["bias"][:1]},
    "bias of three axes": ARGUMENTS["bias of three axes"],
    "mask": {"mask": ARGUMENTS["mask"]["mask"][:1]},
    "lengths": {"query_seq_lengths": i32(5), "key_value_seq_lengths": i32(7)},
    "residual": {"return_residual": True, "is_causal": True},
}


@pytest.mark.parametrize("batched", [(), (0,), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("name", ONE)
def test_arrays_may_lack_the_batch_axis(name, batched):
    arrays = [x[:1] if i in batched else x[0] for i, x in enumerate((QUERY, KEY, VALUE))]
    same(dot_product_attention(*arrays, **ONE[name]), theirs(*arrays, **ONE[name]))


# Arguments at random.


@st.composite
def calls(draw):
    """Arguments of both functions as NumPy arrays, and which of them are differentiated."""
    batch, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, t, s, d = (draw(st.integers(1, n)) for n in (3, 24, 24, 16))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    moved = {
        "query": rng.standard_normal((batch, t, heads * group, d)),
        "key": rng.standard_normal((batch, s, heads, d)),
        "value": rng.standard_normal((batch, s, heads, d)),
    }
    pair = [st.sampled_from((1, n)) for n in (batch, heads * group, t, s)]
    if draw(st.booleans()):
        moved["bias"] = rng.standard_normal([draw(n) for n in pair])
    moved = {name: x.astype(np.float32) for name, x in moved.items()}
    fixed, options = {}, {"return_residual": draw(st.booleans())}
    if draw(st.booleans()):
        fixed["mask"] = rng.random([draw(n) for n in pair]) < 0.8
    for name, most in (("query_seq_lengths", t), ("key_value_seq_lengths", s)):
        if draw(st.booleans()):
            fixed[name] = i32(*(draw(st.integers(0, most + 2)) for _ in range(batch)))
    if batch == 1 and draw(st.booleans()):
        named = {name: moved.pop(name)[0] for name in ("query", "key", "value")}
        moved = named | moved
    for name, values in (
        ("is_causal", st.booleans()),
        ("local_window_size", st.none() | st.integers(0, 12) | st.tuples(*[st.integers(0, 25)] * 2)),
        ("scale", st.none() | st.floats(-1, 1)),
    ):
        options[name] = draw(values)
    return moved, fixed, options


def alive(moved, fixed, options):
    """bool (B, N, T): which queries see a key, by `jax.nn`'s documentation."""
    query, key = (x.reshape((-1, *x.shape[-3:])) for x in (moved["query"], moved["key"]))
    batch, t, heads, s = *query.shape[:3], key.shape[1]
    i, j = np.arange(t)[:, None], np.arange(s)
    seen = np.broadcast_to(fixed.get("mask", True), (batch, heads, t, s)).copy()
    if options["is_causal"]:
        seen &= j <= i
    if options["local_window_size"] is not None:
        left, right = np.broadcast_to(options["local_window_size"], 2)
        seen &= (j - i <= right) & (i - j <= left)
    for name, position in (("query_seq_lengths", i), ("key_value_seq_lengths", j)):
        if name in fixed:
            seen &= position < fixed[name][:, None, None, None]
    return seen.any(-1)


def results(function, moved, fixed, options, cotangents):
    """Out, the residual or None, and the gradients, for these cotangents of out."""

    @functools.partial(jax.jit)
    def run(moved, fixed):
        def of_moved(moved):
            result = function(**moved, **fixed, **options)
            return result if options["return_residual"] else (result, None)

        out, pull, residual = jax.vjp(of_moved, moved, has_aux=True)
        return out, residual, pull(cotangents.astype(out.dtype))[0]

    out, residual, gradients = run(moved, fixed)
    return {"out": out, "residual": residual} | {f"d{name}": x for name, x in gradients.items()}


def error(actual, exact):
    return float(np.abs(np.float64(actual) - np.float64(exact)).max(initial=0.0))


def assert_near(moved, fixed, options):
    """Values, residual and gradients are within twice the error of `jax.nn` and four roundings.

    Exact is `jax.nn` with float64 arrays. Queries that see nothing, whose results differ by
    design, are left out, and get a cotangent of 0 in `jax.nn` alone. Where a query sees one key the
    gradient of its logit is 0, by a difference of products that are rounded in float32.
    """
    live = np.swapaxes(alive(moved, fixed, options), 1, 2).reshape((*moved["query"].shape[:-1], 1))
    cotangents = np.random.default_rng(1).standard_normal(moved["query"].shape)
    ours = results(dot_product_attention, moved, fixed, options, cotangents)
    plain = results(theirs, moved, fixed, options, cotangents * live)
    with jax.enable_x64(True):
        wide = {name: x.astype(np.float64) for name, x in moved.items()}
        exact = results(theirs, wide, fixed, options, cotangents * live)
    sizes = [
        np.abs(np.float64(x)).max() for x in (cotangents, *(moved[n] for n in ("query", "key", "value")))
    ]
    product = float(np.finfo(np.float32).eps) * sizes[0] * sizes[3] * max(1, *sizes[1:3])
    assert (ours["residual"] is None) == (not options["return_residual"])
    for name, x in ours.items():
        if x is None:
            continue
        assert (x.shape, x.dtype) == (plain[name].shape, plain[name].dtype), name
        keep = {"out": live, "residual": live[..., 0]}.get(name, np.True_)
        of_dead = -np.inf if name == "residual" else 0
        assert np.all(np.where(keep, of_dead, x) == of_dead), name
        near, far, truth = (np.where(keep, y[name], 0) for y in (ours, plain, exact))
        rounding = float(jnp.finfo(x.dtype).eps) * np.abs(truth).max(initial=0.0)
        assert error(near, truth) <= 2 * error(far, truth) + 4 * (rounding + product), name


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(call=calls())
def test_any_arguments_give_what_jax_nn_gives(call):
    assert_near(*call)
    jax.clear_caches()


@pytest.mark.parametrize(
    "name", ["nothing", "causal window", "both lengths", "bias of heads and keys", "mask"]
)
def test_bfloat16_gives_what_jax_nn_gives(name):
    """The residual is rounded to key's dtype, as there. (On the CPU `jax.nn` has no float16.)"""
    fixed = dict(ARGUMENTS[name])
    moved = {"query": QUERY, "key": KEY, "value": VALUE} | {n: fixed.pop(n) for n in ("bias",) if n in fixed}
    moved = {n: x.astype(jnp.bfloat16) for n, x in moved.items()}
    options = {"is_causal": False, "local_window_size": None, "return_residual": True}
    options |= {n: fixed.pop(n) for n in ("is_causal", "local_window_size") if n in fixed}
    assert_near(moved, fixed, options)


# Where the two differ.

DEAD = {"mask": np.arange(T)[:, None] > np.zeros(S)}
PADDED = {"query_seq_lengths": i32(T - 3, T)}


def test_a_query_that_sees_nothing_gets_0_where_jax_nn_gives_the_mean():
    out, residual = dot_product_attention(QUERY, KEY, VALUE, **DEAD, return_residual=True)
    their_out, their_residual = theirs(QUERY, KEY, VALUE, **DEAD, return_residual=True)
    assert not np.any(out[:, 0])
    assert np.all(np.isneginf(residual[:, 0]))
    np.testing.assert_allclose(their_out[:, 0, 0], VALUE[:, :, 0].mean(1), atol=1e-6)
    assert np.all(their_residual[:, 0] < -1e38)
    np.testing.assert_allclose(out[:, 1:], their_out[:, 1:], atol=1e-6)
    np.testing.assert_allclose(residual[:, 1:], their_residual[:, 1:], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "dead"), [(DEAD, np.s_[:, 0]), (PADDED, np.s_[0, -3:])], ids=["mask", "lengths"]
)
def test_a_query_that_sees_nothing_may_hold_anything_and_so_may_its_cotangents(options, dead):
    cotangents = RNG.standard_normal(QUERY.shape).astype(np.float32), np.ones(QUERY.shape[:-1], np.float32)
    f = functools.partial(dot_product_attention, **options, return_residual=True)
    (out, residual), pull = jax.vjp(f, QUERY, KEY, VALUE)
    spoilt = [x.copy() for x in (QUERY, *cotangents)]
    for x in spoilt:
        x[dead] = np.nan
    (other, other_residual), other_pull = jax.vjp(f, spoilt[0], KEY, VALUE)
    same((other, other_residual), (out, residual), atol=0)
    expected = pull(cotangents)
    same(other_pull(tuple(spoilt[1:])), expected, atol=0)
    assert not np.any(out[dead])
    assert not np.any(expected[0][dead])


def test_the_residual_has_gradients():
    def f(q, k):
        return dot_product_attention(q, k, VALUE, is_causal=True, return_residual=True)[1]

    def plain(q, k):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, VALUE))
        return jnp.swapaxes(attention_and_lse(q, k, v, causal=True, q_offset=0).lse, 1, 2)

    weights = RNG.standard_normal((B, T, N)).astype(np.float32)
    ours, expected = (
        jax.grad(lambda q, k, g=g: jnp.sum(g(q, k) * weights), (0, 1))(QUERY, KEY) for g in (f, plain)
    )
    same(ours, expected)
    assert all(np.any(x) for x in ours)


BEYOND = [
    Case("dot-product-dv", (2, 6, 37, 16), (2, 3, 53, 16), (2, 3, 53, 24)),
    Case("dot-product-softcap", (2, 2, 20, 8), (2, 1, 30, 8), (2, 1, 30, 8), options=(("softcap", 1.5),)),
    Case(
        "dot-product-all",
        (2, 6, 37, 16),
        (2, 3, 53, 16),
        (2, 3, 53, 24),
        options=(("causal", True), ("softcap", 2.0), ("window", (9, None))),
        bias=(1, 6, 37, 53),
        mask=(2, 1, 37, 53),
        traced_scale=True,
    ),
]


def in_the_other_layout(q, k, v, *, causal=False, window=None, implementation=None, **others):
    """`dot_product_attention` as a function of the arguments of `flash_attention`, q_offset being 0."""
    q, k, v = (jnp.swapaxes(x, -3, -2) for x in (q, k, v))
    options = others | {"is_causal": causal, "local_window_size": window, "implementation": implementation}
    out, residual = dot_product_attention(q, k, v, **options, return_residual=True)
    return jnp.swapaxes(out, -3, -2), jnp.swapaxes(residual, -2, -1)


def aligned_as_flash(case):
    """The case with T = S, where both alignments are one."""
    shapes = {name: (*getattr(case, name)[:-2], 37, getattr(case, name)[-1]) for name in "qkv"}
    pairs = {name: (*getattr(case, name)[:-1], 37) for name in ("bias", "mask") if getattr(case, name)}
    return Case(**(vars(case) | shapes | pairs))


@pytest.mark.parametrize("case", [*BEYOND[:2], aligned_as_flash(BEYOND[2])], ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_extensions_are_within_their_budget(case, implementation):
    """Dv != D, softcap, lse gradients and a traced scale, which `jax.nn` has not."""
    over = [
        v
        for v in judge(functools.partial(in_the_other_layout, implementation=implementation), case)
        if not v.within
    ]
    assert not over, over


def test_it_is_aligned_at_the_first_position_and_flash_attention_at_the_last():
    q, k, v = (np.swapaxes(x, 1, 2) for x in (QUERY, KEY, VALUE))
    ours = np.swapaxes(dot_product_attention(QUERY, KEY, VALUE, is_causal=True), 1, 2)
    np.testing.assert_allclose(ours, flash_attention(q, k, v, causal=True, q_offset=0).out, atol=1e-6)
    assert np.abs(ours - flash_attention(q, k, v, causal=True).out).max() > 0.1


# How it runs.

WHOLE = (2, 1024, 4, 64)
EQUATIONS = {"forward": ["attention"], "gradient": ["attention", "attention_backward"]}


def functions(**options):
    def forward(q, k, v):
        return dot_product_attention(q, k, v, is_causal=True, **options)

    def gradient(q, k, v):
        return jax.grad(lambda *x: jnp.sum(forward(*x) ** 2), (0, 1, 2))(q, k, v)

    return {"forward": forward, "gradient": gradient}


def equations(jaxpr):
    """All equations of a jaxpr and of those it calls, but not of the primitives of attention."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("what", EQUATIONS)
def test_no_transpose_stands_around_a_kernel(small_tiles, what, lengths):
    """What is transposed is blocks, statistics of rows, and in the end the sums of dk and dv of `xla`."""
    q = jnp.zeros(WHOLE)
    given = {"query_seq_lengths": i32(3, 9), "key_value_seq_lengths": i32(3, 9)} if lengths else {}
    jaxpr = jax.make_jaxpr(functions(**given)[what])(q, q, q)
    all_of_them = list(equations(jaxpr.jaxpr))
    names = [e.primitive.name for e in all_of_them]
    assert [name for name in names if name.startswith("attention")] == EQUATIONS[what]
    assert all(e.outvars[0].aval.ndim < 4 for e in all_of_them if e.primitive.name == "transpose")
    text = jax.jit(functions(**given)[what]).lower(q, q, q).compile().as_text()
    sizes = [
        np.prod([int(n) for n in dims.split(",")])
        for dims in re.findall(r"= f32\[([\d,]+)\]\S* transpose\(", text)
    ]
    assert sum(size >= q.size for size in sizes) <= (2 if what == "gradient" else 0)


def described(**options):
    """The problem that a call comes down to."""
    jaxpr = jax.make_jaxpr(functools.partial(dot_product_attention, **options))(QUERY, KEY, VALUE)
    return next(e.params["call"].problem for e in equations(jaxpr.jaxpr) if e.primitive.name == "attention")


def test_lengths_become_the_operand_that_costs_least():
    nothing = described()
    assert (nothing.order, nothing.masked, nothing.q_offset) == ("BTND", False, None)
    assert described(is_causal=True).q_offset == 0
    keys = described(key_value_seq_lengths=i32(3, 4))
    assert (keys.key_mask, keys.segments, keys.mask) == ((B, S), None, None)
    queries = described(query_seq_lengths=i32(3, 4))
    assert (queries.key_mask, queries.segments, queries.mask) == (None, ((B, T), (1, S)), None)
    both = described(query_seq_lengths=i32(3, 4), key_value_seq_lengths=i32(3, 4))
    assert (both.key_mask, both.segments, both.mask) == (None, ((B, T), (B, S)), None)


@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)], ids=str)
def test_exactly_the_blocks_past_the_lengths_are_skipped(given):
    lengths = [i32(0, 1, 7, 8, 9, 30, 24), i32(5, 0, 40, 16, 15, 33, 1)]
    lengths = [x if wanted else None for x, wanted in zip(lengths, given, strict=True)]
    t, s, rows, cols = 30, 40, 8, 16
    key_mask, segments = _within_lengths((7, t, 1, 1), (7, s, 1, 1), *lengths)
    q_ids, kv_ids = segments or (None, None)
    masks = Masks(None, key_mask, q_ids, None if kv_ids is None else jnp.broadcast_to(kv_ids, (7, s)), None)
    problem = Problem(
        7, 1, 1, t, s, 1, 1, "float32", "BTND", 1.0,
        key_mask=None if key_mask is None else (7, s),
        segments=((7, t), (7, s)) if segments else None,
    )  # fmt: skip
    pairs = visible(problem, masks, jnp.arange(t), jnp.arange(s))
    pairs = np.broadcast_to(pairs[:, 0, 0], (7, t, s))
    covers = np.broadcast_to(block_map(problem, masks, rows, cols), (7, 4, 3))
    for b, i, j in np.ndindex(covers.shape):
        block = pairs[b, i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
        expected = Cover.ALL if block.all() else Cover.PART if block.any() else Cover.NONE
        assert covers[b, i, j] == expected, (b, i, j)


def test_lengths_may_be_traced_and_batched():
    lengths = i32(4, 9), i32(13, 5)

    def f(q_lengths, kv_lengths):
        options = {"query_seq_lengths": q_lengths, "key_value_seq_lengths": kv_lengths}
        return dot_product_attention(QUERY, KEY, VALUE, **options)

    same(jax.jit(f)(*lengths), f(*lengths), atol=1e-6)
    many = [np.stack([x, x[::-1]]) for x in lengths]
    for index, one in enumerate(jax.vmap(f)(*many)):
        same(one, f(*(x[index] for x in many)), atol=1e-6)


def test_derivatives_of_second_order_and_forward_mode():
    options = {"query_seq_lengths": i32(4, 9), "key_value_seq_lengths": i32(13, 5), "is_causal": True}

    def product(function):
        def loss(q):
            return jnp.sum(function(q, KEY, VALUE, **options) ** 2)

        return jax.jvp(jax.grad(loss), (QUERY,), (QUERY[::-1],))

    same(product(dot_product_attention), product(theirs), atol=1e-5)


def test_numpy_lengths_of_64_bits_are_taken():
    expected = dot_product_attention(QUERY, KEY, VALUE, key_value_seq_lengths=i32(3, 4))
    same(dot_product_attention(QUERY, KEY, VALUE, key_value_seq_lengths=np.array([3, 4])), expected, atol=0)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_lengths_of_every_integer_dtype_mean_their_values(dtype):
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    lengths = ([3, high], [low, 4]), (i32(3, T), i32(0, 4))
    for values, meant in zip(*lengths, strict=True):
        expected = dot_product_attention(
            QUERY, KEY, VALUE, query_seq_lengths=meant, key_value_seq_lengths=np.where(meant == T, S, meant)
        )
        with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
            array = jnp.array(values, dtype)
            options = {"query_seq_lengths": array, "key_value_seq_lengths": array}
            same(dot_product_attention(QUERY, KEY, VALUE, **options), expected, atol=0)


def test_a_length_beyond_int32_hides_nothing_and_one_below_it_everything():
    with jax.enable_x64(True):
        for value, seen in ((2**32, True), (2**31, True), (-(2**31) - 1, False), (-(2**32), False)):
            lengths = jnp.array([value, 4])
            out = dot_product_attention(QUERY, KEY, VALUE, key_value_seq_lengths=lengths)
            assert np.any(out[0]) == seen


@pytest.mark.parametrize(
    "shapes",
    [((0, 3, 2, 4), (0, 5, 2, 4)), ((2, 0, 2, 4), (2, 5, 2, 4)), ((2, 3, 2, 4), (2, 0, 2, 4))],
    ids=str,
)
def test_empty_axes(shapes):
    q, k = (np.ones(s, np.float32) for s in shapes)
    lengths = np.ones(len(q), np.int32)
    out, residual = dot_product_attention(q, k, k, query_seq_lengths=lengths, return_residual=True)
    assert (out.shape, residual.shape) == (q.shape, q.shape[:-1])
    assert not np.any(out)
    assert np.all(np.isneginf(residual))


# Errors.

LENGTHS = "of shape (B,) = (2,), got shape"
WINDOW = "None, an int, or a pair (left, right) of ints or None, each at least 0"
BAD = {
    "query a list": (
        {"query": [[[1.0]]]},
        TypeError,
        "query must be a JAX or NumPy array, got builtins.list",
    ),
    "query of integers": (
        {"query": np.ones((B, T, N, D), np.int32)},
        TypeError,
        "query must be of dtype float16, bfloat16, float32, float64, got int32",
    ),
    "query in float64": (
        {"query": QUERY.astype(np.float64)},
        TypeError,
        "query must be float32 or smaller unless jax_enable_x64 is on, got float64",
    ),
    "query of two axes": (
        {"query": QUERY[0, 0]},
        ValueError,
        "query must be an array of shape (B, T, N, D) or (T, N, D), got shape (4, 8)",
    ),
    "key of five axes": (
        {"key": KEY[None]},
        ValueError,
        "key must be an array of shape (B, S, K, D) or (S, K, D), got shape (1, 2, 13, 2, 8)",
    ),
    "value of two axes": (
        {"value": VALUE[0, 0]},
        ValueError,
        "value must be an array of shape (B, S, K, Dv) or (S, K, Dv), got shape (2, 8)",
    ),
    "key of another batch": (
        {"key": KEY[:1]},
        ValueError,
        "key must be of query's batch shape (2,), got shape (1, 13, 2, 8)",
    ),
    "key of another head dim": (
        {"key": KEY[..., :4]},
        ValueError,
        "key must be of query's head dim D = 8, got shape (2, 13, 2, 4)",
    ),
    "key of another dtype": (
        {"key": KEY.astype(np.float16)},
        TypeError,
        "key must be of query's dtype float32, got float16",
    ),
    "value of another length": (
        {"value": VALUE[:, :5]},
        ValueError,
        "value must be of key's heads and length (K, S) = (2, 13), got shape (2, 5, 2, 8)",
    ),
    "heads": (
        {"query": QUERY[:, :, :3]},
        ValueError,
        "key must be of a head count K that divides query's N = 3, got K = 2",
    ),
    "no head dim": (
        {"query": QUERY[..., :0], "key": KEY[..., :0]},
        ValueError,
        "query must be of a head dim of at least 1, got shape (2, 9, 4, 0)",
    ),
    "bias of integers": (
        {"bias": np.ones((T, S), np.int32)},
        TypeError,
        "bias must be of dtype float16, bfloat16, float32, float64, got int32",
    ),
    "mask shape": (
        {"mask": np.ones((B, N, S, T), bool)},
        ValueError,
        "mask must be broadcastable to (*batch, N, T, S) = (2, 4, 9, 13), got shape (2, 4, 13, 9)",
    ),
    "mask of numbers": ({"mask": np.ones((T, S))}, TypeError, "mask must be of dtype bool, got float64"),
    "scale": ({"scale": "1"}, TypeError, "scale must be a real number or a scalar array, got str"),
    "is_causal": ({"is_causal": 1}, TypeError, "is_causal must be True or False, got 1"),
    "query lengths": ({"query_seq_lengths": i32(3)}, ValueError, f"query_seq_lengths must be {LENGTHS} (1,)"),
    "key lengths": (
        {"key_value_seq_lengths": i32(3, 4)[:, None]},
        ValueError,
        f"key_value_seq_lengths must be {LENGTHS} (2, 1)",
    ),
    "lengths a list": (
        {"query_seq_lengths": [3, 4]},
        TypeError,
        "query_seq_lengths must be a JAX or NumPy array, got builtins.list",
    ),
    "lengths of floats": (
        {"key_value_seq_lengths": np.ones(2, np.float32)},
        TypeError,
        "key_value_seq_lengths must be of an integer dtype, got float32",
    ),
    "lengths out of range": (
        {"query_seq_lengths": np.array([1, 2**31])},
        ValueError,
        "query_seq_lengths must be within the range of int32, got values from 1 to 2147483648",
    ),
    "window": (
        {"local_window_size": "3"},
        TypeError,
        f"local_window_size must be {WINDOW}, got '3'",
    ),
    "negative window": (
        {"local_window_size": (-1, 2)},
        ValueError,
        f"local_window_size must be {WINDOW}, got (-1, 2)",
    ),
    "return_residual": (
        {"return_residual": 1},
        TypeError,
        "return_residual must be True or False, got 1",
    ),
    "softcap": ({"softcap": 0}, ValueError, "softcap must be None or a positive number, got 0"),
    "precision": (
        {"precision": "best"},
        ValueError,
        "precision must be None, 'default', 'high', 'highest' or a jax.lax.Precision, got 'best'",
    ),
    "cudnn": (
        {"implementation": "cudnn"},
        ValueError,
        "implementation must be None or one of 'hopper', 'xla', 'reference', 'cudnn' being jax.nn's alone, "
        "got 'cudnn'",
    ),
    "implementation": (
        {"implementation": "fast"},
        ValueError,
        "implementation must be None or one of 'hopper', 'xla', 'reference', got 'fast'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_speak_of_the_arguments_by_their_names_here(name):
    arguments, kind, message = BAD[name]
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        dot_product_attention(**({"query": QUERY, "key": KEY, "value": VALUE} | arguments))


def test_an_error_shows_the_shape_that_was_given_without_a_batch_axis():
    with pytest.raises(ValueError, match=re.escape("got shape (13, 2, 4)")):
        dot_product_attention(QUERY[0], KEY[0, ..., :4], VALUE[0])


def test_an_implementation_that_refuses_says_why(replaced_implementation):
    replaced_implementation("xla", refuses=lambda problem, device: f"not in {problem.order}")
    with pytest.raises(Unsupported, match="'xla' cannot run this problem: not in BTND"):
        dot_product_attention(QUERY, KEY, VALUE, implementation="xla")
    same(dot_product_attention(QUERY, KEY, VALUE), theirs(QUERY, KEY, VALUE))
