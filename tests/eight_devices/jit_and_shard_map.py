"""`flash_attention` on arrays that jit divides over batch and heads, and inside `jax.shard_map`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flash_attention_jax import flash_attention
from flash_attention_jax._api import attention_and_lse

RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal(s).astype(np.float32) for s in ((4, 8, 24, 8), (4, 4, 29, 8), (4, 4, 29, 5)))
BIAS = RNG.standard_normal((1, 8, 1, 29)).astype(np.float32)
KEY_MASK = RNG.random((4, 29)) < 0.8
ARGUMENTS = (Q, K, V, BIAS)
DIRECTIONS = tuple(jnp.asarray(RNG.standard_normal(x.shape), jnp.float32) for x in ARGUMENTS)
ALL = (0, 1, 2, 3)


def value(*x, function=flash_attention, **options):
    out, lse = function(*x[:3], KEY_MASK, bias=x[3], causal=True, **options)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))


TRANSFORMS = {
    "forward": lambda f: f,
    "gradient": lambda f: jax.grad(f, ALL),
    "jvp": lambda f: lambda *x: jax.jvp(f, x, DIRECTIONS),
    "hvp": lambda f: lambda *x: jax.jvp(jax.grad(f, ALL), x, DIRECTIONS)[1],
}


@functools.cache
def truth(transform):
    return jax.jit(TRANSFORMS[transform](functools.partial(value, function=attention_and_lse)))(*ARGUMENTS)


def close(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4)


SPECS = {"batch": P("data"), "heads": P(None, "model"), "both": P("data", "model")}


def placed(mesh, spec):
    heads = spec[1] if len(spec) > 1 else None
    specs = (spec, spec, spec, P(None, heads))
    return [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(ARGUMENTS, specs, strict=True)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["mesh", "explicit_mesh"])
def test_nothing_is_gathered(request, collectives, kind, transform, spec):
    mesh = request.getfixturevalue(kind)
    arguments = placed(mesh, SPECS[spec])
    implementations = ("xla", "reference") if spec == "both" and transform == "gradient" else ["xla"]
    for implementation in implementations:
        f = TRANSFORMS[transform](functools.partial(value, implementation=implementation))
        compiled = jax.jit(f).lower(*arguments).compile()
        assert collectives(compiled) == {}
        close(compiled(*arguments), truth(transform))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kinds", [("Explicit", "Auto"), ("Auto", "Explicit")], ids="-".join)
def test_nothing_is_gathered_on_a_mesh_of_both_kinds(collectives, kinds, spec):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=tuple(AxisType[kind] for kind in kinds))

    def gradient(function):
        def total(q, k, v, bias):
            return jnp.sum(jnp.sin(function(q, k, v, bias=bias, causal=True).out))

        return jax.jit(jax.grad(total, ALL))

    with jax.set_mesh(mesh):
        arguments = placed(mesh, SPECS[spec])
        compiled = gradient(flash_attention).lower(*arguments).compile()
        assert collectives(compiled) == {}
        close(compiled(*arguments), gradient(attention_and_lse)(*ARGUMENTS))


@pytest.mark.parametrize("transform", ["gradient of vmap", "vmap of gradient"])
def test_vmap_over_what_explicit_axes_divide(explicit_mesh, collectives, transform):
    arguments = Q, K, V, BIAS[0]
    place = NamedSharding(explicit_mesh, P("data"))
    given = *(jax.device_put(x, place) for x in arguments[:3]), arguments[3]

    def function(of_one):
        def f(q, k, v, bias):
            out, lse = of_one(q, k, v, bias=bias, causal=True)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

        axes = (0, 0, 0, None)
        if transform == "vmap of gradient":
            return jax.vmap(jax.grad(f, ALL), axes)
        return jax.grad(lambda *x: jnp.sum(jax.vmap(f, axes)(*x)), ALL)

    compiled = jax.jit(function(flash_attention)).lower(*given).compile()
    assert collectives(compiled) == {}
    results = compiled(*given)
    assert results[0].sharding.is_equivalent_to(place, 4)
    close(results, jax.jit(function(attention_and_lse))(*arguments))


@pytest.mark.parametrize("kind", ["mesh", "explicit_mesh"])
def test_results_lie_where_the_queries_lie(request, kind):
    mesh = request.getfixturevalue(kind)
    out, lse = jax.jit(flash_attention)(*placed(mesh, P("data", "model"))[:3])
    for x in (out, lse):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "model")), x.ndim)


@pytest.mark.parametrize("kind", ["mesh", "explicit_mesh"])
def test_a_divided_sequence_is_right(request, kind):
    mesh = request.getfixturevalue(kind)
    specs = (P("data", None, "model"), P("data"), P("data"), P())
    arguments = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(ARGUMENTS, specs, strict=True)]
    close(jax.jit(TRANSFORMS["gradient"](value))(*arguments), truth("gradient"))


@pytest.mark.parametrize("kind", ["mesh", "explicit_mesh"])
@pytest.mark.parametrize("heads", [1, 2])
def test_fewer_key_heads_than_devices(request, collectives, kind, heads):
    """One is shared without a gather; two on four devices are right."""
    mesh = request.getfixturevalue(kind)
    k, v = K[:, :heads], V[:, :heads]

    def gradient(function):
        return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x, causal=True).out)), (0, 1, 2)))

    expected = gradient(attention_and_lse)(Q, k, v)
    arguments = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (k, v)]
    arguments.insert(0, jax.device_put(Q, NamedSharding(mesh, P("data", "model"))))
    compiled = gradient(flash_attention).lower(*arguments).compile()
    close(compiled(*arguments), expected)
    if heads == 1:
        assert collectives(compiled) == {}


def test_heads_divided_within_a_mesh_axis(mesh):
    """A reshape leaves heads divided by a part of a mesh axis, which no PartitionSpec can say."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=mesh.axis_types[:1])
    flat = [x.swapaxes(1, 2)[:, :, :4].reshape(4, x.shape[2], -1) for x in (Q, K, K)]

    def f(function, *x):
        heads = [y.reshape(4, y.shape[1], 4, 8).swapaxes(1, 2) for y in x]
        return function(*heads, causal=True).out

    arguments = [jax.device_put(x, NamedSharding(mesh, P(None, None, "x"))) for x in flat]
    close(jax.jit(functools.partial(f, flash_attention))(*arguments), f(attention_and_lse, *flat))


