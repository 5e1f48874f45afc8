"""The backward pass: launches the kernel of `_backward_kernel`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flash_attention_jax._impl.hopper._backward_blocks import BackwardPlan, tables
from flash_attention_jax._impl.hopper._backward_configs import (
    BackwardConfig,
    choose_backward_config,
    layouts,
    share,
)
from flash_attention_jax._impl.hopper._backward_consumer import BackwardArrays, dq_rows
from flash_attention_jax._impl.hopper._backward_kernel import differentiate
from flash_attention_jax._impl.hopper._backward_memory import BackwardMemory, scratch
from flash_attention_jax._impl.hopper._blocks import Tables, multiprocessors
from flash_attention_jax._impl.hopper._statistics import statistics
from flash_attention_jax._impl.hopper._warpgroups import launch
from flash_attention_jax._problem import Operands, Problem

Array = Any


def backward(
    problem: Problem,
    operands: Operands,
    lse: Array,
    dout: Array,
    delta: Array,
    wrt: tuple[str, ...],
    *,
    config: BackwardConfig | None = None,
    blocks: int | None = None,
    interpret: Any = None,
) -> list[Array]:
    """The gradients of the operands in `wrt`; see `base.Backward`.

    Args:
        config: tile sizes; by default those of `choose_backward_config`, which must know some.
        blocks: thread blocks to launch; by default one for each tile, or as many as the device has
            multiprocessors for whole clusters where `config` is persistent.
        interpret: a `plgpu.InterpretGPUParams`, to run without a GPU.
    """
    p = problem
    if config is None:
        config = choose_backward_config(p)
        if config is None:
            raise ValueError("config must be given for a problem without sizes of its own")
        if "q" not in wrt:
            # A cluster's barriers count one warp for its warpgroup. Where dS goes to shared memory for dQ,
            # warps have met after they read the statistics and before these may be overwritten.
            config = dataclasses.replace(config, cluster=1)
    tiles = BackwardPlan(p, config, 1).across.tiles
    if blocks is None:
        blocks = config.launched(tiles, multiprocessors())
    plan = BackwardPlan(p, config, blocks)
    dead = _dead_blocks(plan, lse)
    given = tables(plan, operands)
    inputs = {"q": operands.q, "k": operands.k, "v": operands.v, "do": dout}
    inputs["statistics"] = statistics(lse, delta, plan.length)
    if dead is not None:
        inputs["dead"] = dead
    dq = None
    if "q" in wrt:
        dq = jax.new_ref(jnp.zeros(_shape_of_dq(plan, interpret), jnp.float32))

    read = {name: x for name, x in given._asdict().items() if x is not None}
    names = (*inputs, *read, *([] if dq is None else ["dq"]), "dk", "dv")

    def body(*refs, **buffers):
        by_name = dict(zip(names, refs, strict=True))
        of_tables = Tables(**{name: by_name.pop(name) for name in read})
        arrays = BackwardArrays(**by_name, tables=of_tables)
        differentiate(plan, arrays, BackwardMemory.of(p, config, buffers, interpret is not None))

    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[1:3]]
    dk, dv = launch(
        body,
        results,
        scratch(p, config, interpret is not None),
        config,
        blocks,
        "backward",
        interpret,
    )(*inputs.values(), *read.values(), *([] if dq is None else [dq]))
    gradients = {"k": dk, "v": dv}
    if dq is not None:
        gradients["q"] = _finished(plan, jax.freeze(dq), interpret)
    return [gradients[name] for name in wrt]


def _dead_blocks(plan: BackwardPlan, lse: Array) -> Array | None:
    """What `BackwardArrays` calls `dead`."""
    p, c = plan.problem, plan.config
    if not p.masked:
        return None
    dead = jnp.pad(lse == -jnp.inf, ((0, 0), (0, 0), (0, plan.length - p.T)))
    return dead.reshape(p.B, p.N, -1, c.block_q).any(-1).astype(jnp.int32)


def _shape_of_dq(plan: BackwardPlan, interpret: Any) -> tuple[int, ...]:
    p = plan.problem
    of, part = layouts(p, plan.config).k, share(p, plan.config)
    # Where consumers divide the columns unevenly, the share of the last reaches beyond the end. A slice as
    # wide as the array would be taken for the whole of it wherever it begins.
    columns = of.columns if part.by_rows else of.width * part.chunks * plan.config.consumers
    shape = (dq_rows(plan)[1], columns)
    # The interpreter does not add: each tile has an array of its own.
    return shape if interpret is None else (plan.across.tiles_t, *shape)


def _finished(plan: BackwardPlan, sums: Array, interpret: Any) -> Array:
    """dQ, of q's shape and dtype, from its sums."""
    p = plan.problem
    if interpret is not None:
        sums = sums.sum(0)
    sums = sums[: dq_rows(plan)[0]]
    sums = sums.reshape(p.B, p.N, plan.length, -1)[:, :, : p.T, : p.D]
    dq = (sums * p.scale).astype(p.dtype)
    return dq if p.order == "BNTD" else dq.swapaxes(1, 2)
