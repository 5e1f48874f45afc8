"""Which queries see which keys: one predicate, and one map of blocks derived from it.

The oracle and every implementation ask here, for masking, for skipping and for counting FLOPs.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from flash_attention_jax._problem import Operands, Problem


class Masks(NamedTuple):
    """The operands that decide visibility, canonical or blocks of such.

    Shapes: `mask` (b, k, g, t, s) with 1 where it broadcasts; `key_mask` (b, s);
    `q_segments` (b, t); `kv_segments` (b, s); `q_offset` (b,). Every b may be 1.
    """

    mask: Any = None
    key_mask: Any = None
    q_segments: Any = None
    kv_segments: Any = None
    q_offset: Any = None

    @classmethod
    def of(cls, problem: Problem, operands: Operands) -> Masks:
        """The masks of canonical operands."""
        return cls(
            grouped(problem, operands.mask),
            operands.key_mask,
            operands.q_segments,
            operands.kv_segments,
            operands.q_offset,
        )


def grouped(problem: Problem, pair: Any) -> Any:
    """Splits the head axis of a canonical bias or mask: (b, n, t, s) to (b, k, g, t, s)."""
    if pair is None:
        return None
    b, n, t, s = pair.shape
    heads = (1, 1) if n == 1 else (problem.K, problem.G)
    return pair.reshape(b, *heads, t, s)


def visible(problem: Problem, masks: Masks, rows: Any, cols: Any) -> Any:
    """The predicate `visible(i, j)` of DESIGN section 2.

    Args:
        masks: blocks of the masks for these rows and columns.
        rows: int32 (t,), the queries i.
        cols: int32 (s,), the keys j.

    Returns:
        A bool array that broadcasts to (b, k, g, t, s), or None where every key is visible.
    """
    terms = []
    if problem.banded:
        offset = problem.q_offset if masks.q_offset is None else masks.q_offset[:, None, None]
        distance = cols[None, None, :] - (rows[None, :, None] + offset)
        distance = distance.reshape(-1, 1, 1, *distance.shape[-2:])
        if problem.left is not None:
            terms.append(distance >= -problem.left)
        if problem.right is not None:
            terms.append(distance <= problem.right)
    if masks.key_mask is not None:
        terms.append(masks.key_mask[:, None, None, None, :])
    if masks.q_segments is not None:
        same = masks.q_segments[:, :, None] == masks.kv_segments[:, None, :]
        terms.append(same[:, None, None])
    if masks.mask is not None:
        terms.append(masks.mask)
    result = None
    for term in terms:
        result = term if result is None else result & term
    return result


class Cover(enum.IntEnum):
    """How much of a block of pairs is visible."""

    NONE = 0
    PART = 1
    ALL = 2


def block_map(problem: Problem, masks: Masks, rows: int, cols: int, at: Any = None) -> Any:
    """Which key blocks each query block visits.

    Exact for causal, window, offset and key mask; segments are judged by the range of ids in a
    block, which is exact for sorted ones and never calls a visible block NONE. A dense `mask` is
    not read: it turns ALL into PART.

    Args:
        masks: the canonical masks.
        rows, cols: block sizes; the last block of each axis may be short.
        at: index of the one query block to map, which may be traced; None maps all.

    Returns:
        int8 (b, ceil(T / rows) or 1, ceil(S / cols)) of `Cover`, b being 1 or B.
    """
    first_row, last_row = (_one(x, at) for x in _edges(problem.T, rows))
    first_col, last_col = _edges(problem.S, cols)
    some = jnp.ones((1, first_row.size, first_col.size), bool)
    every = some
    if problem.banded:
        offset = problem.q_offset if masks.q_offset is None else masks.q_offset[:, None, None]
        lowest = first_col[None, None, :] - (last_row[None, :, None] + offset)
        highest = last_col[None, None, :] - (first_row[None, :, None] + offset)
        lower = -problem.left if problem.left is not None else None
        in_some, in_every = _band_cover(lowest, highest, lower, problem.right)
        some, every = some & in_some, every & in_every
    if masks.key_mask is not None:
        some &= _per_block(jnp.any, masks.key_mask, cols, False)[:, None, :]
        every &= _per_block(jnp.all, masks.key_mask, cols, True)[:, None, :]
    if masks.q_segments is not None:
        q_low, q_high = (_one(x, at) for x in _id_range(masks.q_segments, rows))
        kv_low, kv_high = (x[:, None, :] for x in _id_range(masks.kv_segments, cols))
        q_low, q_high = q_low[:, :, None], q_high[:, :, None]
        some &= (kv_low <= q_high) & (q_low <= kv_high)
        every &= (kv_low == q_high) & (q_low == kv_high)
    if problem.mask is not None:
        every &= False
    return jnp.where(some, jnp.where(every, Cover.ALL, Cover.PART), Cover.NONE).astype(jnp.int8)


def visible_pairs(problem: Problem, operands: Operands) -> int:
    """How many (query, key) pairs are visible over all batch elements and heads.

    Counted row block by row block, in memory linear in T and S.
    """
    if problem.empty:
        return 0
    if not problem.masked:
        return problem.B * problem.N * problem.T * problem.S
    p, masks = problem, Masks.of(problem, operands)
    total = 0
    for start in range(0, p.T, 256):
        rows = jnp.arange(start, min(start + 256, p.T), dtype=jnp.int32)
        here = masks._replace(
            q_segments=None if masks.q_segments is None else masks.q_segments[:, rows],
            mask=masks.mask if p.mask is None or p.mask[2] == 1 else masks.mask[..., rows, :],
        )
        seen = visible(p, here, rows, jnp.arange(p.S, dtype=jnp.int32))
        copies = p.B * p.K * p.G * rows.size * p.S // seen.size
        total += int(np.asarray(seen).sum()) * copies
    return total


def _edges(length: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.arange(0, length, block, dtype=np.int32)
    return first, np.minimum(first + np.int32(block), np.int32(length)) - np.int32(1)


def _one(x: Any, at: Any) -> Any:
    """The element `at` of the last axis, which is kept; all of them if it is None."""
    return x if at is None else lax.dynamic_index_in_dim(x, at, axis=-1)


def _band_cover(lowest, highest, lower, upper):
    """Whether some and whether every distance in [lowest, highest] lies in [lower, upper]."""
    some = every = True
    if lower is not None:
        some, every = some & (highest >= lower), every & (lowest >= lower)
    if upper is not None:
        some, every = some & (lowest <= upper), every & (highest <= upper)
    return some, every


def _per_block(reduce, x, block: int, fill) -> Any:
    """Reduces the last axis of x block by block; the short last block is filled up with `fill`."""
    blocks = -(-x.shape[-1] // block)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, blocks * block - x.shape[-1])]
    padded = jnp.pad(x, padding, constant_values=fill)
    return reduce(padded.reshape(*x.shape[:-1], blocks, block), axis=-1)


def _id_range(ids, block: int) -> tuple[Any, Any]:
    info = jnp.iinfo(ids.dtype)
    # As Python's they need not fit JAX's default integer.
    least, most = (np.array(x, ids.dtype) for x in (info.min, info.max))
    return _per_block(jnp.min, ids, block, most), _per_block(jnp.max, ids, block, least)
