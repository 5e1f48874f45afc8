"""Tile sizes of the backward kernel, and what a choice of them takes of a multiprocessor.

Nothing here imports Pallas: `refuses` reads it on every platform.
"""

from __future__ import annotations

import dataclasses
import math

from flash_attention_jax._impl.hopper._configs import Chunks, Launch, chunks, clustered, exceeded, static_band
from flash_attention_jax._impl.hopper._dq_configs import choose_dq_config, too_large_dq
from flash_attention_jax._problem import Problem

# `setmaxnreg` for consumers and producer, by the number of consumers; see `_configs.REGISTERS`.
REGISTERS = {1: (240, 40), 2: (240, 24), 3: (160, 24)}
# Of one consumer thread, beside accumulators: addresses, statistics, indices.
_OTHER_REGISTERS = 40


@dataclasses.dataclass(frozen=True)
class BackwardConfig(Launch):
    """What may be tuned; none of it changes a result by more than rounding.

    Attributes:
        block_q: query rows of one block, a multiple of 64.
        keys: keys of one consumer warpgroup, a multiple of 64; of the tile where `columns` is set. Otherwise
            each consumer has as many rows of the tile.
        columns: whether consumers divide the columns of dK, dV and dQ instead, and of the logits the queries;
            `block_q` is 64 then, and there are at most two. For head dims whose sums are too large otherwise.
        stages_q, stages_do: blocks of Q and of dO that their rings in shared memory hold.
        slots_ds: blocks of dS in shared memory: at least 3, and where `columns` is set 1 or 2; with 2 no
            consumer waits for one to become free.
        slots_dq: pieces of 64 rows of dQ that a consumer may have on their way out.
        piece: columns of such a piece, 32 or 64, where the layout of K allows a choice.
        rotate: whether, without a mask, each cluster begins with other queries, so that tiles which run side
            by side do not add to the same rows of dQ.
        lane: whether Mosaic lowers thread by thread instead of warpgroup by warpgroup.
    """

    persistent: bool = False
    block_q: int = 64
    keys: int = 64
    columns: bool = False
    stages_q: int = 2
    stages_do: int = 2
    slots_ds: int = 3
    slots_dq: int = 2
    piece: int = 32
    rotate: bool = True
    lane: bool = False

    def __post_init__(self):
        # Where keys are divided, nothing else keeps a slot from being written while products still read it.
        least = 1 if self.columns else 3
        if self.slots_ds < least:
            raise ValueError(f"slots_ds must be at least {least}, was {self.slots_ds}")

    @property
    def tile_kv(self) -> int:
        """Keys of a tile."""
        return self.keys * (1 if self.columns else self.consumers)

    @property
    def queries(self) -> int:
        """Queries of a block whose logits one consumer computes."""
        return self.block_q // (self.consumers if self.columns else 1)


@dataclasses.dataclass(frozen=True)
class Layouts:
    """How the columns of heads lie in shared memory; dO lies as `do`, dK as `k`, dV as `v` says."""

    q: Chunks
    k: Chunks
    v: Chunks
    do: Chunks


