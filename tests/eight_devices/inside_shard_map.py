"""`ring_attention` inside `jax.shard_map`: what it takes, other mesh axes, and `vmap` of offsets."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flash_attention_jax import _attend, _dispatch, flash_attention
from flash_attention_jax._api import attention_and_lse
from flash_attention_jax.distributed import ring_attention

pytestmark = pytest.mark.usefixtures("quickly_compiled")

RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal((2, 2, 8, n)).astype(np.float32) for n in (4, 4, 3))
BIAS = RNG.standard_normal((2, 2, 8, 8)).astype(np.float32)


def devices(*sizes, kinds=(AxisType.Auto,)):
    names = ("d", "x")[-len(sizes) :]
    return jax.make_mesh(sizes, names, axis_types=kinds, devices=jax.devices()[: np.prod(sizes)])


def out_of(function, **options):
    return lambda *x: function(*x[:3], **dict(zip(("bias", "q_offset"), x[3:], strict=False)), **options).out


def gradients(function, count):
    return jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))), tuple(range(count)))


def same(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


T_OF_2 = r"must be of the device's own T = 2, or 1, on its queries' axis, got shape"
# Of four devices: a bias or mask, how it is divided, and the error.
WRONG_PAIRS = {
    "whole bias": ("bias", BIAS, P(), rf"bias {T_OF_2} \(2, 2, 8, 8\)"),
    "whole mask": ("mask", BIAS[0, 0] > 0, P(), rf"mask {T_OF_2} \(8, 8\)"),
    "divided keys": ("bias", BIAS, P(None, None, None, "x"), rf"bias {T_OF_2} \(2, 2, 8, 2\)"),
    "heads": (
        "bias",
        np.ones((3, 8, 8), np.float32),
        P(None, "x"),
        r"bias must be broadcastable to \(\*batch, N, T, S\) = \(2, 2, 2, 8\), got shape \(3, 2, 8\)",
    ),
    "heads of keys": (
        "mask",
        np.ones((3, 1, 8), bool),
        P(None, None, "x"),
        r"mask must be broadcastable to \(\*batch, N, T, S\) = \(2, 2, 2, 2\), got shape \(3, 1, 2\)",
    ),
}


@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
@pytest.mark.parametrize("case", WRONG_PAIRS)
def test_a_bias_or_mask_is_that_of_the_devices_queries(case, strategy):
    name, x, spec, message = WRONG_PAIRS[case]

    def f(q, k, v, x):
        return ring_attention(q, k, v, strategy=strategy, **{name: x}).out

    rows = P(None, None, "x")
    with pytest.raises(ValueError, match=message):
        jax.shard_map(f, mesh=devices(4), in_specs=(rows,) * 3 + (spec,), out_specs=rows)(Q, K, V, x)


def test_no_mesh_inside():
    mesh, rows = devices(4), P(None, None, "x")
    f = functools.partial(ring_attention, mesh=mesh)
    with pytest.raises(ValueError, match=r"mesh must be None inside jax\.shard_map over 'x', got"):
        jax.shard_map(f, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows)(Q, K, V)


@pytest.mark.parametrize("checked", [True, False])
def test_vmap_of_offsets(checked):
    """Of elements that see nothing of a block where others do."""
    arguments = Q, K, V, BIAS, np.array([0, -3], np.int32)
    rows = P(None, None, "x")
    function = jax.vmap(out_of(ring_attention, causal=True, strategy="ring"))
    specs = (rows,) * 4 + (P(),)
    f = jax.shard_map(function, mesh=devices(4), in_specs=specs, out_specs=rows, check_vma=checked)
    truth = jax.vmap(out_of(attention_and_lse, causal=True))
    same(jax.jit(f)(*arguments), truth(*arguments))
    same(jax.jit(gradients(f, 4))(*arguments), gradients(truth, 4)(*arguments))


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "all_to_all"])
@pytest.mark.parametrize("spec", [P("d"), P(None, "d")], ids=["batch", "heads"])
def test_other_axes_that_are_explicit(strategy, spec):
    """Of a mesh whose other axis `jax.shard_map` leaves in the types."""
    mesh, rows = devices(2, 2, kinds=(AxisType.Explicit,) * 2), P(None, None, "x")
    q = np.concatenate([Q, -Q], 1)
    arguments = q, q[..., ::-1] * 0.5, q[..., :3], BIAS[:, :1], np.array([0, -3], np.int32)
    place = NamedSharding(mesh, P(*spec, *(None,) * (2 - len(spec)), "x"))
    options = dict(causal=True, scale=jnp.float32(0.4), key_mask=np.ones((2, 4), np.float32))
    function = out_of(ring_attention, strategy=strategy, **options)
    truth = out_of(attention_and_lse, **options | {"key_mask": np.ones((2, 8))})
    with jax.set_mesh(mesh):
        placed = [*(jax.device_put(x, place) for x in arguments[:3]), *arguments[3:]]
        placed[3] = jax.device_put(arguments[3], NamedSharding(mesh, rows))
        specs = (rows,) * 4 + (P(),)
        f = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows, axis_names={"x"})
        out = jax.jit(f)(*placed)
        assert out.sharding.is_equivalent_to(place, out.ndim)
        same(out, truth(*arguments))
        same(jax.jit(gradients(f, 4))(*placed), gradients(truth, 4)(*arguments))


@pytest.mark.parametrize(
    "kinds", [("Auto", "Auto"), ("Auto", "Explicit"), ("Explicit", "Auto")], ids="-".join
)
def test_a_ring_gathers_nothing_of_another_axis(kinds, collectives):
    """Under jit, where nothing says how automatic axes divide the batch."""
    mesh = devices(2, 2, kinds=tuple(AxisType[kind] for kind in kinds))
    place = NamedSharding(mesh, P("d", None, "x"))
    f = out_of(ring_attention, causal=True, mesh=mesh, strategy="ring")
    arguments = [jax.device_put(x, place) for x in (Q, K, V)]
    compiled = jax.jit(gradients(f, 3)).lower(*arguments).compile()
    assert set(collectives(compiled)) == {"collective-permute"}
    same(compiled(*arguments), gradients(out_of(attention_and_lse, causal=True), 3)(Q, K, V))


def test_a_gradient_of_a_piece_is_a_piece():
    """Not the device's whole share, zero but for the piece."""
    mesh = devices(4)
    x = jax.ShapeDtypeStruct((1, 1, 80, 6), jnp.float32, sharding=NamedSharding(mesh, P(None, None, "x")))
    f = out_of(ring_attention, causal=True, mesh=mesh, strategy="ring", layout="zigzag")
    text = jax.jit(gradients(f, 3)).lower(x, x, x).as_text()
    results = re.findall(r"^ *}\) : \(tensor<i32>\) -> (.*)", text, re.M)
    assert any("tensor<1x1x10x6xf32>" in types for types in results)
    assert not any("x20x" in types for types in results)


