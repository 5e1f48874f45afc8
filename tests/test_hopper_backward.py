"""The Hopper backward kernel without a GPU: lowering, visits, and its numbers under the interpreter.

On a JAX older than the kernel needs, every one of these asserts the refusal instead.
"""

import dataclasses
import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from test_hopper import (
    BANDS,
    H200,
    LOWERED,
    NEW,
    TOO_OLD,
    assert_right_and_without_races,
    described,
    interpret,
    struct,
)

from flash_attention_jax import Unsupported, flash_attention
from flash_attention_jax._attend import Call, attend
from flash_attention_jax._impl.hopper import IMPLEMENTATION
from flash_attention_jax._impl.hopper import _backward_configs as configs
from flash_attention_jax._impl.hopper import _dq_configs as dq_configs
from flash_attention_jax._mask import Cover, Masks, block_map
from flash_attention_jax._problem import Operands, arrange
from flash_attention_jax.distributed import ring_attention

# Sizes.


@pytest.mark.parametrize("length", [1, 77, 4096])
@pytest.mark.parametrize("causal", [False, True])
def test_every_head_dim_fits_the_multiprocessor(length, causal):
    problem, _ = described((1, 2, length, 8), (1, 1, 4096, 8), causal=causal)
    for D in range(8, 257, 8):
        for Dv in range(8, 257, 8):
            one = dataclasses.replace(problem, D=D, Dv=Dv)
            assert configs.refuses_backward(one) is None
            assert dq_configs.too_large_dq(one, dq_configs.choose_dq_config(one)) is None


def test_sizes_that_do_not_fit_are_told():
    problem, _ = described((1, 2, 512, 128), (1, 2, 512, 128))
    fits = configs.choose_backward_config(problem)
    more = configs.too_large_backward(problem, dataclasses.replace(fits, stages_q=5))
    assert more == "tiles take 266240 bytes of shared memory, a thread block has 232448"
    wider = configs.too_large_backward(problem, dataclasses.replace(fits, keys=128, consumers=1))
    assert wider == "tiles take 424 registers of a thread, it has 240"
    with pytest.raises(ValueError, match="slots_ds must be at least 3, was 2"):
        configs.BackwardConfig(slots_ds=2)


@pytest.mark.parametrize("consumers", [1, 2, 3])
@pytest.mark.parametrize("dim", [16, 64, 72, 128])
@pytest.mark.parametrize("block_q", [64, 128])
def test_consumers_share_the_gradient_of_the_queries(consumers, dim, block_q):
    problem, _ = described((1, 1, 512, dim), (1, 1, 512, dim))
    config = configs.BackwardConfig(block_q=block_q, consumers=consumers)
    part, of = configs.share(problem, config), configs.layouts(problem, config).k
    groups = block_q // 64
    taken = set()
    for own in range(consumers):
        for g in range(part.groups):
            for c in range(part.chunks):
                row, column = (own * part.groups + g, c) if part.by_rows else (g, own * part.chunks + c)
                assert (row, column) not in taken
                taken.add((row, column))
    assert taken >= {(g, c) for g in range(groups) for c in range(of.count)}


@pytest.mark.parametrize("sizes", [(256, 256), (192, 128), (200, 8), (136, 248)])
@pytest.mark.parametrize("length", [500, 512])
def test_consumers_of_wide_heads_share_all_columns(sizes, length):
    problem, _ = described((1, 1, length, sizes[0]), (1, 1, 512, sizes[0]), (1, 1, 512, sizes[1]))
    if not NEW:
        assert IMPLEMENTATION.refuses(problem, H200) == TOO_OLD
        return
    parts = importlib.import_module("flash_attention_jax._impl.hopper._backward_parts")
    config = configs.choose_backward_config(problem)
    assert config.columns
    each = [parts.Part.of(problem, config, own) for own in range(config.consumers)]
    lie = configs.layouts(problem, config)
    for of, chunks in ((lie.q, [x.of_dk for x in each]), (lie.v, [x.of_dv for x in each])):
        assert of.tile <= config.queries
        taken = [chunk for part in chunks for chunk in part]
        assert sorted(taken)[: of.count] == list(range(of.count))
    assert [chunk for part in each for _, chunk in part.of_dq][: lie.k.count] == list(range(lie.k.count))
    assert [x.queries.start for x in each] == [0, 32]


