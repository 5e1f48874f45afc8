"""The backward kernel's block of queries where consumers divide the columns of dK, dV and dQ.

For head dims whose sums no warpgroup can hold. A consumer computes S^T and dP^T of some queries and all keys
of the tile, and puts P^T and dS^T into shared memory; all wait for each other, and each multiplies all of
them with its columns.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._impl.hopper._backward_consumer import (
    BackwardConsumer,
    Slots,
    Tile,
    over_steps,
)
from flash_attention_jax._impl.hopper._blocks import rem

Array = Any


class ColumnsConsumer(BackwardConsumer):
    """A consumer that has some columns of the results."""

    def sums_of(self, tile: Tile, start: Any) -> Any:
        """See `BackwardConsumer`."""
        plan, visits = self.plan, tile.visits

        def step(i, sums, masked):
            return self._step(sums, tile, plan.step(visits, i, masked), tile.count + i, masked)

        return over_steps(plan, visits, step, start)

    def _step(self, sums: Any, tile: Tile, at: Any, n: Any, masked: bool) -> Any:
        """dK and dV with those of a block."""
        c, m = self.plan.config, self.memory
        head, block = self.head_and_block(tile, at)
        zero = lax.optimization_barrier(jnp.int32(0))
        slots = Slots(rem(n, c.stages_q), rem(n, c.stages_do), rem(n, c.slots_ds), zero)
        self.await_queries(tile, head, block, slots, masked)
        weights, slopes = self.weights_and_slopes(
            slots, functools.partial(self.seen, tile, block, zero) if masked else None
        )
        self._share(weights, slopes, slots.ds)
        send = functools.partial(self.send, tile, self.block_of_dq(tile, head, block))
        sums = self.gradients(sums, lambda: (m.p.at[slots.ds, 0], m.ds.at[slots.ds, 0]), slots, send)
        plgpu.barrier_arrive(m.q_free.at[slots.q])
        return sums

    def _share(self, weights: Array, slopes: Array, slot: Any) -> None:
        """Writes this consumer's part of P^T and dS^T for the others, and waits for theirs."""
        m = self.memory
        if self.plan.config.slots_ds == 1:
            # All must have read the block before.
            self.meet()
        m.p[slot, 0, :, self.part.queries] = weights
        m.ds[slot, 0, :, self.part.queries] = slopes
        plgpu.commit_smem()
        plgpu.barrier_arrive(m.ds_full.at[slot])
        # Not between products: where there is a branch while some are under way, ptxas serializes every
        # `wgmma` of the kernel (C7513).
        plgpu.barrier_wait(m.ds_full.at[slot])
