"""`ring_attention` on whole arrays: lengths that the devices do not divide, and kinds of meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flash_attention_jax import flash_attention
from flash_attention_jax.distributed import ring_attention, shard_sequence, unshard_sequence

pytestmark = pytest.mark.usefixtures("quickly_compiled")

KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def devices(*sizes, names=("x",), kinds=("auto",)):
    types = tuple(KINDS[kind] for kind in kinds * (len(sizes) // len(kinds)))
    return jax.make_mesh(sizes, names, axis_types=types, devices=jax.devices()[: np.prod(sizes)])


@pytest.fixture
def four():
    return devices(4)


def arrays(T, S, hidden=(), heads=4, batch=2):
    """q, k and v, of which these keys are NaN."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((batch, heads, n, 4)).astype(np.float32) for n in (T, S, S))
    for at in hidden:
        k[at], v[at] = np.nan, np.nan
    return q, k, v


def gradients(function, *x):
    """Values and gradients in the arrays and in a scale."""

    def total(scale, *x):
        out, lse = function(*x, scale=scale)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isneginf(lse), 0, lse)), (out, lse)

    run = jax.value_and_grad(total, argnums=tuple(range(len(x) + 1)), has_aux=True)
    return jax.jit(run)(jnp.float32(0.4), *x)


def same(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def after(*lengths):
    """Keys after so many, in each batch element."""
    return [(b, slice(None), slice(n, None)) for b, n in enumerate(lengths)]


IDS = (
    np.array([[3, 3, 0, 0, 7], [2, 2, 2, 2, -5]], np.int8),
    np.array([[3, 3, 0, 0, 7, 5, 0, 9]] * 2, np.int8),
)
# Lengths, keys that no query sees, and options: added queries would come to stand where they see those.
HIDING = {
    "offset": (5, 16, after(5, 5), dict(causal=True, q_offset=0)),
    "offset of an array": (5, 16, after(5, 2), dict(causal=True, q_offset=np.array([0, -3], np.int32))),
    "largest window": (5, 8, [], dict(window=(None, 2**31 - 2), q_offset=np.array([9, -3], np.int32))),
    "window": (5, 8, after(7, 7), dict(window=(2, 2), q_offset=0)),
    "window of uneven keys": (5, 10, after(7, 7), dict(window=(2, 2), q_offset=0)),
    "no query sees a key": (3, 9, after(0, 0), dict(causal=True, q_offset=-5)),
    "segments": (5, 8, [(0, slice(None), slice(5, 6)), (0, slice(None), 7), (1, ...)], dict(segment_ids=IDS)),
    "segments in a band": (
        5,
        8,
        [(0, slice(None), slice(5, None)), (1, ...)],
        dict(segment_ids=IDS, causal=True, q_offset=0),
    ),
    "mask": (5, 8, after(6, 6), dict(mask=np.arange(8) < 6 + np.zeros((5, 1)))),
    "key mask": (5, 7, after(6, 6), dict(key_mask=np.arange(7) < 6)),
}


RUNS = [(name, "ring") for name in HIDING]
RUNS += [
    (name, strategy) for name in ("window", "segments in a band") for strategy in ("all_gather", "all_to_all")
]


@pytest.mark.parametrize(("name", "strategy"), RUNS)
def test_added_queries_see_no_hidden_key(four, name, strategy):
    T, S, hidden, options = HIDING[name]
    x = arrays(T, S, hidden)
    on_mesh = functools.partial(ring_attention, mesh=four, strategy=strategy, **options)
    found = gradients(on_mesh, *x)
    assert all(np.isfinite(g).all() for g in found[1])
    same(found, gradients(functools.partial(flash_attention, **options), *x))


def test_an_infinite_key_does_not_meet_an_added_query(four):
    q, k, v = arrays(5, 8)
    q, k[:, :, 0] = np.abs(q), -np.inf
    on_mesh = functools.partial(ring_attention, mesh=four, strategy="all_gather")
    (_, values), (_, _, dk, dv) = gradients(on_mesh, q, k, v)
    assert all(np.isfinite(x).all() for x in (*values, dk, dv))


def test_a_key_mask_is_made_only_where_something_is_hidden(four):
    def made(T, S, **options):
        function = functools.partial(ring_attention, mesh=four, **options)
        return "key_mask=(" in str(jax.make_jaxpr(function)(*arrays(T, S)))

    assert not made(5, 8)
    assert not made(7, 7, causal=True)
    assert not made(5, 8, window=(3, None))
    assert made(8, 7)
    assert made(5, 8, causal=True, q_offset=0)


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "all_to_all"])
def test_the_gradient_of_a_scale_where_a_query_sees_nothing(four, strategy):
    q, k, v = arrays(8, 8)
    q[:, :, 2] = np.nan
    mask = np.broadcast_to(np.arange(8)[:, None] != 2, (8, 8))
    found = gradients(functools.partial(ring_attention, mesh=four, strategy=strategy, mask=mask), q, k, v)
    assert all(np.isfinite(g).all() for g in found[1])
    q[:, :, 2] = 0
    same(found, gradients(functools.partial(flash_attention, mask=mask), q, k, v))