# Visits.


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("block_q", [64, 128])
def test_visits_are_those_of_the_block_map(name, block_q):
    problem, _ = described((1, 2, 500, 16), (1, 1, 333, 16), **BANDS[name])
    if not NEW:
        assert IMPLEMENTATION.refuses(problem, H200) == TOO_OLD
        return
    blocks = importlib.import_module("flash_attention_jax._impl.hopper._backward_blocks")
    config = configs.BackwardConfig(block_q=block_q)
    plan = blocks.BackwardPlan(problem, config, 1)
    # Rows beyond the last query count as visible.
    longer = dataclasses.replace(problem, T=plan.length)
    cover = np.asarray(block_map(longer, Masks(), block_q, config.tile_kv))[0].T
    cover = np.broadcast_to(cover, (plan.across.tiles_t, plan.length // block_q)).copy()
    cover[-1, cover[-1] == Cover.ALL] = Cover.PART
    for row in range(plan.across.tiles_t):
        visits = plan.visits(blocks.Tables(), jnp.int32(0), jnp.int32(row))
        partial, seen = int(visits.partial), int(visits.seen)
        steps = [plan.step(visits, jnp.int32(i), i < 2 * partial) for i in range(2 * seen)]
        steps = [(int(head), int(block)) for head, block in steps]
        for kind, found in ((Cover.PART, steps[: 2 * partial]), (Cover.ALL, steps[2 * partial :])):
            expected = [(head, block) for head in range(2) for block in np.flatnonzero(cover[row] == kind)]
            assert sorted(found) == expected


# Lowering.


def traced(problem, operands, implementation="hopper", **options):
    problem = dataclasses.replace(problem, **options)

    def loss(*arrays):
        given = arrange(problem, Operands.given(problem, arrays))
        out, lse = attend(Call(problem, implementation), given)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    return jax.jit(jax.grad(loss, (0, 1, 2))).trace(*operands.present())


@pytest.mark.parametrize("name", LOWERED)
@pytest.mark.parametrize("deterministic", [False, True])
def test_lowers_for_cuda(name, deterministic):
    problem, operands = described(**LOWERED[name])
    found = traced(problem, operands, deterministic=deterministic)
    if not NEW:
        with pytest.raises(Unsupported, match=re.escape(TOO_OLD)):
            found.lower(lowering_platforms=("cuda",))
        return
    shown = found.lower(lowering_platforms=("cuda",)).as_text()
    assert "flash_attention_hopper_backward" in shown
    apart = deterministic or configs.faster_apart(problem)
    assert ("flash_attention_hopper_dq" in shown) == apart


# The head dim, and what is changed.
VARIANTS = {
    "persistent": (128, dict(persistent=True)),
    "one-slot": (256, dict(slots_ds=1)),
    "whole-pieces": (128, dict(piece=64, slots_dq=1)),
    "one-consumer": (64, dict(consumers=1, block_q=64)),
    "small-pieces": (256, dict(piece=32, stages_do=2, slots_ds=1)),
    "lane": (64, dict(lane=True)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_choice_of_sizes_lowers(name):
    dim, change = VARIANTS[name]
    problem, operands = described((1, 2, 512, dim), (1, 2, 512, dim), causal=True)
    if not NEW:
        assert IMPLEMENTATION.refuses(problem, H200) == TOO_OLD
        return
    module = importlib.import_module("flash_attention_jax._impl.hopper._backward")
    config = dataclasses.replace(configs.choose_backward_config(problem), **change)
    assert configs.too_large_backward(problem, config) is None

    def f(lse, *arrays):
        given = arrange(problem, Operands(*arrays))
        return module.backward(problem, given, lse, given.q, lse, ("q", "k", "v"), config=config)

    lse = struct(1, 2, 512, dtype="float32")
    lowered = jax.jit(f).trace(lse, *operands.present()).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


# What is asked for, the kernels that compute it, and whether one of them adds to an array of dQ.
WANTED = {
    "q, k and v": ((0, 1, 2), (64, 64), {}, ["backward"], True),
    "k": ((1,), (64, 64), {}, ["backward"], False),
    "q": ((0,), (64, 64), {}, ["dq"], False),
    "in one order": ((0, 1, 2), (64, 64), {"deterministic": True}, ["backward", "dq"], False),
    "k in one order": ((1,), (64, 64), {"deterministic": True}, ["backward"], False),
    "wider than v": ((0, 1, 2), (192, 128), {}, ["backward", "dq"], False),
    "k wider than v": ((1,), (192, 128), {}, ["backward"], False),
}


@pytest.mark.parametrize("name", WANTED)
def test_only_what_is_asked_for_is_computed(name):
    of, (D, Dv), options, kernels, added = WANTED[name]
    x, v = struct(2, 256, D), struct(2, 256, Dv)

    def loss(q, k, v):
        out = flash_attention(q, k, v, implementation="hopper", **options).out
        return jnp.sum(out.astype(jnp.float32))

    found = jax.jit(jax.grad(loss, of)).trace(x, x, v)
    if not NEW:
        with pytest.raises(Unsupported, match=re.escape(TOO_OLD)):
            found.lower(lowering_platforms=("cuda",))
        return
    shown = found.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("backward", "dq"):
        assert (f"flash_attention_hopper_{kernel}" in shown) == (kernel in kernels)
    # The array that dQ is added to: rows of all heads, and a block that belongs to none.
    assert ("tensor<640x64xf32>" in shown) == added


def ring(q, k, v, **options):
    mesh = Mesh(jax.devices()[:1], "x")
    return ring_attention(q, k, v, mesh=mesh, axis_name="x", strategy="ring", **options)


def batched(q, k, v, **options):
    return jax.vmap(functools.partial(flash_attention, **options))(*(x[None] for x in (q, k, v)))


def sharded(q, k, v, **options):
    mesh = Mesh(jax.devices()[:1], "x")
    spec = PartitionSpec("x")
    attend = functools.partial(flash_attention, **options)
    return jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)(q, k, v)


def recomputed(q, k, v, **options):
    return jax.checkpoint(functools.partial(flash_attention, **options))(q, k, v)


@pytest.mark.parametrize("attention", [batched, sharded, recomputed, ring])
@pytest.mark.parametrize("deterministic", [False, True])
def test_transformations_keep_the_order_of_sums(attention, deterministic):
    x = struct(2, 256, 64)

    def loss(q, k, v):
        out = attention(q, k, v, implementation="hopper", deterministic=deterministic).out
        return jnp.sum(out.astype(jnp.float32))

    found = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x)
    if not NEW:
        with pytest.raises(Unsupported, match=re.escape(TOO_OLD)):
            found.lower(lowering_platforms=("cuda",))
        return
    shown = found.lower(lowering_platforms=("cuda",)).as_text()
    assert "flash_attention_hopper_backward" in shown
    assert ("flash_attention_hopper_dq" in shown) == deterministic


# Numbers.

INTERPRETED = [
    "plain",
    "cluster",
    "cluster-ragged",
    "columns",
    "ragged",
    "three-consumers",
    "persistent",
    "window",
    "offsets",
    "key-mask",
    "segments",
    "hidden-nan",
    "wide",
    "wide-ragged",
]


@pytest.fixture(scope="module")
def interpreted():
    return interpret("hopper_backward_interpreted.py", INTERPRETED)


@pytest.mark.parametrize("name", INTERPRETED)
def test_is_within_its_budget_and_without_races(interpreted, name):
    assert_right_and_without_races(interpreted, name, {"dq", "dk", "dv", "dq alone"})


def test_dq_has_room_for_the_share_of_every_consumer():
    """A slice as wide as its array is taken for the whole, wherever it begins: dQ would count twice."""
    problem, _ = described((2, 4, 200, 24), (2, 1, 333, 24), (2, 1, 333, 88))
    if not NEW:
        assert IMPLEMENTATION.refuses(problem, H200) == TOO_OLD
        return
    backward = importlib.import_module("flash_attention_jax._impl.hopper._backward")
    blocks = importlib.import_module("flash_attention_jax._impl.hopper._backward_blocks")
    config = configs.choose_backward_config(problem)
    part, of = configs.share(problem, config), configs.layouts(problem, config).k
    assert not part.by_rows
    assert of.count % config.consumers
    columns = backward._shape_of_dq(blocks.BackwardPlan(problem, config, 1), None)[1]
    assert columns == config.consumers * part.chunks * of.width > of.columns
