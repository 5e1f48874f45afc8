"""The backward kernel's block of queries where consumers divide the keys of a tile.

A consumer has some rows of S^T, dP^T, dK and dV, from the first product to the last in registers. Only dQ
needs the keys of all: each writes its rows of dS^T to shared memory, and takes its share of the product a
step later. So no consumer waits for another's part of the same block, and one computes while the products of
the other run.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._impl.hopper._backward_consumer import (
    BackwardConsumer,
    Slots,
    Tile,
    dq_rows,
    over_steps,
)
from flash_attention_jax._impl.hopper._blocks import rem
from flash_attention_jax._impl.hopper._warpgroups import accumulated

Array = Any


class RowsConsumer(BackwardConsumer):
    """A consumer that has some keys of the tile."""

    def sums_of(self, tile: Tile, start: Any) -> Any:
        """See `BackwardConsumer`."""
        plan, visits = self.plan, tile.visits
        # The first step has no block before it: its share of dQ goes where it counts for nothing.
        nowhere = jnp.int32(dq_rows(plan)[0] // plan.config.block_q)

        def step(i, carry, masked):
            return self._step(carry, tile, plan.step(visits, i, masked), i, masked)

        sums, before = over_steps(plan, visits, step, (start, nowhere))
        if self.arrays.dq is None:
            return sums
        steps = visits.seen * plan.problem.G

        def last():
            self._last_queries(tile, tile.count + steps, before)

        pl.when(steps > 0)(last) if plan.problem.masked else last()
        return sums

    def _step(self, carry: Any, tile: Tile, at: Any, i: Any, masked: bool) -> Any:
        """Step i of a tile: dK and dV with those of a block, and which block of dQ is next."""
        c, m = self.plan.config, self.memory
        (sums, before), n = carry, tile.count + i
        head, block = self.head_and_block(tile, at)
        zero = lax.optimization_barrier(jnp.int32(0))
        slots = Slots(rem(n, c.stages_q), rem(n, c.stages_do), rem(n + c.slots_ds - 1, c.slots_ds), zero)
        self.await_queries(tile, head, block, slots, masked)
        seen = functools.partial(self.seen, tile, block, zero) if masked else None
        weights, slopes = self.weights_and_slopes(slots, seen)
        if self.arrays.dq is not None:
            # The others' dS of the step before. Whoever has given it has left the product before that behind:
            # of three slots, nobody reads the one that is written now.
            pl.when(i > 0)(lambda: plgpu.barrier_wait(m.ds_full.at[slots.ds]))
            self._give_slopes(rem(n, c.slots_ds), slopes)
        if m.interpreted:
            # Its `wgmma` takes no operand from registers.
            for which, x in enumerate((weights, slopes)):
                m.weights[self.own, which] = x
            plgpu.commit_smem()

        def left():
            if m.interpreted:
                return m.weights.at[self.own, 0], m.weights.at[self.own, 1]
            return weights, slopes

        sums = self.gradients(sums, left, slots, functools.partial(self.send, tile, before))
        plgpu.barrier_arrive(m.q_free.at[slots.q])
        return sums, self.block_of_dq(tile, head, block)

    def _give_slopes(self, slot: Any, slopes: Array) -> None:
        """Writes this consumer's rows of dS^T."""
        m = self.memory
        for group in range(self.plan.config.block_q // 64):
            m.ds[slot, group, self.part.keys] = slopes[:, group * 64 : (group + 1) * 64]
        plgpu.commit_smem()
        plgpu.barrier_arrive(m.ds_full.at[slot])

    def _last_queries(self, tile: Tile, n: Any, block: Any) -> None:
        """This consumer's share of dQ of the last block of a tile."""
        m, c = self.memory, self.plan.config
        slots = Slots(None, None, rem(n - 1, c.slots_ds), lax.optimization_barrier(jnp.int32(0)))
        plgpu.barrier_wait(m.ds_full.at[slots.ds])

        def issue(accs):
            self.issue_queries(accs, slots)

        self.send(tile, block, accumulated(self.no_dq(), issue, interpreted=m.interpreted))