def layouts(problem: Problem, config: BackwardConfig) -> Layouts:
    """The layouts of a problem: K in as many chunks as consumers divide the columns of dQ, if they do."""
    of_q, of_v = chunks(problem, problem.D), chunks(problem, problem.Dv)
    if config.columns:
        of_q, of_v = (_by_columns(of, dim, config) for of, dim in ((of_q, problem.D), (of_v, problem.Dv)))
        return Layouts(of_q, of_q, of_v, of_v)
    of_k = of_q
    if of_q.tiled and (config.block_q // 64) % config.consumers:
        width = -(-of_q.width // (64 * config.consumers)) * 64
        # A chunk has the same width as the others.
        while of_q.width % width:
            width -= 64
        of_k = dataclasses.replace(of_q, width=width, count=of_q.width // width)
    return Layouts(of_q, of_k, of_v, of_v)


def _by_columns(of: Chunks, dim: int, config: BackwardConfig) -> Chunks:
    """A layout in tiles no wider than the queries of a consumer, who writes whole tiles of P and dS."""
    tile = min(of.tile, config.queries)
    if not of.tiled:
        return dataclasses.replace(of, width=tile, count=-(-dim // tile), tile=tile)
    return dataclasses.replace(of, width=dim // config.consumers, count=config.consumers, tile=tile)


@dataclasses.dataclass(frozen=True)
class Share:
    """What a consumer computes of a block of dQ: row groups of 64 queries times chunks of K's columns.

    Attributes:
        by_rows: whether consumers divide the row groups; otherwise they divide the chunks, and the last
            consumer's may be beyond the end.
        groups, chunks: of one consumer.
    """

    by_rows: bool
    groups: int
    chunks: int


def share(problem: Problem, config: BackwardConfig) -> Share:
    """How the consumers divide a block of dQ."""
    groups, count = config.block_q // 64, layouts(problem, config).k.count
    if groups % config.consumers == 0:
        return Share(True, groups // config.consumers, count)
    return Share(False, groups, -(-count // config.consumers))


def piece_of_dq(of_k: Chunks, config: BackwardConfig) -> int:
    """Columns of a piece of dQ on its way out."""
    return config.piece if of_k.width % config.piece == 0 else of_k.tile


# The sizes of FlashAttention-3 (arXiv 2407.08608) up to 128; `_backward_kernel` has the figures of others. By
# padded max(D, Dv).
_TABLE: tuple[tuple[int, BackwardConfig], ...] = (
    (64, BackwardConfig(block_q=128)),
    (128, BackwardConfig(block_q=64, cluster=2)),
    (256, BackwardConfig(block_q=64, columns=True, stages_do=1, slots_ds=2, slots_dq=1, piece=64)),
)


def choose_backward_config(problem: Problem) -> BackwardConfig | None:
    """The sizes for a problem, or None where no sizes fit."""
    widest = max(chunks(problem, dim).columns for dim in (problem.D, problem.Dv))
    config = next((config for limit, config in _TABLE if widest <= limit), None)
    if config is None:
        return None
    config = dataclasses.replace(config, persistent=_persistent(problem), section=_section(problem, config))
    return clustered(problem, config, -(-problem.S // config.tile_kv))


def _persistent(problem: Problem) -> bool:
    """Whether thread blocks stay: only under windows, whose tiles all cost the same, and not amid transfers.

    TFLOP/s on an H200 at head dim 128: a window of 1024 at 32768 tokens 393 so and 358 otherwise; causal
    545 and 552 at 16384 tokens, 456 and 476 to 492 at 4096, 393 to 401 and 408 to 418 at 2048.
    """
    windowed = problem.left is not None and problem.right is not None
    return windowed and static_band(problem) and not problem.amid_transfers


# Q, dO and dQ of the heads whose tiles run side by side should stay in the second cache level, and the tiles
# of a section should fill the device.
_SECTION_BYTES = 32 * 2**20
_SECTION_TILES = 128


def _section(problem: Problem, config: BackwardConfig) -> int:
    """Key heads that are ordered together.

    TFLOP/s on an H200 at head dim 128 with 1, 2, 4, 8 heads: causal at 16384 tokens 552, 556 (16 heads: 517);
    at 4096 tokens -, 476, 487, 492; 32 heads in groups of 4 at 8192 tokens 468, 504, 493.
    """
    if not problem.masked:
        return 1
    # Q, dO and the float32 dQ of a group.
    bytes_of_head = problem.G * problem.T * (6 * problem.D + 2 * problem.Dv)
    tiles = -(-problem.S // config.tile_kv)
    wanted = max(_SECTION_BYTES // bytes_of_head, _SECTION_TILES // tiles, 1)
    return min(problem.B * problem.K, wanted)


def faster_apart(problem: Problem) -> bool:
    """Whether dQ in a kernel of its own, two products more, takes less time than with dK and dV.

    TFLOP/s of forward and backward on an H200, in one kernel and in two: causal, head dims 192 and 128,
    351 and 369; 256 causal 421 and 421, full 436 and 430; 128 full with 512 keys 373 and 372, with 1024 466
    and 449, causal with 512 211 and 222, with 1024 321 and 317.
    """
    widths = [chunks(problem, dim).columns for dim in (problem.D, problem.Dv)]
    return widths[1] <= 128 < widths[0]


def shared_bytes(problem: Problem, config: BackwardConfig) -> int:
    """Shared memory of a thread block, each buffer rounded up to 1024 bytes."""
    c, of = config, layouts(problem, config)
    block = 2 * c.slots_ds * c.tile_kv * c.block_q
    buffers = [
        2 * c.tile_kv * of.k.columns,
        2 * c.tile_kv * of.v.columns,
        2 * c.stages_q * c.block_q * of.q.columns,
        2 * c.stages_do * c.block_q * of.do.columns,
        block,
        block if c.columns else 0,
        4 * c.consumers * c.slots_dq * 64 * piece_of_dq(of.k, c),
        8 * c.stages_q * c.block_q,
        8 * (2 * c.stages_q + 2 * c.stages_do + c.slots_ds + 6),
    ]
    return sum(-(-size // 1024) * 1024 for size in buffers)


def registers(problem: Problem, config: BackwardConfig) -> int:
    """Registers of a consumer's thread at its fullest: the sums and either P and dP or dQ."""
    c, of, part = config, layouts(problem, config), share(problem, config)
    each = c.consumers if c.columns else 1
    sums = c.keys * sum(-(-x.count // each) * x.width for x in (of.q, of.v)) / 128
    block = c.keys * c.queries / 128
    dq = 64 * part.groups * part.chunks * of.k.width / 128
    # As left operands, P and dS have 16 bits.
    return math.ceil(sums + max(2 * block, dq + (0 if c.columns else block))) + _OTHER_REGISTERS


def too_large_backward(problem: Problem, config: BackwardConfig) -> str | None:
    """Why a multiprocessor cannot hold a thread block of these sizes, or None if it can."""
    box = max(config.tile_kv, config.block_q)
    most = REGISTERS[config.consumers][0]
    return exceeded(shared_bytes(problem, config), box, registers(problem, config), most)


def refuses_backward(problem: Problem) -> str | None:
    """Why the backward kernel does not run a problem that the forward kernel runs, or None."""
    config = choose_backward_config(problem)
    if config is None:
        return f"it takes head dims up to {_TABLE[-1][0]}, not {max(problem.D, problem.Dv)}"
    return too_large_backward(problem, config) or too_large_dq(problem, choose_dq_config(problem))