@pytest.mark.parametrize("strategy", ["ring", "all_to_all", "all_gather"])
def test_implementations_know_of_transfers_beside_them(monkeypatch, strategy):
    problems = []

    def choose(problem, *others):
        problems.append(problem)
        return _dispatch.choose(problem, *others)

    monkeypatch.setattr(_attend, "choose", choose)
    f = out_of(ring_attention, causal=True, mesh=devices(2), strategy=strategy)
    jax.jit(gradients(f, 3)).lower(Q, K, V)
    assert problems
    assert {problem.amid_transfers for problem in problems} == {strategy == "ring"}
    problems.clear()
    jax.jit(gradients(out_of(ring_attention, mesh=devices(1), strategy=strategy), 3)).lower(Q, K, V)
    assert not any(problem.amid_transfers for problem in problems)


@pytest.mark.parametrize("strategy", ["ring", "all_gather", None])
def test_gradients_of_q_k_and_v_alone_beside_explicit_axes(strategy):
    """For which nothing is computed anew, but where a strategy keeps what it gathers."""
    mesh = devices(2, 2, kinds=(AxisType.Explicit,) * 2)
    spec, given = P("x", "d"), P("x")
    f = out_of(flash_attention)
    if strategy is not None:
        spec, given = P("d", None, "x"), P(None, None, "x")
        f = out_of(ring_attention, strategy=strategy)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (Q, K, V)]
        f = gradients(
            jax.shard_map(f, mesh=mesh, in_specs=(given,) * 3, out_specs=given, axis_names={"x"}), 3
        )
        assert ("remat" in str(jax.make_jaxpr(f)(*placed))) == (strategy == "all_gather")
        same(jax.jit(f)(*placed), gradients(out_of(attention_and_lse), 3)(Q, K, V))


def test_flash_attention_beside_explicit_axes():
    mesh = devices(2, 2, kinds=(AxisType.Explicit,) * 2)
    options = dict(key_mask=np.ones(8, np.float32), scale=jnp.float32(0.4))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, P("x", "d"))) for x in (Q, K, V)]
        f = out_of(flash_attention, **options)
        f = jax.shard_map(f, mesh=mesh, in_specs=(P("x"),) * 3 + (P(),), out_specs=P("x"), axis_names={"x"})
        truth = gradients(out_of(attention_and_lse, **options), 4)(Q, K, V, BIAS[:1, :1])
        same(jax.jit(gradients(f, 4))(*placed, BIAS[:1, :1]), truth)
