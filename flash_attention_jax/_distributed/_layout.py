"""Which positions of a sequence a device holds, and which pieces see which at each hop of a ring.

A sequence is cut into pieces of equal length. In the contiguous layout device r of P holds piece r of P.
In the zig-zag layout it holds pieces r and 2P - 1 - r of 2P, one early and one late: under causal masking
every device then has the same work at every hop. (Striped Attention, arXiv 2311.09431, balances by
interleaving single tokens, for which every block is masked; here most pairs of pieces are visible whole
or not at all.)
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from flash_attention_jax._mask import Cover
from flash_attention_jax._problem import Problem

Array = Any
LAYOUTS = ("contiguous", "zigzag")
# With more distinct distances than this one program serves them all, given the distance at run time.
_MOST_PROGRAMS = 4


def pieces_of(layout: str) -> int:
    """How many pieces each device holds."""
    return 2 if layout == "zigzag" else 1


def piece_numbers(layout: str, devices: int) -> np.ndarray:
    """The natural number of each piece: int (devices, pieces)."""
    first = np.arange(devices)
    return np.stack([first, 2 * devices - 1 - first], 1) if layout == "zigzag" else first[:, None]


def to_natural(x: Array, axis: int, layout: str, devices: int) -> Array:
    """Brings an axis that holds a whole sequence from a layout's order into the natural one."""
    if layout == "contiguous":
        return x
    axis %= x.ndim
    length = x.shape[axis] // (2 * devices)
    split = x.reshape(*x.shape[:axis], devices, 2, length, *x.shape[axis + 1 :])
    early, late = (_at(split, i, axis + 1) for i in (0, 1))
    xp = _numpy_of(x)
    return xp.concatenate([early, xp.flip(late, axis)], axis).reshape(x.shape)


def from_natural(x: Array, axis: int, layout: str, devices: int) -> Array:
    """Inverse of `to_natural`."""
    if layout == "contiguous":
        return x
    axis %= x.ndim
    length = x.shape[axis] // (2 * devices)
    split = x.reshape(*x.shape[:axis], 2, devices, length, *x.shape[axis + 1 :])
    early, late = (_at(split, i, axis) for i in (0, 1))
    xp = _numpy_of(x)
    return xp.stack([early, xp.flip(late, axis)], axis + 1).reshape(x.shape)


def _at(x: Array, index: int, axis: int) -> Array:
    """The element of an axis, whose transpose for JAX is a pad: a scatter asks for a sharding."""
    if isinstance(x, np.ndarray):
        return x[(slice(None),) * axis + (index,)]
    return lax.index_in_dim(x, index, axis, keepdims=False)


def _numpy_of(x: Array) -> Any:
    return np if isinstance(x, np.ndarray) else jnp


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static about a ring.

    Attributes:
        axis: the mesh axis around which blocks travel.
        devices: its size P.
        layout: "contiguous" or "zigzag".
        problem: one device's q against one device's k and v, with the band and the `q_offset` of the whole
            sequence. The canonical shapes of bias and mask are those of a device: with a T axis their S
            axis is the whole sequence's (or 1), without one it is the device's own.
        implementation: the one asked for, if any.
    """

    axis: str
    devices: int
    layout: str
    problem: Problem
    implementation: str | None

    @property
    def pieces(self) -> int:
        """Pieces of a device that are told apart: without a band all keys are alike."""
        return pieces_of(self.layout) if self.problem.banded else 1

    @property
    def lengths(self) -> tuple[int, int]:
        """Queries and keys of a piece."""
        return self.problem.T // self.pieces, self.problem.S // self.pieces

    @property
    def hops(self) -> tuple[int, ...]:
        """The hops that are made, ascending; at hop h a device sees the keys of the device h before it.

        Those out of every device's reach are left out, except 0, at which nothing travels.
        """
        pairs = [(i, j) for i in range(self.pieces) for j in range(self.pieces)]
        useful = np.zeros(self.devices, bool)
        for pair in pairs:
            useful |= (self.covers(pair)[0] != Cover.NONE).any(0)
        return (0, *(int(h) for h in np.flatnonzero(useful) if h))

    def distances(self, pair: tuple[int, int]) -> np.ndarray:
        """From the first key of piece `pair[1]` to the first query of `pair[0]`: int32 (device, hop).

        `q_offset` comes on top.
        """
        numbers = piece_numbers(self.layout if self.pieces == 2 else "contiguous", self.devices)
        device, hop = np.indices((self.devices, self.devices))
        rows, cols = self.lengths
        first_row, first_col = (
            numbers[device, pair[0]] * rows,
            numbers[(device - hop) % self.devices, pair[1]] * cols,
        )
        return (first_row - first_col).astype(np.int32)

    def covers(self, pair: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """How much of a pair of pieces is visible by the band alone, and at which offset: (device, hop).

        Where the offset is only known at run time, everything counts as partly visible.
        """
        p, distances = self.problem, self.distances(pair)
        if not p.banded:
            return np.full(distances.shape, int(Cover.ALL)), distances
        if p.q_offset is None:
            return np.full(distances.shape, int(Cover.PART)), distances
        offsets = distances + p.q_offset
        some, every = within(p, offsets, offsets, self.lengths)
        return np.where(every, int(Cover.ALL), np.where(some, int(Cover.PART), int(Cover.NONE))), offsets


def within(problem: Problem, least: Any, most: Any, lengths: tuple[int, int]) -> tuple[Any, Any]:
    """Whether some and whether all pairs of pieces at offsets from `least` to `most` are in the band."""
    rows, cols = lengths
    some = every = least == least
    if problem.left is not None:
        some, every = some & (cols - 1 - least >= -problem.left), every & (1 - rows - most >= -problem.left)
    if problem.right is not None:
        some, every = some & (1 - rows - most <= problem.right), every & (cols - 1 - least <= problem.right)
    return some, every


class Way(NamedTuple):
    """One way in which a pair of pieces may see each other.

    Attributes:
        cover: of `Cover`.
        offset: that of the pair, where it is partly visible; None where that is known at run time.
    """

    cover: int
    offset: int | None = None


def ways(plan: Plan, pair: tuple[int, int], hops: tuple[int, ...]) -> tuple[list[Way], np.ndarray]:
    """In which ways a pair of pieces may see each other at some hops, and which it is.

    Returns:
        The ways, and their indices, int32 (device, hop), valid at these hops.
    """
    covers, offsets = plan.covers(pair)
    part = covers == Cover.PART
    if plan.problem.q_offset is None or len(np.unique(offsets[:, hops][part[:, hops]])) > _MOST_PROGRAMS:
        kinds = [[Way(int(c)) for c in line] for line in covers]
    else:
        pairs = (zip(*lines, strict=True) for lines in zip(covers, offsets, strict=True))
        kinds = [[Way(int(c), int(o) if c == Cover.PART else None) for c, o in line] for line in pairs]
    found = list(dict.fromkeys(line[h] for line in kinds for h in hops))
    index = [[found.index(way) if way in found else 0 for way in line] for line in kinds]
    return found, np.array(index, np.int32)
