"""The one loop over blocks: every query block visits the key blocks that it can see.

An operand's axes carry labels, one character each: b, n, k, t and s (batch, query heads, key/value
heads, queries, keys) are divided into tiles, query heads with the key/value head of their group; an
axis with any other label, or of size 1 where it broadcasts, is whole in every block. Blocks are
sliced where they lie, so memory order is a matter of labels.

An axis whose length is no multiple of its tile ends in a tile that overlaps the one before. The
pairs seen twice are `stale` the second time and must then contribute nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from flash_attention_jax._mask import Cover
from flash_attention_jax._problem import Problem
from flash_attention_jax._tiles import Sizes, choose_tile, extents

Array = Any


@dataclasses.dataclass(frozen=True)
class Grid:
    """The static side of a sweep: extents, tile sizes and how blocks are multiplied.

    Attributes:
        operand_dtype: dtype in which matrix units take their operands; sums are in `accumulator`.
        group: query heads for each key/value head.
        ever_whole: whether a tile of a masked problem may be known to be visible whole.
        flat: whether products are given one axis for each of batch, rows, columns and sum. On a CPU XLA
            multiplies such keys as they lie, and copies those of more axes before each product, against
            their order: a forward at (1, 1, 8192, 512) took 1.12 times the time on 2 Zen 3 cores (0.10.2).
    """

    full: Sizes
    tile: Sizes
    operand_dtype: str
    accumulator: str
    precision: str
    group: int
    ever_whole: bool
    flat: bool

    @classmethod
    def of(cls, problem: Problem, platform: str, *, one_batch: bool) -> Grid:
        """The grid for a problem on a platform.

        A CPU has no matrix unit for 16-bit floats: converting a block once and multiplying in
        float32 is faster there, and more exact.
        """
        return cls(
            full=extents(problem),
            tile=choose_tile(problem, platform, one_batch=one_batch),
            operand_dtype=problem.accumulator if platform == "cpu" else problem.dtype,
            accumulator=problem.accumulator,
            precision=problem.precision,
            group=problem.G,
            ever_whole=problem.mask is None,
            flat=platform == "cpu",
        )

    @property
    def counts(self) -> Sizes:
        """Tiles along each axis."""
        return Sizes(*(-(-n // m) for n, m in zip(self.full, self.tile, strict=True)))

    def axes(self, shape: Sequence[int], labels: str) -> dict[int, str]:
        """The axes of an array that tiles divide."""
        return {
            axis: label
            for axis, (size, label) in enumerate(zip(shape, labels, strict=True))
            if label in "bnkts" and size == self._along(self.full, label)
        }

    def _along(self, sizes: Any, label: str) -> Any:
        """What sizes or starts say of an axis with this label."""
        return sizes.k * self.group if label == "n" else getattr(sizes, label)

    def block_shape(self, shape: Sequence[int], labels: str) -> tuple[int, ...]:
        """Shape of one block of an array."""
        divided = self.axes(shape, labels)
        return tuple(
            self._along(self.tile, divided[axis]) if axis in divided else size
            for axis, size in enumerate(shape)
        )

    def block_start(self, shape: Sequence[int], labels: str, starts: Starts) -> list[Array]:
        """Where the block at these starts begins in an array."""
        divided = self.axes(shape, labels)
        return [
            self._along(starts, divided[axis]) if axis in divided else np.int32(0)
            for axis in range(len(shape))
        ]

    def dot(self, subscripts: str, x: Array, y: Array) -> Array:
        """A matrix product of blocks, in the platform's operand dtype, summed in `accumulator`."""
        product = _flat_product if self.flat else jnp.einsum
        return product(
            subscripts,
            x.astype(self.operand_dtype),
            y.astype(self.operand_dtype),
            precision=self.precision,
            preferred_element_type=self.accumulator,
        )


def _flat_product(subscripts: str, x: Array, y: Array, **options: Any) -> Array:
    """`jnp.einsum` of two operands as a product of three-dimensional arrays.

    Where x ends in another axis than that of the sum XLA's own way is kept: it copies x, which changes
    with the row of tiles alone, and multiplies faster (8 x 64, causal: by 7 %). And where several axes of the
    batch are longer than 1: a partitioner that divides the last of them would gather what is joined.
    """
    given, result = subscripts.split("->")
    of_x, of_y = given.split(",")
    batch = "".join(a for a in result if a in of_x and a in of_y)
    rows, cols = ("".join(a for a in result if a in own and a not in batch) for own in (of_x, of_y))
    summed = "".join(a for a in of_x if a not in result)
    sizes = dict(zip(of_x + of_y, x.shape + y.shape, strict=True))
    if not of_x.endswith(summed) or sum(sizes[a] > 1 for a in batch) > 1:
        return jnp.einsum(subscripts, x, y, **options)

    def joined(x: Array, labels: str, *groups: str) -> Array:
        x = jnp.einsum(f"{labels}->{''.join(groups)}", x)
        return x.reshape([math.prod(sizes[a] for a in axes) for axes in groups])

    x = joined(x, of_x, batch, rows, summed)
    if of_y.endswith(summed):
        out = jnp.einsum("brs,bcs->brc", x, joined(y, of_y, batch, cols, summed), **options)
    else:
        out = jnp.einsum("brs,bsc->brc", x, joined(y, of_y, batch, summed, cols), **options)
    axes = batch + rows + cols
    return jnp.einsum(f"{axes}->{result}", out.reshape([sizes[a] for a in axes]))


