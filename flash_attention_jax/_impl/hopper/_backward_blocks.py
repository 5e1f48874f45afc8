"""Which blocks of queries see a tile of keys, in which order, and what is hidden inside them.

The transposed of `_blocks`: a tile is a block of keys of one key head, its blocks are those of the queries of
all heads of the group. Seen from the keys, a band has its sides exchanged and starts at minus its offset, so
`_blocks.Plan` of the transposed problem says which blocks are visited.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._impl.hopper import _blocks
from flash_attention_jax._impl.hopper._backward_configs import BackwardConfig
from flash_attention_jax._impl.hopper._blocks import (
    COLUMNS,
    ROWS,
    Plan,
    Tables,
    Visits,
    load,
    rem,
    shared,
)
from flash_attention_jax._impl.hopper._configs import Tiling
from flash_attention_jax._impl.hopper._schedule import schedule
from flash_attention_jax._mask import Masks, block_map
from flash_attention_jax._problem import Operands, Problem

Array = Any


@dataclasses.dataclass(frozen=True)
class BackwardPlan:
    """Tiles of keys and their visits, as seen from inside the kernel.

    Attributes:
        blocks: thread blocks that are launched.
    """

    problem: Problem
    config: BackwardConfig
    blocks: int

    @functools.cached_property
    def across(self) -> Plan:
        """The plan of the transposed problem, whose rows are keys."""
        p, c = self.problem, self.config
        return Plan(
            dataclasses.replace(
                p,
                N=p.K,
                T=p.S,
                # Rows beyond the last query are harmless: their weights are 0.
                S=self.length,
                left=p.right,
                right=p.left,
                q_offset=-(p.q_offset or 0),
            ),
            Tiling(
                block_q=c.tile_kv,
                block_kv=c.block_q,
                consumers=1,
                persistent=c.persistent,
                section=c.section,
                cluster=c.cluster,
            ),
            self.blocks,
        )

    @property
    def length(self) -> int:
        """T rounded up to whole blocks."""
        return -(-self.problem.T // self.config.block_q) * self.config.block_q

    @property
    def ragged(self) -> bool:
        """Whether the last tile of keys is short."""
        return self.problem.S % self.config.tile_kv != 0

    @property
    def hides(self) -> bool:
        """Whether some blocks are visible in part."""
        return self.problem.masked or self.ragged

    def offset(self, refs: Tables, batch: Any) -> Any:
        """Position of the first query."""
        return -self.across.offset(refs, batch)

    def visits(self, refs: Tables, batch: Any, row: Any) -> Visits:
        """The blocks of queries of one head that see a tile."""
        visits = self.across.visits(refs, batch, row)
        if self.config.rotate and not self.problem.masked:
            blocks = self.length // self.config.block_q
            # The thread blocks of a cluster share what they read, and so begin with the same queries.
            begin = (row - rem(row, self.config.cluster)) * max(1, blocks // self.across.tiles_t)
            visits = visits._replace(index=lambda i: rem(i + begin, blocks))
        if not self.ragged:
            return visits
        # What is beyond the last key must be hidden.
        last = row == self.across.tiles_t - 1
        return visits._replace(partial=jnp.where(last, visits.seen, visits.partial))

    def step(self, visits: Visits, i: Any, masked: bool) -> tuple[Any, Any]:
        """Head of the group and block of queries of step i; those visible in part come first."""
        before = 0 if masked else visits.partial
        count = visits.partial if masked else visits.seen - visits.partial
        if self.problem.G == 1:
            return jnp.int32(0), visits.index(i)
        i = i - before * self.problem.G
        head = lax.div(i, jnp.maximum(count, 1))
        return head, visits.index(before + i - head * count)


def tables(plan: BackwardPlan, operands: Operands) -> Tables:
    """What the kernel reads beside the arrays: as `_blocks.tables`, but visits of key tiles.

    The offsets are those of the transposed problem.
    """
    p, c = plan.problem, plan.config
    counts = visits = None
    if p.key_mask is not None or p.segments is not None:
        counts, visits = _visits(p, operands, c)
    # Of the operands in the shapes that the forward kernel gives them only the padding differs.
    sizes = Tiling(block_q=c.block_q, block_kv=c.tile_kv, consumers=1)
    given = _blocks.tables(dataclasses.replace(p, key_mask=None, segments=None), operands, sizes)
    offsets = None if given.offsets is None else -given.offsets
    made = schedule(plan.across)
    made = None if made is None else jnp.asarray(made)
    return given._replace(offsets=offsets, counts=counts, visits=visits, schedule=made)


def _visits(problem: Problem, operands: Operands, config: BackwardConfig) -> tuple[Array, Array]:
    masks = Masks.of(problem, operands)
    cover = block_map(problem, masks, config.block_q, config.tile_kv).swapaxes(1, 2)
    tiles, blocks = -(-problem.S // config.tile_kv), -(-problem.T // config.block_q)
    cover = jnp.broadcast_to(cover, (cover.shape[0], tiles, blocks))
    return _blocks.visits_of(cover)


@dataclasses.dataclass(frozen=True)
class KeyPlace:
    """Where a warpgroup stands: `first` is its first key, `offset` that of the band."""

    batch: Any
    head: Any
    first: Any
    offset: Any


def seen_by_block(plan: BackwardPlan, refs: Tables, place: KeyPlace, start: Any, zero: Any) -> Array:
    """Bool (keys, queries): `_mask.visible` for queries from `start` on, False beyond the last key.

    Args:
        zero: 0, which only the caller knows: columns that depend on it are not kept in registers of a loop.
    """
    p, c = plan.problem, plan.config
    shape = (c.keys, c.queries)
    rows, cols = (plgpu.broadcasted_iota(jnp.int32, shape, i, layout=plgpu.Layout.WGMMA) for i in (0, 1))
    terms = []
    if plan.ragged:
        terms.append(rows < p.S - place.first)
    if p.banded:
        here, cols = start + place.offset - place.first, cols + zero
        if p.left is not None:
            terms.append(rows - (here - p.left) >= cols)
        if p.right is not None:
            terms.append(rows - (here + p.right) <= cols)
    if refs.key_mask is not None:
        kept = _vector(refs.key_mask, place.batch, place.first, c.keys, ROWS)
        terms.append(lax.broadcast_in_dim(kept, shape, [0]) != 0)
    if refs.q_segments is not None:
        own = _vector(refs.kv_segments, place.batch, place.first, c.keys, ROWS)
        theirs = _vector(refs.q_segments, place.batch, start, c.queries, COLUMNS)
        terms.append(lax.broadcast_in_dim(own, shape, [0]) == lax.broadcast_in_dim(theirs, shape, [1]))
    result = terms[0]
    for term in terms[1:]:
        result = result & term
    return result


def _vector(ref: Any, batch: Any, start: Any, size: int, layout: Any) -> Array:
    return load(ref.at[shared(ref, batch), pl.ds(start, size)], layout=layout, optimized=False)