def test_arguments_without_a_division_under_a_mesh(mesh, explicit_mesh):
    expected = attention_and_lse(Q, K, V).out
    for one in (mesh, explicit_mesh):
        with jax.set_mesh(one):
            close(jax.jit(lambda *x: flash_attention(*x).out)(Q, K, V), expected)


def in_shards(mesh, f):
    specs = (*(P("data", "model"),) * 3, P(None, "model"), P("data"))
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P())


def summed(*x, wrap=lambda f: f):
    def f(*y):
        out, lse = flash_attention(*y[:3], x[4], bias=y[3], causal=True)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    return jax.lax.psum(wrap(f)(*x[:4]), ("data", "model"))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_inside_shard_map(mesh, transform):
    def f(*x):
        return in_shards(mesh, summed)(*x, KEY_MASK)

    close(jax.jit(TRANSFORMS[transform](f))(*ARGUMENTS), truth(transform))


def test_inside_shard_map_without_jit(mesh):
    close(jax.grad(lambda *x: in_shards(mesh, summed)(*x, KEY_MASK), ALL)(*ARGUMENTS), truth("gradient"))


@pytest.mark.parametrize("wrap", ["remat", "vmap", "scan"])
def test_transformations_inside_shard_map(mesh, wrap):
    def vmapped(f):
        return lambda *x: jnp.sum(
            jax.vmap(f, (0, None, 0, None))(*(y[None] if i in (0, 2) else y for i, y in enumerate(x)))
        )

    def scanned(f):
        def total(*x):
            step = lambda carry, q: (carry + f(q, *x[1:]), None)  # noqa: E731
            start = jax.lax.pcast(jnp.zeros(()), ("data", "model"), to="varying")
            return jax.lax.scan(step, start, x[0][None])[0]

        return total

    wraps = {"remat": jax.checkpoint, "vmap": vmapped, "scan": scanned}
    f = in_shards(mesh, functools.partial(summed, wrap=wraps[wrap]))
    close(jax.jit(jax.grad(lambda *x: f(*x, KEY_MASK), ALL))(*ARGUMENTS), truth("gradient"))


def test_gradients_taken_inside_shard_map(mesh):
    def f(q, k, v):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(flash_attention(*x, causal=True).out)), (0, 1, 2))(q, k, v)

    spec = P("data", "model")
    actual = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec,) * 3))(Q, K, V)
    close(actual, f(Q, K, V))
