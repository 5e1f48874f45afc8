"""Tile sizes of the forward kernel, and what a choice of them takes of a multiprocessor.

Nothing here imports Pallas: `_refuses` reads it on every platform.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import numpy as np

from flash_attention_jax._problem import Problem

# What one thread block may have on sm_90.
SHARED_BYTES = 227 * 1024
_REGISTERS = 64 * 1024
_LONGEST_BOX = 256
# `setmaxnreg` for consumers and producer, by the number of consumers; 128 threads of each fill the file. With
# one consumer every thread has enough from the beginning.
REGISTERS = {1: (240, 40), 2: (240, 24), 3: (160, 32)}
# Of one consumer thread, beside accumulators and probabilities: addresses, statistics, indices.
_OTHER_REGISTERS = 24


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel's tiles are given to thread blocks.

    Attributes:
        consumers: warpgroups of a thread block that compute, 1 to 3.
        persistent: whether a thread block stays on its multiprocessor and takes tile after tile.
        section: heads whose tiles are ordered together, longest first; None is all heads.
        cluster: thread blocks that take neighboring tiles at the same time. Each brings a part of every block
            of what they stream through shared memory, for all of them.
    """

    consumers: int = 2
    persistent: bool = True
    section: int | None = None
    cluster: int = 1

    @property
    def threads(self) -> int:
        """Warpgroups of a thread block."""
        return self.consumers + 1

    def launched(self, tiles: int, multiprocessors: int) -> int:
        """Thread blocks for so many tiles."""
        return min(tiles, multiprocessors // self.cluster * self.cluster) if self.persistent else tiles


@dataclasses.dataclass(frozen=True)
class Tiling(Launch):
    """How a kernel cuts queries into tiles and keys into blocks.

    Attributes:
        block_q: query rows of one consumer warpgroup, a multiple of 64.
        block_kv: keys of one block, a multiple of 64.
    """

    block_q: int = 64
    block_kv: int = 128

    @property
    def tile_q(self) -> int:
        """Query rows of a tile."""
        return self.block_q * self.consumers


Sizes = TypeVar("Sizes", bound=Tiling)
Launched = TypeVar("Launched", bound=Launch)


@dataclasses.dataclass(frozen=True)
class Config(Tiling):
    """What may be tuned; none of it changes a result by more than rounding.

    Attributes:
        stages: K and V blocks that the ring in shared memory holds.
        overlap: whether the next QK^T is issued before the softmax of this block is computed.
        pingpong: whether consumers take turns at issuing matrix products.
        out_slots: pieces of 64 rows of the result that a consumer may have on their way out.
        q_in_registers: columns of its queries that a consumer keeps in registers instead of reading them from
            shared memory for every block, as far as they are whole tiles.
        value_tile: columns of one swizzled tile of V, 64 or 32; without masks, `block_kv` need be a multiple
            of it only.
        lane: whether Mosaic lowers thread by thread instead of warpgroup by warpgroup.
    """

    stages: int = 2
    overlap: bool = True
    pingpong: bool = False
    out_slots: int = 2
    q_in_registers: int = 0
    value_tile: int = 64
    lane: bool = False


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How the columns of a head lie in shared memory: `count` buffers of `width` columns.

    Attributes:
        tile: columns of one swizzled tile of 8 rows, 16, 32 or 64.
        tiled: whether one TMA box of tiles brings the whole block, which needs lengths that are
            multiples of 8 and a head dim that is one of 64. Otherwise each buffer is one tile wide and comes
            as plain rows, so that TMA fills with zeros what is beyond the array in either direction.
    """

    width: int
    count: int
    tile: int
    tiled: bool

    @property
    def columns(self) -> int:
        """Columns with the padding."""
        return self.width * self.count

    @property
    def swizzle(self) -> int:
        """Bytes of a tile's row."""
        return 2 * self.tile


def chunks(problem: Problem, dim: int) -> Chunks:
    """The layout of a head of `dim` columns; q, k, v and out of a problem are all tiled or all not."""
    aligned = problem.T % 8 == 0 and problem.S % 8 == 0
    if aligned and problem.D % 64 == 0 and problem.Dv % 64 == 0:
        return Chunks(width=dim, count=1, tile=64, tiled=True)
    # The widest tile that adds the fewest columns of padding, in steps of 32.
    tile = 16 if dim <= 16 else 32 if dim % 64 in range(1, 33) else 64
    return Chunks(width=tile, count=-(-dim // tile), tile=tile, tiled=False)


def value_chunks(problem: Problem, config: Config) -> Chunks:
    """The layout of v."""
    of = chunks(problem, problem.Dv)
    return dataclasses.replace(of, tile=config.value_tile) if of.tiled else of


_NARROW = Config(block_kv=128, stages=4, consumers=3)
_USUAL = Config(block_kv=128, stages=2, cluster=2, q_in_registers=128)
_WIDE = Config(block_kv=64, stages=2, out_slots=1)
# The sizes of FlashAttention-3 (arXiv 2407.08608) as far as a multiple of 64 keys and the shared memory of
# separate output slots allow; `_kernel` has the figures of others. By padded D and Dv.
_TABLE: tuple[tuple[int, int, Config], ...] = (
    (64, 64, _NARROW),
    (128, 128, _USUAL),
    (192, 128, dataclasses.replace(_WIDE, block_kv=128, cluster=2)),
    (192, 192, dataclasses.replace(_WIDE, stages=3, pingpong=True)),
    (256, 256, dataclasses.replace(_WIDE, pingpong=True, q_in_registers=64)),
)
# Blocks that a tile sees on average. TFLOP/s on an H200 of thread blocks that stay and that do not, causal:
# at 16384 tokens 576 and 584 (head dim 128, 64 blocks), 622 and 622 (256, 129 blocks), at 32768 tokens 591
# and 597 (128), but at 8192 573 and 563, at 4096 537 and 508, at 2048 480 and 440.
_MOST_TO_STAY = 48


def choose_config(problem: Problem) -> Config:
    """The sizes for a problem whose head dims are at most 256."""
    D, Dv = (chunks(problem, dim).columns for dim in (problem.D, problem.Dv))
    config = fitted(problem, next(c for most, most_v, c in _TABLE if most >= D and most_v >= Dv))
    stages = min(config.stages, max(2, -(-problem.S // config.block_kv)))
    # Masks take the registers; a band leaves those of a few columns.
    few = config.q_in_registers < 128 and static_band(problem)
    in_registers = config.q_in_registers if few or not problem.masked else 0
    # Heads of 256 on an H200: causal 595 TFLOP/s with turns and 622 without, full 647 and 637.
    turns = config.pingpong and not problem.masked
    stay = config.persistent and not (problem.banded and mean_seen(problem, config) > _MOST_TO_STAY)
    return dataclasses.replace(
        config, stages=stages, q_in_registers=in_registers, pingpong=turns, persistent=stay
    )


def fitted(problem: Problem, config: Sizes) -> Sizes:
    """Sizes for tiles of queries, with what the problem decides of them."""
    config = dataclasses.replace(
        config,
        consumers=min(config.consumers, -(-problem.T // config.block_q)),
        persistent=_persistent(problem),
        section=_section(problem),
    )
    return clustered(problem, config, problem.G * -(-problem.T // config.tile_q))


def clustered(problem: Problem, config: Launched, tiles: int) -> Launched:
    """Without clusters where their tiles would not see the same blocks.

    Args:
        tiles: of those that do without masks.
    """
    fits = not problem.masked and tiles % config.cluster == 0
    return config if fits else dataclasses.replace(config, cluster=1)


def _persistent(problem: Problem) -> bool:
    """Whether thread blocks stay: where costs are known in advance, and no transfer waits for room.

    NCCL's kernels need multiprocessors, 16 of an H200. Where those of attention hold all until they end, one
    device's half of a transfer may begin before its attention and the other's after it; the first then spins
    all the while, and attention waits for its place in turn. Thread blocks of one tile make room in time. A
    full ring of two H200s, 16 heads of 128, forward, share of the rate of two alone: 0.97 so and 0.73
    otherwise with 32768 tokens, 0.97 and 0.84 with 131072, 0.97 and 0.85 with 262144. Blocks that stay, but
    fewer than multiprocessors, with 131072 tokens: 0.77 with 8 left out, 0.89 with 16, 0.81 with 32.

    `choose_config` makes an exception of long causal tiles; the kernel of dQ alone was not timed without.
    """
    return not problem.amid_transfers and (not problem.masked or static_band(problem))


def seen_in_band(problem: Problem, config: Tiling, row: Any) -> Any:
    """Blocks of keys that a tile of a static band sees; of an int or an array of them."""
    p = problem
    first = row * config.tile_q + (p.q_offset or 0)
    last = np.minimum(first + config.tile_q, p.T + (p.q_offset or 0)) - 1
    low = 0 if p.left is None else np.maximum(first - p.left, 0)
    high = p.S if p.right is None else np.clip(last + p.right + 1, 0, p.S)
    seen = -(-high // config.block_kv) - low // config.block_kv
    return np.where(high > low, seen, 0)


def mean_seen(problem: Problem, config: Tiling) -> float:
    """Blocks that a tile of a static band sees on average."""
    rows = np.arange(-(-problem.T // config.tile_q))
    return float(seen_in_band(problem, config, rows).mean())


def static_band(problem: Problem) -> bool:
    """Whether nothing but sizes and static options decides what is visible."""
    p = problem
    return p.offsets is None and p.key_mask is None and p.segments is None


# A quarter of the second cache level: K and V of the heads whose tiles run side by side should stay there.
_SECTION_BYTES = 12 * 2**20


def _section(problem: Problem) -> int | None:
    """Query heads that are ordered together.

    Those of one group without a mask; with segments all, since a tile then reads little of a head; else as
    many as the cache holds. TFLOP/s on an H100 at head dim 128: full 630 with one head, 558 with all of 16;
    eight documents 343 and 373; a key mask that keeps half 583 and 540.
    """
    if not problem.masked:
        return problem.G
    if problem.segments is not None:
        return None
    bytes_of_head = 2 * problem.S * (problem.D + problem.Dv)
    groups = max(1, _SECTION_BYTES // bytes_of_head)
    return min(problem.B * problem.N, groups * problem.G)


def shared_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of a thread block, each buffer rounded up to 1024 bytes."""
    c, of_k, of_v = config, chunks(problem, problem.D), value_chunks(problem, config)
    buffers = [
        2 * c.tile_q * of_k.columns,
        2 * c.stages * c.block_kv * of_k.columns,
        2 * c.stages * c.block_kv * of_v.columns,
        2 * c.consumers * c.out_slots * 64 * of_v.tile,
        4 * c.tile_q,
        8 * (4 * c.stages + 2 + c.consumers + 2),
    ]
    if problem.masked:
        buffers.append(4 * max(c.stages * c.block_kv, c.tile_q))
    return sum(-(-size // 1024) * 1024 for size in buffers)


def registers(problem: Problem, config: Config) -> int:
    """Registers of a consumer's thread: sums, logits, their 16-bit weights, its queries and the rest."""
    rows = config.block_q / 64
    sums = rows * chunks(problem, problem.Dv).columns / 2
    logits = rows * config.block_kv / 2
    queries = rows * min(config.q_in_registers, chunks(problem, problem.D).columns) / 4
    return math.ceil(sums + logits * 1.5 + queries) + _OTHER_REGISTERS


def too_large(problem: Problem, config: Config) -> str | None:
    """Why a multiprocessor cannot hold a thread block of these sizes, or None if it can."""
    box = max(config.tile_q, config.block_kv)
    most = REGISTERS[config.consumers][0]
    return exceeded(shared_bytes(problem, config), box, registers(problem, config), most)


def exceeded(shared: int, box: int, needed: int, most: int) -> str | None:
    """Which of the limits of a thread block is exceeded, or None.

    Args:
        shared: bytes of shared memory.
        box: rows that TMA brings at once.
        needed, most: registers of a thread.
    """
    if shared > SHARED_BYTES:
        return f"tiles take {shared} bytes of shared memory, a thread block has {SHARED_BYTES}"
    if box > _LONGEST_BOX:
        return f"TMA brings at most {_LONGEST_BOX} rows at once"
    if needed > most:
        return f"tiles take {needed} registers of a thread, it has {most}"
    return None