@pytest.mark.parametrize("shape", [(1,), (4, 1), (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_axes_of_one(kind, shape):
    mesh = devices(*shape, names=("d", "x")[-len(shape) :], kinds=(kind,))
    for batch, heads, options in ((4, 2, dict(causal=True)), (1, 1, dict(key_mask=np.ones((1, 9), bool)))):
        x = arrays(1, 9, heads=heads, batch=batch)
        specs = [None] + [P("d", None, "x", None)] * (len(shape) == 2 and batch % shape[0] == 0)
        for spec in specs:
            on_mesh = functools.partial(ring_attention, mesh=mesh, spec=spec, **options)
            same(gradients(on_mesh, *x), gradients(functools.partial(flash_attention, **options), *x))


@pytest.mark.parametrize("kinds", [("explicit", "auto"), ("auto", "explicit"), ("explicit",)], ids="-".join)
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(("T", "S"), [(7, 7), (2, 4)])
def test_uneven_lengths_and_explicit_axes(kinds, within, T, S):
    mesh = devices(2, 2, names=("d", "x"), kinds=kinds)
    spec = P("d", None, "x", None)
    bias = np.random.default_rng(1).standard_normal((T, S)).astype(np.float32)
    x = *arrays(T, S), bias

    def biased(function, **options):
        return lambda q, k, v, bias, **o: function(q, k, v, bias=bias, causal=True, **options, **o)

    expected = gradients(biased(flash_attention), *x)
    on_mesh = biased(ring_attention, mesh=mesh, spec=spec)
    if not within:
        same(on_mesh(*x, scale=0.4), expected[0][1])
        same(gradients(on_mesh, *x), expected)
        return
    with jax.set_mesh(mesh):
        if T % 2 == S % 2 == 0:
            kept = [e if k == AxisType.Explicit else None for e, k in zip("dx", mesh.axis_types, strict=True)]
            place = NamedSharding(mesh, P(kept[0], None, kept[1]))
            x = *(jax.device_put(y, place) for y in x[:3]), bias
        same(gradients(on_mesh, *x), expected)


def test_results_of_an_uneven_length_are_whole():
    mesh = jax.make_mesh((8,), ("x",))
    x = jnp.ones((2, 37, 4))
    for function in (ring_attention, jax.jit(ring_attention, static_argnames=("mesh", "causal"))):
        for result in function(x, x, x, causal=True, mesh=mesh):
            assert result.shape[1] == 37
            assert result.sharding.is_fully_replicated


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divided", [False, True])
def test_layouts_are_differentiable(kind, divided):
    mesh = devices(2, kinds=(kind,))
    x = jnp.arange(64.0).reshape(2, 8, 4)
    x = jax.device_put(x, NamedSharding(mesh, P(None, "x"))) if divided else x
    order = [0, 1, 6, 7, 2, 3, 4, 5]

    def stored(x):
        return shard_sequence(x, mesh=mesh).array

    def natural(x):
        return unshard_sequence(x, mesh=mesh)

    weights = np.random.default_rng(0).standard_normal((2, 8, 4)).astype(np.float32)
    for f, index in (
        (stored, order),
        (natural, np.argsort(order)),
        (lambda x: natural(stored(x)), np.arange(8)),
    ):
        same(jax.jit(f)(x), np.asarray(x)[:, index])
        expected = 2 * np.asarray(x) * weights[:, np.argsort(index)]
        same(jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(x) ** 2 * weights)))(x), expected)
        same(jax.jit(lambda x, f=f: jax.jvp(f, (x,), (x,)))(x), (np.asarray(x)[:, index],) * 2)


def test_layouts_of_an_empty_batch():
    mesh = devices(4)
    for empty in (np.zeros((0, 32, 4)), jnp.zeros((0, 32, 4))):
        stored, positions = shard_sequence(empty, mesh=mesh)
        assert stored.shape == unshard_sequence(stored, mesh=mesh).shape == (0, 32, 4)
        assert positions.shape == (32,)
