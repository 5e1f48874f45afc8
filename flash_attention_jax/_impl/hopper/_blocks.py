"""Which blocks the kernel visits, in which order, and what it hides inside them.

Two kinds of plan. A band at a static offset or one per batch element (causal, windows, or no mask at all) is
arithmetic inside the kernel. With a key mask or segments, `_mask.block_map` is made outside and turned into
lists of visits. Either way the blocks that are visible in part come first, so that the loop over
those that are visible whole holds no code for masks and never asks which block it is at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._impl.hopper._configs import Sizes, Tiling
from flash_attention_jax._mask import Cover, Masks, block_map
from flash_attention_jax._problem import Operands, Problem

Array = Any
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
# Untyped, since older versions have other parameters.
load: Any = plgpu.load


def ceil_div(x: Any, y: int) -> Any:
    """ceil(x / y) of a non-negative x."""
    return div(x + (y - 1), y)


def div(x: Any, y: int) -> Any:
    """floor(x / y) of a non-negative x."""
    return x // y if isinstance(x, int) else lax.div(x, jnp.int32(y))


def rem(x: Any, y: int) -> Any:
    """X mod y of a non-negative x."""
    return x % y if isinstance(x, int) else lax.rem(x, jnp.int32(y))


def least(x: Any, y: Any) -> Any:
    """The lesser of two ints, traced or not."""
    return min(x, y) if isinstance(x, int) and isinstance(y, int) else jnp.minimum(x, y)


class Tables(NamedTuple):
    """Arrays beside q, k and v that the kernel reads; each is None where the problem has no use for it.

    Shapes, with b being 1 or B: `offsets` (b,); `key_mask` (b, S'); `q_segments` (b, T');
    `kv_segments` (b, S'); `counts` (b, tiles, 2), blocks that are visible in part and in all;
    `visits` (b, tiles, blocks), the indices of these blocks, those visible in part first; `schedule` as
    `_schedule.schedule` makes it. All int32; S' and T' are S and T rounded up to whole blocks.
    """

    offsets: Array = None
    key_mask: Array = None
    q_segments: Array = None
    kv_segments: Array = None
    counts: Array = None
    visits: Array = None
    schedule: Array = None


def tables(problem: Problem, operands: Operands, config: Tiling, schedule: Array = None) -> Tables:
    """What the kernel reads, made from canonical operands by XLA."""
    p, c = problem, config
    counts = visits = None
    if p.key_mask is not None or p.segments is not None:
        counts, visits = _visits(p, operands, c)
    q_segments, kv_segments = _as_int32(operands.q_segments, operands.kv_segments)
    key_mask = None if operands.key_mask is None else operands.key_mask.astype(jnp.int32)
    return Tables(
        operands.q_offset,
        _padded(key_mask, c.block_kv),
        _padded(q_segments, c.tile_q),
        _padded(kv_segments, c.block_kv),
        counts,
        visits,
        None if schedule is None else jnp.asarray(schedule),
    )


def _visits(problem: Problem, operands: Operands, config: Tiling) -> tuple[Array, Array]:
    cover = block_map(problem, Masks.of(problem, operands), config.tile_q, config.block_kv)
    if problem.S % config.block_kv:
        # What is beyond the end must be hidden in the last block.
        last = cover[..., -1]
        cover = cover.at[..., -1].set(jnp.where(last == Cover.ALL, jnp.int8(Cover.PART), last))
    return visits_of(cover)


def visits_of(cover: Array) -> tuple[Array, Array]:
    """`counts` and `visits` of `Tables`, from a map of blocks."""
    partial, seen = cover == Cover.PART, cover != Cover.NONE
    counts = jnp.stack([x.sum(-1, dtype=jnp.int32) for x in (partial, seen)], axis=-1)
    # Block j is visit `rank[j]`. To ask every visit for its block is faster on a GPU than to sort.
    ranks = [jnp.cumsum(x, axis=-1, dtype=jnp.int32) - 1 for x in (partial, seen & ~partial)]
    rank = jnp.where(partial, ranks[0], jnp.where(seen, ranks[1] + counts[..., :1], -1))
    block = lax.broadcasted_iota(jnp.int32, cover.shape, cover.ndim - 1)
    visits = jnp.where(rank[..., None, :] == block[..., :, None], block[..., None, :], 0).sum(-1)
    return counts, visits.astype(jnp.int32)


def _as_int32(q_segments: Array, kv_segments: Array) -> tuple[Array, Array]:
    """Segment ids that are equal where the given ones are; 64 bits are ranked, not cut off."""
    if q_segments is None:
        return None, None
    if q_segments.dtype.itemsize <= 4 and kv_segments.dtype.itemsize <= 4:
        if q_segments.dtype == kv_segments.dtype == jnp.uint32:
            bits = [lax.bitcast_convert_type(x, jnp.int32) for x in (q_segments, kv_segments)]
            return bits[0], bits[1]
        if jnp.uint32 not in (q_segments.dtype, kv_segments.dtype):
            return q_segments.astype(jnp.int32), kv_segments.astype(jnp.int32)
    dtype = jnp.promote_types(q_segments.dtype, kv_segments.dtype)
    known = jnp.sort(q_segments.astype(dtype).ravel())
    # Keys whose id no query has get -1, which is no rank.
    ranks = []
    for ids in (q_segments.astype(dtype), kv_segments.astype(dtype)):
        at = jnp.searchsorted(known, ids).astype(jnp.int32)
        found = known[jnp.minimum(at, known.size - 1)] == ids
        ranks.append(jnp.where(found, at, -1))
    return ranks[0], ranks[1]


def _padded(x: Array | None, block: int) -> Array | None:
    """The last axis filled up with zeros to whole blocks."""
    if x is None or x.shape[-1] % block == 0:
        return x
    return jnp.pad(x, ((0, 0), (0, -x.shape[-1] % block)))


class Visits(NamedTuple):
    """The blocks of a tile: `partial` need masks, `seen` are visited; `index(i)` is the block of visit i."""

    partial: Any
    seen: Any
    index: Any


@dataclasses.dataclass(frozen=True)
class Plan(Generic[Sizes]):
    """Tiles and their visits, as seen from inside the kernel.

    Attributes:
        blocks: thread blocks that are launched.
    """

    problem: Problem
    config: Sizes
    blocks: int

    @property
    def tiles_t(self) -> int:
        """Tiles of one head."""
        return -(-self.problem.T // self.config.tile_q)

    @property
    def tiles(self) -> int:
        """Tiles of all heads."""
        return self.problem.B * self.problem.N * self.tiles_t

    @property
    def section(self) -> int:
        """Heads of a section; the last may have fewer."""
        heads = self.problem.B * self.problem.N
        return min(self.config.section or heads, heads)

    @property
    def ragged(self) -> bool:
        """Whether the last block of keys is short."""
        return self.problem.S % self.config.block_kv != 0

    def rounds(self, refs: Tables, block: Any) -> Any:
        """How many tiles a thread block takes."""
        if refs.schedule is not None:
            return refs.schedule[block + 1] - refs.schedule[block]
        return ceil_div(self.tiles - block, self.blocks)

    def tile(self, refs: Tables, block: Any, n: Any) -> tuple[Any, Any, Any]:
        """Batch element, query head and row tile of the nth tile of a thread block."""
        if refs.schedule is not None:
            return self.place(refs.schedule[self.blocks + 1 + refs.schedule[block] + n])
        return self.place(n * self.blocks + block)

    def place(self, tile: Any) -> tuple[Any, Any, Any]:
        """Batch element, query head and row tile of a tile.

        Heads are taken by sections. In a section, tiles of the same rows of all its heads are neighbours,
        and causal problems begin with the last rows, which see most.
        """
        p, section = self.problem, self.section
        of = div(tile, section * self.tiles_t)
        tile = tile - of * (section * self.tiles_t)
        here = least(section, p.B * p.N - of * section)
        row = tile // here if isinstance(tile, int) else lax.div(tile, here)
        head = of * section + (tile - row * here)
        if p.right is not None:
            row = self.tiles_t - 1 - row
        return div(head, p.N), rem(head, p.N), row

    def visits(self, refs: Tables, batch: Any, row: Any) -> Visits:
        """The visits of a tile."""
        if refs.counts is not None:
            b = shared(refs.counts, batch)
            return Visits(refs.counts[b, row, 0], refs.counts[b, row, 1], lambda i: refs.visits[b, row, i])
        return self.band_visits(self.offset(refs, batch), row)

    def offset(self, refs: Tables, batch: Any) -> Any:
        """Position of the first query."""
        if refs.offsets is None:
            return self.problem.q_offset or 0
        return refs.offsets[shared(refs.offsets, batch)]

    def band_visits(self, offset: Any, row: Any) -> Visits:
        """The visits of a tile of a band whose first query is at `offset`."""
        p, width = self.problem, self.config.block_kv
        first = row * self.config.tile_q
        last = jnp.minimum(first + self.config.tile_q, p.T) - 1
        every = -(-p.S // width)
        low, high = jnp.int32(0), jnp.int32(every)
        # Blocks from `from_` up to `to` are visible whole.
        from_, to = low, jnp.int32(p.S // width)
        if p.left is not None:
            left = jnp.maximum(first + offset - p.left, 0)
            low = jnp.where(left < p.S, div(left, width), every)
            from_ = jnp.minimum(ceil_div(jnp.maximum(last + offset - p.left, 0), width), every)
        if p.right is not None:
            high = jnp.minimum(ceil_div(jnp.maximum(last + offset + p.right + 1, 0), width), every)
            to = jnp.minimum(to, div(jnp.maximum(first + offset + p.right + 1, 0), width))
        high = jnp.maximum(high, low)
        from_ = jnp.clip(from_, low, high)
        to = jnp.clip(to, from_, high)
        right = high - to
        partial = right + (from_ - low)

        def index(i):
            # From right to left: partial on the right, partial on the left, then the whole ones.
            beside = jnp.where(i < right, high - 1 - i, from_ - 1 - (i - right))
            return jnp.where(i < partial, beside, to - 1 - (i - partial))

        return Visits(partial, high - low, index)


def shared(ref: Any, batch: Any) -> Any:
    """The batch index into an array that may be shared by all batch elements."""
    return 0 if ref.shape[0] == 1 else batch


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a warpgroup stands.

    Attributes:
        first: its first row; offset: that of the band.
        queries: the columns of Q that it holds in registers.
    """

    batch: Any
    first: Any
    offset: Any
    queries: Sequence[Array] = ()


def seen_in_block(plan: Plan, refs: Tables, place: Place, block: Any, zero: Any = None) -> Array:
    """Bool (block_q, block_kv): `_mask.visible` inside a block of keys, False beyond the last key.

    Args:
        zero: 0, if given, which only the caller knows: columns that depend on it are not kept in registers of
            a loop.
    """
    p, c = plan.problem, plan.config
    shape = (c.block_q, c.block_kv)
    start = block * c.block_kv
    rows, cols = (plgpu.broadcasted_iota(jnp.int32, shape, i, layout=plgpu.Layout.WGMMA) for i in (0, 1))
    cols = cols if zero is None else cols + zero
    terms = []
    if plan.ragged:
        terms.append(cols < p.S - start)
    if p.banded:
        distance, here = cols - rows, place.first + place.offset - start
        if p.left is not None:
            terms.append(distance >= here - p.left)
        if p.right is not None:
            terms.append(distance <= here + p.right)
    if refs.key_mask is not None:
        kept = _columns(refs.key_mask, place.batch, start, c.block_kv)
        terms.append(lax.broadcast_in_dim(kept, shape, [1]) != 0)
    if refs.q_segments is not None:
        b = shared(refs.q_segments, place.batch)
        own = load(refs.q_segments.at[b, pl.ds(place.first, c.block_q)], layout=ROWS, optimized=False)
        theirs = _columns(refs.kv_segments, place.batch, start, c.block_kv)
        terms.append(lax.broadcast_in_dim(own, shape, [0]) == lax.broadcast_in_dim(theirs, shape, [1]))
    result = terms[0]
    for term in terms[1:]:
        result = result & term
    return result


def _columns(ref: Any, batch: Any, start: Any, size: int) -> Array:
    return load(ref.at[shared(ref, batch), pl.ds(start, size)], layout=COLUMNS, optimized=False)


def multiprocessors() -> int:
    """Those of the CUDA device that is here, or of an H200 when lowering for one that is not."""
    try:
        return jax.local_devices(backend="cuda")[0].core_count
    except RuntimeError:
        return 132
