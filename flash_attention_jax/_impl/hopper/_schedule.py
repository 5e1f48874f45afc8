"""Which thread block takes which tiles, where the cost of every tile is known while tracing.

Under a causal mask or a window the tiles of a head differ in cost by as much as the length of a sequence. A
static rule (the nth tile to block n mod blocks, there and back again) leaves blocks idle at the end: at 16384
tokens it ran at 0.63 (head dim 256) to 0.85 (head dim 64) of the rate of this one. A counter in memory that
blocks draw from would need to be cleared before every launch. So the drawing is done here, on estimates.
Where tiles are long, each has a thread block of its own, and the device draws (`_configs._MOST_TO_STAY`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from flash_attention_jax._impl.hopper._blocks import Plan
from flash_attention_jax._impl.hopper._configs import seen_in_band, static_band

# Of a tile, in units of a whole block: beginning and end, and what a block with masks takes longer.
_TILE_COST = 1.5
_PARTIAL_COST = 0.6
# Beyond this, tiles are so many for each block that any order balances them.
_MOST_TILES = 2**16


def schedule(plan: Plan) -> np.ndarray | None:
    """int32 (blocks + 1 + tiles,): where each block's tiles begin, and the tiles by block.

    None where every tile costs the same, or where costs are only known when the kernel runs.
    """
    p = plan.problem
    if not (plan.config.persistent and p.banded and static_band(p)) or plan.tiles > _MOST_TILES:
        return None
    of_rows = _costs(plan)
    costs = [of_rows[plan.place(tile)[2]] for tile in range(plan.tiles)]
    _, taken = min((_drawn(order, costs, plan.blocks) for order in _orders(plan, costs)), key=lambda x: x[0])
    starts = np.cumsum([0, *map(len, taken)])
    return np.concatenate([starts, *taken]).astype(np.int32)


def _orders(plan: Plan, costs: list[float]) -> Iterator[list[int]]:
    """Tiles section by section, the last one, two or three sections together, longest first.

    A section whose tiles are about as many as the blocks leaves these with one tile each, of any length.
    """
    size = plan.section * plan.tiles_t
    sections = -(-plan.tiles // size)
    for together in range(1, 4):
        first = max(0, sections - together) * size
        yield [*range(first), *sorted(range(first, plan.tiles), key=lambda tile: -costs[tile])]


def _drawn(order: list[int], costs: list[float], blocks: int) -> tuple[float, list[list[int]]]:
    """When the last block ends, and the tiles of each, which draws the next whenever it is free."""
    free = [(0.0, block) for block in range(blocks)]
    taken: list[list[int]] = [[] for _ in range(blocks)]
    for tile in order:
        spent, block = free[0]
        taken[block].append(tile)
        heapq.heapreplace(free, (spent + costs[tile], block))
    return max(free)[0], taken


def _costs(plan: Plan) -> list[float]:
    """Of the tiles of a head."""
    p, c = plan.problem, plan.config
    seen = seen_in_band(p, c, np.arange(plan.tiles_t))
    sides = sum(x is not None for x in (p.left, p.right))
    partial = np.minimum(seen, sides * -(-c.tile_q // c.block_kv))
    return (_TILE_COST + seen + _PARTIAL_COST * partial).tolist()
