"""How the results of the backward kernel leave: TMA adds dQ, and copies dK and dV by way of K and V."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from flash_attention_jax._impl.hopper._backward_configs import BackwardConfig
from flash_attention_jax._impl.hopper._backward_memory import BackwardMemory
from flash_attention_jax._impl.hopper._backward_parts import Part
from flash_attention_jax._impl.hopper._memory import Rows

Array = Any


def add_dq(
    memory: BackwardMemory,
    config: BackwardConfig,
    own: Any,
    part: Part,
    values: list[Array],
    to: Any,
    start: Any,
) -> None:
    """Adds a consumer's share of a block of dQ.

    Args:
        values: float32 (64, width) for each of `part.of_dq`.
        to: float32 (rows, D') in device memory, D' with room for the share of every consumer.
        start: the block's first row there.
    """
    m, c, of, width = memory, config, memory.k.of, memory.dq.shape[-1]
    pieces = len(values) * of.width // width
    slots = c.slots_dq if pieces % c.slots_dq == 0 else 1
    how: Any = {} if m.interpreted else {"reduction_op": "add"}
    sent = 0
    for value, (group, chunk) in zip(values, part.of_dq, strict=True):
        for column in range(0, of.width, width):
            slot = sent % slots
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            m.dq[own, slot] = value[:, column : column + width]
            plgpu.commit_smem()
            rows, first = start + group * 64, chunk * of.width + column
            target = to.at[pl.ds(rows, 64), pl.ds(rows * 0 + first, width)]
            plgpu.copy_smem_to_gmem(m.dq.at[own, slot], target, **how)
            sent += 1


def write(buffer: Rows, part: Part, chunks: list[Any], values: list[Array], dtype: str) -> None:
    """Puts a consumer's chunks of dK or dV where K or V lay, whose chunks may be narrower."""
    of = buffer.of
    for chunk, x in zip(chunks, values, strict=True):
        wide = x.shape[-1] // of.width

        def put(chunk=chunk, x=x, wide=wide):
            for at in range(wide):
                narrow = x if wide == 1 else x[:, at * of.width : (at + 1) * of.width]
                buffer.tiles[chunk * wide + at, part.keys] = narrow.astype(jnp.dtype(dtype))

        put() if isinstance(chunk, int) else pl.when(chunk < of.count)(put)


def copy_out(buffer: Rows, part: Part, chunks: list[Any], to: Any, first: Any) -> None:
    """Starts the copies of what `write` put there; TMA leaves out what is beyond the array.

    Args:
        to: (length, dim) in device memory.
        first: the consumer's first key.
    """
    of = buffer.of
    for chunk in chunks:

        def copy(chunk=chunk):
            columns = pl.ds(first * 0 + chunk * of.width, of.width)
            target = to.at[pl.ds(first, part.keys.size), columns]
            plgpu.copy_smem_to_gmem(buffer.plain.at[chunk, part.keys], target)

        copy() if isinstance(chunk, int) else pl.when(chunk < of.count)(copy)
