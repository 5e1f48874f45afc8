"""Blocks that travel around a ring of devices, each hop computed while the next block is on its way.

Each device holds blocks of its own. At hop h it computes with those of the device h before it. What it
computes for the owner of such blocks (dK and dV) travels along with them, one hop behind, and after the
last hop goes home. Ring Attention, arXiv 2310.01889.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

Array = Any


class Hop(NamedTuple):
    """Where a device is in its circulation.

    Attributes:
        device: the device's own number, traced.
        number: how many places before it the blocks come from; traced inside a loop.
        among: the numbers that it may be, static.
    """

    device: Array
    number: Any
    among: tuple[int, ...]

    def look_up(self, table: Any) -> Array:
        """The entry of this device and hop in a table (device, hop)."""
        row = lax.dynamic_index_in_dim(jnp.asarray(table), self.device, keepdims=False)
        return lax.dynamic_index_in_dim(row, self.number, keepdims=False)


class _Step(NamedTuple):
    """One hop: its number, how far the sums travel before it and the blocks during it."""

    number: int
    sums_by: int
    blocks_by: int


def _steps(hops: Sequence[int]) -> list[_Step]:
    before, after = (0, *hops[:-1]), (*hops[1:], hops[-1])
    return [_Step(h, h - b, a - h) for b, h, a in zip(before, hops, after, strict=True)]


def circulate(
    axis: str,
    devices: int,
    hops: Sequence[int],
    blocks: Sequence[Array],
    sums: Sequence[Array],
    state: Any,
    body: Callable[[Hop, Sequence[Array], Any], tuple[Any, Sequence[Array]]],
) -> tuple[Any, list[Array]]:
    """Runs `body` at each hop.

    Steps that are alike share one loop, so that the program is as long for many devices as for few.

    Args:
        hops: ascending, from 0.
        blocks: what travels.
        sums: for the owner of the blocks; each hop's parts are added to them.
        state: stays on the device.
        body: (hop, blocks, state) to the state and the parts of `sums`.

    Returns:
        The state, and the sums where they belong.
    """
    device = lax.axis_index(axis)

    def travel(arrays, by):
        places = [(i, (i + by) % devices) for i in range(devices)]
        return [lax.ppermute(x, axis, places) for x in arrays] if by % devices else list(arrays)

    def step(hop, sums_by, blocks_by, carry):
        blocks, sums, state = carry
        coming = travel(blocks, blocks_by)
        sums = travel(sums, sums_by)
        state, parts = body(hop, blocks, state)
        sums = [x + part.astype(x.dtype) for x, part in zip(sums, parts, strict=True)]
        return coming, sums, state

    carry = (list(blocks), list(sums), state)
    for (back, on), group in itertools.groupby(_steps(hops), lambda s: (s.sums_by, s.blocks_by)):
        numbers = tuple(s.number for s in group)
        if len(numbers) == 1:
            carry = step(Hop(device, numbers[0], numbers), back, on, carry)
            continue

        def looped(i, carry, numbers=numbers, back=back, on=on):
            return step(Hop(device, jnp.asarray(i, jnp.int32), numbers), back, on, carry)

        carry = lax.fori_loop(numbers[0], numbers[-1] + 1, looped, carry)
    _, sums, state = carry
    return state, travel(sums, -hops[-1])
