"""The results of the forward kernel on their way to device memory."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from flash_attention_jax._impl.hopper import _softmax
from flash_attention_jax._impl.hopper._blocks import ROWS
from flash_attention_jax._impl.hopper._configs import Config
from flash_attention_jax._impl.hopper._memory import Memory
from flash_attention_jax._impl.hopper._softmax import Statistics, across
from flash_attention_jax._problem import Problem


def finished(problem: Problem, sums: Any, statistics: Statistics) -> tuple[list[Any], Any, Any]:
    """The rows of out, chunk by chunk, their lse, and with masks traces: NaN where they are, else 0."""
    factor, lse = _softmax.finish(statistics)
    trace = None
    if problem.masked:
        trace = sum(((s * 0).sum(axis=1) for s in sums[1:]), (sums[0] * 0).sum(axis=1))
        factor, lse = factor + trace, lse + trace
    return [(s * across(factor, s.shape)).astype(problem.dtype) for s in sums], lse, trace


def give_lse(
    config: Config, memory: Memory, own: Any, values: Any, lse: Any, first: Any, length: int
) -> None:
    """Sends lse of a consumer's rows to those of `lse` that begin with `first`, if there are such."""
    # What the tile before left on its way must have been read.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    memory.lse[own] = plgpu.layout_cast(values, ROWS)
    plgpu.commit_smem()

    @pl.when(first < length)
    def _():
        to = lse.at[pl.ds(first, config.block_q)]
        plgpu.copy_smem_to_gmem(memory.lse.at[own], to, commit_group=False)


def give_rows(config: Config, memory: Memory, own: Any, values: Any, out: Any, first: Any) -> None:
    """Sends a consumer's rows to those of `out` that begin with `first`; TMA leaves out what is beyond."""
    c, m = config, memory
    tile = m.out.of.width
    sent = 0
    for low in range(0, c.block_q, 64):
        for left in range(0, m.v.of.columns, tile):
            slot = sent % c.out_slots
            if sent >= c.out_slots:
                plgpu.wait_smem_to_gmem(c.out_slots - 1, wait_read_only=True)
            chunk, column = divmod(left, m.v.of.width)
            m.out.tiles[own, slot] = values[chunk][low : low + 64, column : column + tile]
            plgpu.commit_smem()
            into = out.at[pl.ds(first + low, 64), pl.ds(first * 0 + left, tile)]
            plgpu.copy_smem_to_gmem(m.out.plain.at[own, slot], into)
            sent += 1
