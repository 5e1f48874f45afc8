"""dQ alone: launches the kernel of `_dq_kernel`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flash_attention_jax._impl.hopper._blocks import Plan, Tables, multiprocessors, tables
from flash_attention_jax._impl.hopper._dq_configs import DqConfig, choose_dq_config
from flash_attention_jax._impl.hopper._dq_kernel import DqArrays, DqMemory, differentiate_queries, scratch
from flash_attention_jax._impl.hopper._schedule import schedule
from flash_attention_jax._impl.hopper._statistics import statistics
from flash_attention_jax._impl.hopper._warpgroups import launch
from flash_attention_jax._problem import Operands, Problem

Array = Any


def query_gradient(
    problem: Problem,
    operands: Operands,
    lse: Array,
    dout: Array,
    delta: Array,
    *,
    config: DqConfig | None = None,
    blocks: int | None = None,
    interpret: Any = None,
) -> Array:
    """The gradient of q, of its shape and dtype, with the same bits on every run; see `base.Backward`.

    Args:
        config: tile sizes; by default those of `choose_dq_config`.
        blocks: thread blocks to launch; by default as many as the device has multiprocessors, or one for
            each tile where `config` is not persistent.
        interpret: a `plgpu.InterpretGPUParams`, to run without a GPU.
    """
    p = problem
    config = choose_dq_config(p) if config is None else config
    blocks = config.launched(Plan(p, config, 1).tiles, multiprocessors()) if blocks is None else blocks
    plan = Plan(p, config, blocks)
    given = {n: x for n, x in tables(p, operands, config, schedule(plan))._asdict().items() if x is not None}
    of_rows = statistics(lse, delta, -(-p.T // config.tile_q) * config.tile_q)

    def body(*refs, **buffers):
        q, k, v, do, of_rows, *of_tables, dq = refs
        read = Tables(**dict(zip(given, of_tables, strict=True)))
        memory = DqMemory.of(p, buffers, interpret is not None)
        differentiate_queries(plan, DqArrays(q, k, v, do, of_rows, dq, read), memory)

    return launch(
        body,
        jax.ShapeDtypeStruct(operands.q.shape, jnp.dtype(p.dtype)),
        scratch(p, config, interpret is not None),
        config,
        blocks,
        "dq",
        interpret,
    )(*operands[:3], dout, of_rows, *given.values())
