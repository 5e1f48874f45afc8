"""Sums over pairs of blocks: the form that every derivative of attention has, at every order.

Given `lse`, a derivative of attention sums a function of (row block, column block) over column
blocks into what belongs to the rows (dq, say) and over row blocks into what belongs to the columns
(dk, dv). This form is closed:

- its jvp is a pair sum of the block function's jvp,
- its transpose is a pair sum of the block function's transpose, with the cotangents as operands,
- its batching is a pair sum of the vmapped block function.

So one primitive with these three rules differentiates to any order in memory linear in both
lengths, and nothing ever differentiates through its loop, which is free to skip.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from flash_attention_jax._mask import Masks, block_map
from flash_attention_jax._partition import Description, Labelled, Partitionable, register_lowering, unmarked
from flash_attention_jax._problem import Problem
from flash_attention_jax._sweep import Grid, Tile, join_covers, sweep
from flash_attention_jax._varying import abstract, alike, struct

Array = Any


class BlockFunction(Protocol):
    """A hashable function of a tile and the operands' blocks to the results' parts.

    A pair that is hidden or stale must contribute nothing to any part.
    """

    def __call__(self, tile: Tile, *blocks: Array) -> Sequence[Array]: ...


class CoverFunction(Protocol):
    """A hashable function of the masks, block sizes and a row of tiles to its map of `Cover`."""

    def __call__(self, masks: Sequence[Array], rows: int, cols: int, at: Array) -> Array: ...


@dataclasses.dataclass(frozen=True)
class PairSum:
    """All that is static about a pair sum.

    Attributes:
        problem: gives the extents, the masks and the dtypes.
        function: the block function.
        cover: the block map; None where the problem has no masks.
        masks: how many operands, the first ones, are masks.
        operands: what they are; floating ones may be differentiated.
        results: what they are. Each is summed in `problem.accumulator` and then converted.
    """

    problem: Problem
    function: BlockFunction
    cover: CoverFunction | None
    masks: int
    operands: tuple[Labelled, ...]
    results: tuple[Labelled, ...]


@dataclasses.dataclass(frozen=True)
class MapBlocks:
    """The block map of a problem, from the flat list of its masks."""

    problem: Problem
    present: tuple[str, ...]

    def __call__(self, masks, rows, cols, at):
        named = Masks(**dict(zip(self.present, masks, strict=True)))
        return block_map(self.problem, named, rows, cols, at)


@dataclasses.dataclass(frozen=True)
class Jvp:
    """The tangent of a block function in the operands `moved`, whose tangents come last."""

    function: BlockFunction
    moved: tuple[int, ...]

    def __call__(self, tile, *blocks):
        count = len(blocks) - len(self.moved)
        primals, tangents = blocks[:count], blocks[count:]

        def of_moved(*moved):
            return tuple(self.function(tile, *_replaced(primals, self.moved, moved)))

        return jax.jvp(of_moved, [primals[i] for i in self.moved], list(tangents))[1]


@dataclasses.dataclass(frozen=True)
class Transpose:
    """The transpose of a block function in the operands `linear`.

    Its blocks are those of the other operands, then the cotangents of the results `given`.
    """

    function: BlockFunction
    operands: tuple[Labelled, ...]
    linear: tuple[int, ...]
    given: tuple[int, ...]

    def __call__(self, tile, *blocks):
        count = len(self.operands) - len(self.linear)
        others, cotangents = blocks[:count], blocks[count:]
        known = [i for i in range(len(self.operands)) if i not in self.linear]
        template = _replaced([None] * len(self.operands), known, others)

        def of_linear(*moved):
            parts = self.function(tile, *_replaced(template, self.linear, moved))
            return tuple(parts[i] for i in self.given)

        structs = [
            struct(tile.grid.block_shape(x.shape, x.labels), x.dtype, blocks)
            for x in (self.operands[i] for i in self.linear)
        ]
        parts = jax.eval_shape(of_linear, *structs)
        cotangents = tuple(c.astype(p.dtype) for c, p in zip(cotangents, parts, strict=True))
        return jax.linear_transpose(of_linear, *structs)(cotangents)


@dataclasses.dataclass(frozen=True)
class Vmap:
    """A block function over one more leading axis of the blocks flagged in `mapped`."""

    function: BlockFunction
    mapped: tuple[bool, ...]
    size: int

    def __call__(self, tile, *blocks):
        axes = [0 if m else None for m in self.mapped]
        over = jax.vmap(functools.partial(self.function, tile), axes, axis_size=self.size)
        return over(*blocks)


@dataclasses.dataclass(frozen=True)
class VmapCover:
    """The joint block map of masks of which some have one more leading axis."""

    cover: CoverFunction
    mapped: tuple[bool, ...]

    def __call__(self, masks, rows, cols, at):
        axes = [0 if m else None for m in self.mapped]
        covers = jax.vmap(lambda *masks: self.cover(masks, rows, cols, at), axes)(*masks)
        return join_covers(covers, axis=0)


def pair_sum(spec: PairSum, operands: Sequence[Array]) -> list[Array]:
    """Sums `spec.function` over all pairs of blocks."""
    return pair_sum_p.bind(*alike(operands), spec=spec)


def _run(platform: str, *operands: Array, spec: PairSum) -> list[Array]:
    """The loop itself, for one platform."""
    batched = spec.cover is not None and any(
        "b" in x.labels and x.shape[x.labels.index("b")] > 1 for x in spec.operands[: spec.masks]
    )
    grid = Grid.of(spec.problem, platform, one_batch=batched)
    cover = None
    if spec.cover is not None:
        cover = functools.partial(spec.cover, operands[: spec.masks], grid.tile.t, grid.tile.s)
    in_rows = tuple({"s", "t"} & set(grid.axes(x.shape, x.labels).values()) == {"t"} for x in spec.results)
    acc = spec.problem.accumulator

    def start(tile):
        blocks = (grid.block_shape(x.shape, x.labels) for x in spec.results)
        return [jnp.zeros(b, acc) for b, inside in zip(blocks, in_rows, strict=True) if inside]

    def step(tile, blocks, sums, buffers):
        sums, buffers = iter(sums), list(buffers)
        new = []
        for i, part in enumerate(spec.function(tile, *blocks)):
            if in_rows[i]:
                new.append(next(sums) + part.astype(acc))
            else:
                buffers[i] = tile.add(buffers[i], spec.results[i].labels, part)
        return new, buffers

    def finish(tile, sums, buffers):
        sums = iter(sums)
        return [
            tile.add(buffer, x.labels, next(sums)) if inside else buffer
            for buffer, x, inside in zip(buffers, spec.results, in_rows, strict=True)
        ]

    labelled = [(x, spec.operands[i].labels) for i, x in enumerate(operands)]
    buffers = [jnp.zeros(x.shape, acc) for x in spec.results]
    sums = sweep(grid, cover, labelled, buffers, start=start, step=step, finish=finish)
    return [x.astype(r.dtype) for x, r in zip(sums, spec.results, strict=True)]


def _replaced(items: Sequence[Any], indices: Sequence[int], new: Sequence[Any]) -> list[Any]:
    items = list(items)
    for i, x in zip(indices, new, strict=True):
        items[i] = x
    return items


def jvp_of(sum_: Any, primals: Any, tangents: Any, spec: Any) -> tuple[Any, Any]:
    """The jvp rule of a sum, here over blocks: the sum of its function's jvp.

    Args:
        sum_: computes (spec, operands); `spec` has `function`, `operands` and `results`.
    """
    results = sum_(spec, primals)
    moved = tuple(i for i, t in enumerate(tangents) if type(t) is not ad.Zero)
    derived = dataclasses.replace(
        spec,
        function=Jvp(spec.function, moved),
        operands=spec.operands + tuple(spec.operands[i] for i in moved),
    )
    return results, sum_(derived, [*primals, *(tangents[i] for i in moved)])


def transpose_of(sum_: Any, transposed: Any, cotangents: Any, operands: Any, spec: Any) -> list[Any]:
    """The transpose rule of a sum: cotangents join the operands, and linear operands are the results.

    Args:
        transposed: makes the block function, of (function, operands, indices of linear operands, indices of
            results that have a cotangent).
    """
    linear = tuple(i for i, x in enumerate(operands) if ad.is_undefined_primal(x))
    given = tuple(i for i, c in enumerate(cotangents) if type(c) is not ad.Zero)
    known = [i for i in range(len(operands)) if i not in linear]
    results: list[Any] = [None] * len(operands)
    if given:
        derived = dataclasses.replace(
            spec,
            function=transposed(spec.function, spec.operands, linear, given),
            operands=tuple(spec.operands[i] for i in known) + tuple(spec.results[i] for i in given),
            results=tuple(spec.operands[i] for i in linear),
        )
        sums = sum_(derived, [operands[i] for i in known] + [cotangents[i] for i in given])
        results = _replaced(results, linear, sums)
    return results


def _jvp(primals, tangents, *, spec):
    return jvp_of(pair_sum, primals, tangents, spec)


def _transpose(cotangents, *operands, spec):
    return transpose_of(pair_sum, Transpose, cotangents, operands, spec)


def _batch(operands, dims, *, spec):
    mapped = tuple(d is not None for d in dims)
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    if size == 0:
        return [jnp.zeros((0, *x.shape), x.dtype) for x in spec.results], [0] * len(spec.results)
    operands = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True)]

    def lead(x: Labelled) -> Labelled:
        return Labelled((size, *x.shape), x.dtype, "." + x.labels)

    cover = spec.cover
    if cover is not None and any(mapped[: spec.masks]):
        cover = VmapCover(cover, mapped[: spec.masks])
    derived = dataclasses.replace(
        spec,
        function=Vmap(spec.function, mapped, size),
        cover=cover,
        operands=tuple(lead(x) if m else x for x, m in zip(spec.operands, mapped, strict=True)),
        results=tuple(lead(x) for x in spec.results),
    )
    return pair_sum(derived, operands), [0] * len(spec.results)


def _abstract(*operands, spec):
    return [abstract(x.shape, x.dtype, operands) for x in spec.results]


def _describe(operands, *, spec):
    return Description(spec.problem, spec.operands, spec.results)


def _evaluate(*operands, spec):
    # Under `jax.disable_jit` the jitted bind would come back here.
    with jax.disable_jit(False):
        return _jitted(spec)(*operands)


@functools.lru_cache(maxsize=256)
def _jitted(spec: PairSum):
    return jax.jit(lambda *operands: pair_sum(spec, operands))


pair_sum_p = Partitionable("attention_pair_sum")
pair_sum_p.def_impl(unmarked(_evaluate))
pair_sum_p.def_abstract_eval(unmarked(_abstract))
ad.primitive_jvps[pair_sum_p] = unmarked(_jvp)
ad.primitive_transposes[pair_sum_p] = unmarked(_transpose)
batching.primitive_batchers[pair_sum_p] = unmarked(_batch)
register_lowering(pair_sum_p, _run, _describe)
