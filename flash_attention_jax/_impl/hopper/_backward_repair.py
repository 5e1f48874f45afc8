"""What is hidden and not finite becomes 0 in shared memory, where a product would make it NaN."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from flash_attention_jax._impl.hopper._backward_configs import BackwardConfig
from flash_attention_jax._impl.hopper._backward_memory import BackwardMemory
from flash_attention_jax._impl.hopper._blocks import ROWS, load
from flash_attention_jax._impl.hopper._memory import Rows
from flash_attention_jax._impl.hopper._softmax import across

_WGMMA = plgpu.Layout.WGMMA


def make_finite(buffer: Rows, place: Any) -> None:
    """Makes what is not finite 0 in a part of a buffer."""
    part = load(buffer.tiles.at[place], layout=_WGMMA)
    finite = jnp.abs(part.astype(jnp.float32)) < jnp.inf
    buffer.tiles[place] = jnp.where(finite, part, jnp.zeros_like(part))


def repair_keys(memory: BackwardMemory, config: BackwardConfig, own: Any) -> None:
    """Makes the keys of consumer `own` finite; no visible one may be otherwise.

    Where all consumers have the same keys, each repairs some chunks, and the caller must let them meet.
    """
    m, c = memory, config
    for low in range(0, c.keys, 64):
        rows = pl.ds(low if c.columns else own * c.keys + low, 64)
        for chunk in range(m.k.of.count):

            def repair(rows=rows, chunk=chunk):
                make_finite(m.k, (chunk, rows))

            pl.when(own == chunk % c.consumers)(repair) if c.columns else repair()
    plgpu.commit_smem()


def repair_queries(memory: BackwardMemory, config: BackwardConfig, own: Any, slots: Any) -> None:
    """Makes the rows of Q and dO of queries that see nothing 0, each consumer some of them.

    The caller must let consumers meet.

    Args:
        slots: `q` and `do` of the block in the rings.
    """
    m, c = memory, config
    for group in range(c.block_q // 64):
        rows = pl.ds(group * 64, 64)

        def repair(rows=rows):
            lse = load(m.statistics.at[slots.q, 0, rows], layout=ROWS)
            for buffer, slot in ((m.q, slots.q), (m.do, slots.do)):
                for chunk in range(buffer.of.count):
                    part = load(buffer.tiles.at[slot, chunk, rows], layout=_WGMMA)
                    alive = across(lse, part.shape) < jnp.inf
                    buffer.tiles[slot, chunk, rows] = jnp.where(alive, part, jnp.zeros_like(part))

        pl.when(own == group % c.consumers)(repair)
    plgpu.commit_smem()