class Starts(NamedTuple):
    """Where a tile starts along each axis, traced."""

    b: Array
    k: Array
    t: Array
    s: Array


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile of a sweep, inside its loops.

    Attributes:
        grid: the sweep's grid.
        starts: where the tile starts along each axis (traced).
        rows, cols: indices i (t,) and j (s,), int32.
        fresh_rows, fresh_cols: bool (t,), (s,): not seen in an earlier tile; None if all are.
        masked: whether some pair of the tile may be hidden by a mask.
    """

    grid: Grid
    starts: Starts
    rows: Array = None
    cols: Array = None
    fresh_rows: Array = None
    fresh_cols: Array = None
    masked: bool = False

    def take(self, x: Array, labels: str) -> Array:
        """The block of x that belongs to this tile."""
        starts, sizes = self._window(x.shape, labels)
        return x if sizes == x.shape else lax.dynamic_slice(x, starts, sizes)

    def add(self, buffer: Array, labels: str, part: Array) -> Array:
        """Adds a block's part to where it belongs in the buffer."""
        starts, sizes = self._window(buffer.shape, labels)
        part = part.astype(buffer.dtype)
        if sizes == buffer.shape:
            return buffer + part
        return lax.dynamic_update_slice(buffer, lax.dynamic_slice(buffer, starts, sizes) + part, starts)

    def _window(self, shape, labels):
        grid = self.grid
        return grid.block_start(shape, labels, self.starts), grid.block_shape(shape, labels)

    def fresh(self) -> Array:
        """Bool (t|1, s|1): pairs that no earlier tile has seen; None if all are."""
        rows = None if self.fresh_rows is None else self.fresh_rows[:, None]
        cols = None if self.fresh_cols is None else self.fresh_cols[None, :]
        return cols if rows is None else rows if cols is None else rows & cols

    def along(self, axis: str, index: Array) -> Tile:
        """This tile at the given index along "t" or "s"."""
        full, size = getattr(self.grid.full, axis), getattr(self.grid.tile, axis)
        start = jnp.minimum(index * size, full - size)
        positions = start + jnp.arange(size, dtype=jnp.int32)
        fresh = None if full % size == 0 else positions >= index * size
        names = ("rows", "fresh_rows") if axis == "t" else ("cols", "fresh_cols")
        there = dict(zip(names, (positions, fresh), strict=True))
        return dataclasses.replace(self, starts=self.starts._replace(**{axis: start}), **there)


def sweep(
    grid: Grid,
    cover: Callable[[Array], Array] | None,
    operands: Sequence[tuple[Array, str]],
    buffers: Any,
    *,
    start: Callable[[Tile], Any],
    step: Callable[[Tile, list[Array], Any, Any], tuple[Any, Any]],
    finish: Callable[[Tile, Any, Any], Any],
) -> Any:
    """Runs over the tiles, for each row of them over the visible columns.

    Args:
        cover: from the index of a row of tiles to int8 (1|B, 1, tiles of s) of `Cover`; None where
            every pair is visible. A table of all rows would be quadratic, and XLA would fold it.
        operands: arrays and their labels.
        buffers: what the loops carry from beginning to end.
        start: the accumulators of a row of tiles.
        step: (tile, blocks of the operands, accumulators, buffers) to the latter two.
        finish: (tile of the row, accumulators, buffers) to the buffers.

    Returns:
        The buffers.
    """
    counts = grid.counts

    def row(index, buffers):
        index, it = jnp.divmod(index, counts.t)
        ib, ik = jnp.divmod(index, counts.k)
        corner = Starts(ib * grid.tile.b, ik * grid.tile.k, 0, 0)
        here = Tile(grid, corner).along("t", it)
        lasting = [
            None if "s" in grid.axes(x.shape, labels).values() else here.take(x, labels)
            for x, labels in operands
        ]

        def col(visit, carry, *, masked):
            js = visit if cover is None else order[visit]
            tile = dataclasses.replace(here.along("s", js), masked=masked)
            blocks = [
                tile.take(x, labels) if block is None else block
                for block, (x, labels) in zip(lasting, operands, strict=True)
            ]
            return step(tile, blocks, *carry)

        carry = (start(here), buffers)
        if cover is None:
            carry = _loop(0, counts.s, functools.partial(col, masked=False), carry)
        else:
            order, whole, seen = _visits(grid, cover(it), ib)
            middle = 0
            if grid.ever_whole:
                middle = whole
                carry = _loop(0, middle, functools.partial(col, masked=False), carry)
            carry = _loop(middle, seen, functools.partial(col, masked=True), carry)
        return finish(here, *carry)

    return _loop(0, counts.b * counts.k * counts.t, row, buffers)


def _loop(first, last, body, carry):
    """`fori_loop` whose index is int32 whatever `jax_enable_x64` says."""
    return lax.fori_loop(first, last, lambda n, c: body(jnp.asarray(n, jnp.int32), c), carry)


def _visits(grid: Grid, cover: Array, ib: Array) -> tuple[Array, Array, Array]:
    """The columns that a row of tiles visits, whole ones first, how many are whole and how many in all."""
    if cover.shape[0] > 1:
        cover = lax.dynamic_slice_in_dim(cover, ib * grid.tile.b, grid.tile.b)
    line = join_covers(cover[:, 0], axis=0)
    order = jnp.argsort(-line, stable=True).astype(jnp.int32)
    whole = jnp.sum(line == Cover.ALL, dtype=jnp.int32)
    return order, whole, jnp.sum(line != Cover.NONE, dtype=jnp.int32)


def join_covers(cover: Array, axis: int) -> Array:
    """The cover of several problems computed together, each of which has its own."""
    least, most = cover.min(axis), cover.max(axis)
    return jnp.where(least == most, least, jnp.int8(Cover.PART))
