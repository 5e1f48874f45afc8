"""`ring_attention` on eight devices equals attention on one, within the error budget."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flash_attention_jax import attention, flash_attention
from flash_attention_jax._api import attention_and_lse
from flash_attention_jax.distributed import ring_attention, shard_sequence, unshard_sequence
from flash_attention_jax.testing import Case, judge


def case(name, T=48, S=48, N=8, K=8, dtype="float32", batch=(2,), **fields):
    options = {n: fields.pop(n) for n in tuple(fields) if n not in Case.__dataclass_fields__}
    shapes = (*batch, N, T, 6), (*batch, K, S, 6), (*batch, K, S, 4)
    return Case(name, *shapes, dtype=dtype, options=tuple(sorted(options.items())), **fields)


RING, TWO = ("ring",), ("all_to_all", "all_gather")
ALL = RING + TWO
# Lengths that are multiples of 16, for both layouts; and strategies.
EVEN = {
    case("full", S=64, N=16): RING,
    case("causal", N=16, causal=True): RING,
    case("window", window=(9, 4)): ALL,
    case("segments", segments=4, causal=True): ALL,
    case("bias of pairs", bias=(2, 8, 48, 48), causal=True): RING,
    case("bias of keys", bias=(1, 1, 48), key_mask=(2, 48), causal=True): RING,
    case("mask", mask=(2, 1, 48, 48), dead=True, window=(20, None)): RING,
    case("offset for each", q_offset=(5, -30), causal=True): ("all_gather",),
    case("offset", S=80, q_offset=-20, causal=True): RING,
    case("bfloat16", dtype="bfloat16", N=16, causal=True): RING,
    case("hidden NaN", key_mask=(2, 48), causal=True, poison=True): RING,
}
UNEVEN = {
    case("uneven, full", T=37, S=53, bias=(8, 37, 1)): ALL,
    case("uneven, causal", T=53, S=53, N=16, causal=True): RING,
    case("uneven, grouped", T=29, S=61, N=6, K=3, causal=True, softcap=2.0, traced_scale=True): RING,
    case("uneven, one head", T=37, S=37, N=4, K=1, bias=(4, 37, 37), window=6): RING + ("all_gather",),
    case(
        "uneven, everything",
        T=37,
        S=53,
        bias=(8, 1, 53),
        mask=(37, 53),
        key_mask=(53,),
        segments=3,
        window=(20, 9),
    ): ALL,
    case("shorter than the devices", T=3, S=5, batch=(), causal=True): RING,
    case("shorter, with a bias", T=3, S=5, batch=(), bias=(1, 5), mask=(3, 1)): ("ring", "all_gather"),
}
# Every strategy in the zig-zag layout, and the ring alone.
ZIGZAG = {"causal": ALL, "bias of pairs": ALL, "window": RING, "segments": RING}
RUNS = [(c, s, "contiguous") for c, names in (EVEN | UNEVEN).items() for s in names]
RUNS += [(c, s, "zigzag") for c in EVEN for s in ZIGZAG.get(c.name, ())]


# Of these in a mesh of explicit axes, which are those that `jax.make_mesh` makes.
OF_EXPLICIT = ("full", "causal", "uneven, grouped", "uneven, everything", "shorter, with a bias")


def in_layout(mesh, layout, *, q, k, v, bias=None, mask=None, key_mask=None, segment_ids=None, **options):
    """`ring_attention` of arrays in natural order, by way of a layout."""

    def stored(x, *axes):
        for axis in axes:
            if x is not None and x.ndim >= -axis and x.shape[axis] > 1:
                x = shard_sequence(x, axis, mesh=mesh, layout=layout).array
        return x

    if layout == "zigzag":
        q, k, v = (stored(x, -2) for x in (q, k, v))
        bias, mask = (stored(x, -2, -1) for x in (bias, mask))
        key_mask = stored(key_mask, -1)
        segment_ids = None if segment_ids is None else tuple(stored(x, -1) for x in segment_ids)
    arrays = dict(bias=bias, mask=mask, segment_ids=segment_ids)
    out, lse = ring_attention(q, k, v, key_mask, mesh=mesh, layout=layout, **arrays, **options)
    if layout == "zigzag":
        return unshard_sequence(out, mesh=mesh), unshard_sequence(lse, -1, mesh=mesh)
    return out, lse


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize(("case", "strategy", "layout"), RUNS, ids=lambda x: getattr(x, "name", x))
def test_values_and_gradients(ring, case, strategy, layout):
    function = functools.partial(in_layout, ring, layout, strategy=strategy)
    for verdict in judge(function, case):
        assert verdict.within, verdict


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize(
    ("case", "strategy", "layout"),
    [run for run in RUNS if run[0].name in OF_EXPLICIT and run[1] == "ring"],
    ids=lambda x: getattr(x, "name", x),
)
def test_values_and_gradients_of_explicit_axes(case, strategy, layout):
    mesh = jax.make_mesh((8,), ("x",))
    for verdict in judge(functools.partial(in_layout, mesh, layout, strategy=strategy), case):
        assert verdict.within, verdict


RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal(s).astype(np.float32) for s in ((4, 4, 32, 6), (4, 2, 32, 6), (4, 2, 32, 4)))
BIAS = RNG.standard_normal((1, 4, 32, 32)).astype(np.float32)
ARGUMENTS = (Q, K, V, BIAS)
DIRECTIONS = tuple(jnp.asarray(RNG.standard_normal(x.shape), jnp.float32) for x in ARGUMENTS)
EVERY = (0, 1, 2, 3)


def value(function, *x):
    out, lse = function(*x[:3], bias=x[3], causal=True)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))


def reverse_over_reverse(f):
    def directional(*x):
        return sum(jnp.vdot(g, d) for g, d in zip(jax.grad(f, EVERY)(*x), DIRECTIONS, strict=True))

    return jax.grad(directional, EVERY)


TRANSFORMS = {
    "jvp of two": lambda f: lambda *x: jax.jvp(lambda k, b: f(x[0], k, x[2], b), x[1::2], DIRECTIONS[1::2]),
    "hessian-vector product": lambda f: lambda *x: jax.jvp(jax.grad(f, EVERY), x, DIRECTIONS)[1],
    "reverse over reverse": reverse_over_reverse,
}


def close(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4)


@functools.cache
def truth(transform):
    return jax.jit(TRANSFORMS[transform](functools.partial(value, attention_and_lse)))(*ARGUMENTS)


def in_shards(mesh, strategy="ring", wrap=lambda f: f, **how):
    """`value` inside `jax.shard_map`, over the second axis of a mesh."""

    def part(*x):
        function = functools.partial(ring_attention, axis_name="model", strategy=strategy)
        return jax.lax.psum(wrap(functools.partial(value, function))(*x), ("data", "model"))

    spec = P("data", None, "model")
    specs = (spec,) * 3 + (P(None, None, "model"),)
    return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P(), **how)


@pytest.fixture
def pairs(mesh):
    """Four by two devices: of two, no loop over hops is made, and the compiler has less to do."""
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=mesh.axis_types)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_a_ring_inside_shard_map(request, transform):
    mesh = request.getfixturevalue("pairs" if transform == "reverse over reverse" else "mesh")
    close(jax.jit(TRANSFORMS[transform](in_shards(mesh)))(*ARGUMENTS), truth(transform))


@pytest.mark.parametrize("strategy", ["all_to_all", "all_gather"])
def test_forward_mode_without_a_ring(pairs, strategy):
    name = "jvp of two"
    close(jax.jit(TRANSFORMS[name](in_shards(pairs, strategy)))(*ARGUMENTS), truth(name))


def gradient(f):
    return jax.grad(f, EVERY)


@functools.cache
def true_gradient():
    return jax.jit(gradient(functools.partial(value, attention_and_lse)))(*ARGUMENTS)


@pytest.mark.parametrize("wrap", ["remat", "vmap", "scan", "unchecked"])
def test_transformations_inside_shard_map(pairs, wrap):
    def vmapped(f):
        return lambda *x: jnp.sum(jax.vmap(f, (0, None, 0, None))(x[0][None], x[1], x[2][None], x[3]))

    def scanned(f):
        def total(*x):
            step = lambda carry, q: (carry + f(q, *x[1:]), None)  # noqa: E731
            start = jax.lax.pcast(jnp.zeros(()), ("data", "model"), to="varying")
            return jax.lax.scan(step, start, x[0][None])[0]

        return total

    wraps = {"remat": jax.checkpoint, "vmap": vmapped, "scan": scanned}
    f = in_shards(pairs, wrap=wraps.get(wrap, lambda f: f), check_vma=wrap != "unchecked")
    close(jax.jit(gradient(f))(*ARGUMENTS), true_gradient())


def test_a_gradient_without_jit(pairs):
    close(gradient(in_shards(pairs))(*ARGUMENTS), true_gradient())


@pytest.mark.parametrize("kind", ["mesh", "explicit_mesh"])
def test_batch_and_heads_over_other_axes(request, kind, collectives):
    mesh = request.getfixturevalue(kind)
    spec = P(None, "data", "model")
    arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (Q, K, V)]
    f = functools.partial(ring_attention, mesh=mesh, axis_name="model", strategy="ring", causal=True)
    out, lse = f(*arrays)
    for x in (out, lse):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
    close((out, lse), attention_and_lse(Q, K, V, causal=True))
    compiled = jax.jit(functools.partial(f, spec=P(*spec, None))).lower(*arrays).compile()
    assert set(collectives(compiled)) == {"collective-permute"}


def test_a_ring_sends_only_to_its_neighbour_and_only_as_far_as_the_window(ring, collectives):
    x = jax.ShapeDtypeStruct((1, 64, 8), jnp.float32, sharding=NamedSharding(ring, P(None, "x")))

    def permutes(**options):
        f = functools.partial(ring_attention, mesh=ring, strategy="ring", **options)
        return collectives(jax.jit(f).lower(x, x, x).compile())

    # K and V: one hop before the loop and one in it.
    assert permutes() == {"collective-permute": 4}
    assert permutes(causal=True, window=(7, 0)) == {"collective-permute": 2}
    assert permutes(window=0) == {}


def test_memory_is_that_of_a_devices_own_share():
    def temporary(devices):
        mesh = jax.make_mesh((devices,), ("x",), devices=jax.devices()[:devices])
        x = jax.ShapeDtypeStruct((512 * devices, 16), jnp.float32, sharding=NamedSharding(mesh, P("x")))
        spec = P("x")

        def f(q, k, v):
            out, lse = jax.shard_map(
                functools.partial(ring_attention, strategy="ring"),
                mesh=mesh,
                in_specs=(spec,) * 3,
                out_specs=spec,
            )(q, k, v)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

        def twice(*x):
            return jax.grad(lambda *x: sum(jnp.sum(g**2) for g in jax.grad(f, (0, 1, 2))(*x)), (0, 1, 2))(*x)

        programs = (jax.grad(f, (0, 1, 2)), twice)
        return [jax.jit(g).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes for g in programs]

    for few, many in zip(temporary(4), temporary(8), strict=True):
        assert many <= 1.02 * few


def test_positions_follow_the_layout(ring):
    tokens = jnp.asarray(RNG.integers(0, 256, (3, 32)))
    stored, positions = shard_sequence(tokens, -1, mesh=ring)
    np.testing.assert_array_equal(stored, tokens[:, positions])
    assert positions.sharding.is_equivalent_to(NamedSharding(ring, P("x")), 1)
    assert [int(x) for x in positions[:4]] == [0, 1, 30, 31]
    np.testing.assert_array_equal(unshard_sequence(stored, -1, mesh=ring), tokens)
    with pytest.raises(ValueError, match="x must be of a length that 16 divides, got 24"):
        shard_sequence(tokens[:, :24], -1, mesh=ring)


def test_one_device_is_flash_attention():
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    for layout in ("contiguous", "zigzag"):
        out, lse = ring_attention(Q, K, V, bias=BIAS, causal=True, mesh=mesh, layout=layout)
        close((out, lse), flash_attention(Q, K, V, bias=BIAS, causal=True))


def test_nothing_to_see(ring):
    empty = np.zeros((4, 2, 0, 6), np.float32)
    out, lse = ring_attention(Q[:, :2], empty, empty, mesh=ring)
    assert not out.any()
    assert np.isneginf(lse).all()
    assert ring_attention(empty, K, V, mesh=ring).shape == (4, 2, 0, 4)


def test_the_choice_runs(ring):
    close(ring_attention(Q, K, V, causal=True, mesh=ring).out, attention(Q, K, V, causal=True))
    with pytest.raises(
        ValueError, match="'all_to_all': the head count N = 4 of q is not divided by 8 devices"
    ):
        ring_attention(Q, K, V, mesh=ring, strategy="all_to_all")
