"""Values that are not finite, in the blocks of the forward kernel that are visible in part."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from flash_attention_jax._impl.hopper._blocks import ROWS, load
from flash_attention_jax._impl.hopper._configs import Config
from flash_attention_jax._impl.hopper._memory import Memory


def check_values(config: Config, memory: Memory, own: Any, slot: Any) -> None:
    """Makes a block of V finite, each consumer some rows of it; `poison` tells which were not."""
    c, m = config, memory
    plgpu.barrier_wait(m.v_full.at[slot])
    for piece in range(c.block_kv // 64):
        pl.when(own == piece % c.consumers)(lambda piece=piece: _check_rows(m, slot, piece))
    plgpu.commit_smem()
    plgpu.barrier_arrive(m.checked)
    plgpu.barrier_wait(m.checked)


def _check_rows(memory: Memory, slot: Any, piece: int) -> None:
    m, rows = memory, pl.ds(piece * 64, 64)
    trace = plgpu.layout_cast(jnp.zeros((64,), jnp.float32), ROWS)
    for chunk in range(m.v.of.count):
        # A tile at a time: the sums of the tile of queries take most of the registers.
        for left in range(0, m.v.of.width, m.v.of.tile):
            place = (slot, chunk, rows, pl.ds(left, m.v.of.tile))
            part = load(m.v.tiles.at[place], layout=plgpu.Layout.WGMMA)
            found = part.astype(jnp.float32) * 0
            m.v.tiles[place] = jnp.where(found == 0, part, jnp.zeros_like(part))
            trace = trace + found.sum(axis=1)
    m.poison[slot, rows] = trace
