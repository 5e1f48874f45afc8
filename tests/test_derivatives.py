"""Derivatives beyond the first gradient: every mode, every order, every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_jax import attention, flash_attention
from flash_attention_jax._api import attention_and_lse

RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal(s) for s in ((2, 4, 21, 6), (2, 2, 29, 6), (2, 2, 29, 5)))
BIAS = RNG.standard_normal((1, 4, 21, 29))
# Hides some keys from all queries and, with causal, some queries from all keys.
KEY_MASK = RNG.random((2, 29)) < 0.7
PROBLEMS = {
    "full": {},
    "causal": {"causal": True, "q_offset": -2},
    "masked": {"key_mask": KEY_MASK, "window": (6, 1)},
    "capped": {"softcap": 2.0, "causal": True},
}
ARGUMENTS = (Q, K, V, BIAS)
DIRECTIONS = tuple(RNG.standard_normal(x.shape) for x in ARGUMENTS)
OTHERS = tuple(RNG.standard_normal(x.shape) for x in ARGUMENTS)


@pytest.fixture(autouse=True)
def _double(small_tiles):
    with jax.enable_x64(True):
        yield


def value(q, k, v, bias, *, implementation, **options):
    """A scalar that is not linear in out and lse."""
    if implementation == "plain":
        function = attention_and_lse
    else:
        function = functools.partial(flash_attention, implementation=implementation)
    out, lse = function(q, k, v, bias=bias, **options)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(jnp.where(jnp.isneginf(lse), 0.0, lse)))


def inner(xs, ys):
    return sum(jnp.vdot(x, y) for x, y in zip(xs, ys, strict=True))


ALL = (0, 1, 2, 3)


def forward_over_reverse(f):
    return lambda *x: jax.jvp(jax.grad(f, ALL), x, DIRECTIONS)[1]


def reverse_over_forward(f):
    return jax.grad(lambda *x: jax.jvp(f, x, DIRECTIONS)[1], ALL)


def reverse_over_reverse(f):
    return jax.grad(lambda *x: inner(jax.grad(f, ALL)(*x), DIRECTIONS), ALL)


def forward_over_forward(f):
    return lambda *x: (jax.jvp(lambda *y: jax.jvp(f, y, DIRECTIONS)[1], x, OTHERS)[1],)


def third(f):
    return jax.grad(lambda *x: inner(forward_over_reverse(f)(*x), OTHERS), ALL)


def third_reverse(f):
    return jax.grad(lambda *x: inner(reverse_over_reverse(f)(*x), OTHERS), ALL)


ORDERS = {
    f.__name__: f
    for f in (forward_over_reverse, reverse_over_forward, reverse_over_reverse, forward_over_forward, third)
}


def close(actual, truth):
    for x, y in zip(actual, truth, strict=True):
        assert np.isfinite(y).all()
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9 * max(1.0, np.abs(y).max()))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_orders(name, order):
    truth = jax.jit(ORDERS[order](functools.partial(value, implementation="plain", **PROBLEMS[name])))
    truth = truth(*ARGUMENTS)
    for implementation in ("xla", "reference"):
        f = functools.partial(value, implementation=implementation, **PROBLEMS[name])
        close(jax.jit(ORDERS[order](f))(*ARGUMENTS), truth)


def test_third_order_by_reverse_mode_alone():
    truth = third_reverse(functools.partial(value, implementation="plain", causal=True))
    f = third_reverse(functools.partial(value, implementation="xla", causal=True))
    close(jax.jit(f)(*ARGUMENTS), jax.jit(truth)(*ARGUMENTS))


def test_fourth_order_of_scale():
    """d^4/dscale^4, by nesting jvp, against the same of the plain formula."""

    def fourth(f):
        for _ in range(4):
            f = functools.partial(lambda g, x: jax.jvp(g, (x,), (jnp.ones_like(x),))[1], f)
        return f

    def of_scale(function, scale):
        return jnp.sum(jnp.sin(function(Q, K, V, scale=scale, causal=True)))

    ours = fourth(functools.partial(of_scale, lambda *x, **o: flash_attention(*x, **o).out))
    close([ours(jnp.asarray(0.4))], [fourth(functools.partial(of_scale, attention))(jnp.asarray(0.4))])


@pytest.mark.parametrize("moved", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)])
def test_only_some_arguments_move(moved):
    """Symbolic zeros: each subset has its own block functions."""

    def second(f):
        def of_moved(*values):
            full = list(ARGUMENTS)
            for i, x in zip(moved, values, strict=True):
                full[i] = x
            return f(*full)

        some = tuple(range(len(moved)))
        picked = [DIRECTIONS[i] for i in moved]
        gradient = jax.grad(of_moved, some)
        return lambda *x: (
            *gradient(*x),
            jax.jvp(of_moved, x, tuple(picked))[1],
            *jax.grad(lambda *y: inner(gradient(*y), picked), some)(*x),
        )

    values = [ARGUMENTS[i] for i in moved]
    truth = second(functools.partial(value, implementation="plain", **PROBLEMS["masked"]))
    ours = second(functools.partial(value, implementation="xla", **PROBLEMS["masked"]))
    close(jax.jit(ours)(*values), jax.jit(truth)(*values))


def test_gradient_of_lse_alone_and_of_out_alone():
    for pick in (0, 1):

        def f(function, *x, pick=pick):
            return jnp.sum(jnp.sin(function(*x[:3], bias=x[3])[pick]))

        ours, truth = (
            jax.grad(functools.partial(f, function), ALL) for function in (flash_attention, attention_and_lse)
        )
        close(ours(*ARGUMENTS), truth(*ARGUMENTS))
        ours, truth = (
            forward_over_reverse(functools.partial(f, function))
            for function in (flash_attention, attention_and_lse)
        )
        close(ours(*ARGUMENTS), truth(*ARGUMENTS))


def test_linearize_and_linear_transpose():
    f = functools.partial(flash_attention, causal=True)

    def out(q, k, v):
        return f(q, k, v).out

    _, linear = jax.linearize(out, Q, K, V)
    close([linear(*DIRECTIONS[:3])], [jax.jvp(out, (Q, K, V), DIRECTIONS[:3])[1]])
    shown, pull = jax.vjp(out, Q, K, V)
    cotangent = RNG.standard_normal(shown.shape)
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (Q, K, V)]
    close(jax.linear_transpose(linear, *structs)(cotangent), pull(cotangent))
    # And the transpose of the gradient in its cotangent is the tangent again.
    (back,) = jax.linear_transpose(pull, jax.ShapeDtypeStruct(shown.shape, shown.dtype))(DIRECTIONS[:3])
    close([back], [linear(*DIRECTIONS[:3])])


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_checkpoint(policy):
    def f(*x):
        return value(*x, implementation="xla", causal=True)

    close(jax.grad(jax.checkpoint(f, policy=policy), ALL)(*ARGUMENTS), jax.grad(f, ALL)(*ARGUMENTS))


def test_without_jit():
    f = jax.grad(functools.partial(value, implementation="xla", causal=True))
    truth = f(*ARGUMENTS)
    second = jax.jvp(f, ARGUMENTS, DIRECTIONS)[1]
    with jax.disable_jit():
        close([f(*ARGUMENTS), jax.jvp(f, ARGUMENTS, DIRECTIONS)[1]], [truth, second])


def test_scan_and_cond():
    def layer(x, _):
        return x + flash_attention(x, K, K, causal=True).out, None

    def plain_layer(x, _):
        return x + attention(x, K, K, causal=True), None

    def f(layer, x):
        return jnp.sum(jnp.sin(jax.lax.scan(layer, x, None, length=3)[0]))

    ours, truth = (jax.grad(functools.partial(f, x))(Q) for x in (layer, plain_layer))
    close([ours], [truth])
    chosen = jax.jit(jax.grad(lambda p, q: jax.lax.cond(p, lambda: f(layer, q), lambda: 0.0), argnums=1))
    close([chosen(True, Q)], [truth])


# vmap

OPERANDS = {
    "q": Q,
    "k": K,
    "v": V,
    "bias": BIAS,
    "mask": RNG.random((2, 1, 21, 29)) < 0.8,
    "key_mask": KEY_MASK,
    "segment_ids": np.sort(RNG.integers(0, 3, (2, 29)), axis=-1),
    "q_offset": np.array([7, 4], np.int32),
    "scale": np.array(0.4),
}


def mapped_call(q, k, v, segment_ids, **rest):
    pair = (segment_ids[..., :21], segment_ids)
    return flash_attention(q, k, v, segment_ids=pair, window=(20, 3), **rest)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("names", [("q",), ("k",), ("v",), ("bias",), ("mask",), ("key_mask",),
                                   ("segment_ids",), ("q_offset",), ("scale",), ("q", "k", "v"),
                                   ("bias", "key_mask"), tuple(OPERANDS)])  # fmt: skip
def test_vmap_of_values_and_gradients(names, axis):
    """vmap over each operand alone and over all, against a Python loop."""
    axes = {n: (axis if n in names and OPERANDS[n].ndim else 0) for n in names}
    stacked = {}
    for n in names:
        variants = [OPERANDS[n], np.flip(OPERANDS[n]) if n != "segment_ids" else OPERANDS[n][::-1]]
        if n == "scale":
            variants = [OPERANDS[n], OPERANDS[n] * 2]
        stacked[n] = np.stack(variants, axis=axes[n])
    fixed = {n: x for n, x in OPERANDS.items() if n not in names}

    def run(moved):
        def f(floats):
            out, lse = mapped_call(**(fixed | moved | floats))
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, lse)), out

        floats = {n: jnp.asarray((fixed | moved)[n]) for n in ("q", "k", "v", "bias", "scale")}
        grads, out = jax.grad(f, has_aux=True)(floats)
        return out, grads

    ours = jax.jit(jax.vmap(run, in_axes=({n: axes[n] for n in names},)))(stacked)
    for index in range(2):
        one = run({n: jnp.take(x, index, axis=axes[n]) for n, x in stacked.items()})
        close(jax.tree.leaves(jax.tree.map(lambda x, index=index: x[index], ours)), jax.tree.leaves(one))


def test_vmap_of_second_order_and_second_order_of_vmap():
    directions = np.stack([DIRECTIONS[0], OTHERS[0], DIRECTIONS[0] * 2])
    masks = np.stack([KEY_MASK, ~KEY_MASK, KEY_MASK])

    def hvp(direction, key_mask):
        def f(q):
            return value(q, K, V, BIAS, implementation="xla", key_mask=key_mask, causal=True)

        return jax.jvp(jax.grad(f), (Q,), (direction,))[1]

    ours = jax.jit(jax.vmap(hvp))(directions, masks)
    close(list(ours), [hvp(x, m) for x, m in zip(directions, masks, strict=True)])
    only = jax.vmap(hvp, in_axes=(0, None))(directions, KEY_MASK)
    close(list(only), [hvp(x, KEY_MASK) for x in directions])
    nested = jax.vmap(jax.vmap(hvp, in_axes=(None, 0)), in_axes=(0, None))(directions[:2], masks[:2])
    close([nested[1, 0]], [hvp(directions[1], masks[0])])


def test_jacobians_agree():
    q, k, v = Q[0, 0], K[0, 0], V[0, 0]

    def f(q):
        return flash_attention(q, k, v, window=5).out

    def plain(q):
        return attention(q, k, v, window=5)

    truth = jax.jacfwd(plain)(q)
    close([jax.jacfwd(f)(q), jax.jacrev(f)(q)], [truth, truth])
    hessians = [jax.hessian(lambda q, g=g: jnp.sum(jnp.sin(g(q))))(q) for g in (f, plain)]
    close(hessians[:1], hessians[1:])


def test_gradients_against_finite_differences():
    """The oracle itself is checked once, by differences of values alone."""
    from jax.test_util import check_grads

    def f(*x):
        return value(*x, implementation="xla", **PROBLEMS["masked"])

    check_grads(f, ARGUMENTS, order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_dead_rows_are_zero_whatever_they_hold(implementation):
    """A query that sees nothing, and the cotangents of its outputs, may hold NaN."""
    mask = np.ones((21, 29), bool)
    mask[4] = False
    q = Q.copy()
    q[..., 4, :] = np.nan
    f = functools.partial(flash_attention, mask=mask, implementation=implementation)
    (out, lse), pull = jax.vjp(lambda *x: tuple(f(*x)), q, K, V)
    cotangents = [RNG.standard_normal(x.shape) for x in (out, lse)]
    clean = pull(tuple(jnp.asarray(c) for c in cotangents))
    for c, axis in zip(cotangents, (-2, -1), strict=True):
        np.moveaxis(c, axis, 0)[4] = np.nan
    for x, y in zip(pull(tuple(jnp.asarray(c) for c in cotangents)), clean, strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_array_equal(x, y)
    assert not clean[0][..., 4, :].any()
    out, dout = jax.jvp(lambda *x: f(*x).out, (q, K, V), DIRECTIONS[:3])
    assert np.isfinite(dout).all()
    assert not dout[..., 4, :].any()


def test_vmap_over_nothing():
    empty = jnp.zeros((0, *Q.shape))
    f = functools.partial(flash_attention, causal=True)
    assert jax.vmap(lambda q: f(q, K, V).out)(empty).shape == (0, 2, 4, 21, 5)
    gradient = jax.grad(lambda q, k: jnp.sum(f(q, k, V).out ** 2), (0, 1))
    dq, dk = jax.vmap(gradient, in_axes=(0, None))(empty, K)
    assert dq.shape == empty.shape
    assert dk.shape == (0, *K.shape)
    second = jax.vmap(lambda q: jax.jvp(lambda q: gradient(q, K), (q,), (q,))[1])(empty)
    assert second[0].shape == empty.shape


def test_a_value_that_is_not_finite_stays_where_plain_attention_has_it():
    """Ragged tiles see some keys twice; without masks nothing else may touch them."""
    v = V.copy()
    v[..., 22, 1] = np.inf
    ours, truth = flash_attention(Q, K, v).out, attention(Q, K, v)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(truth))
    assert np.isinf(ours[..., 1]).all()
