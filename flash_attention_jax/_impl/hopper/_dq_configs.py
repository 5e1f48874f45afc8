"""Tile sizes of the kernel of dQ alone, and what a choice of them takes of a multiprocessor.

Nothing here imports Pallas: `refuses` reads it on every platform.
"""

from __future__ import annotations

import dataclasses
import math

from flash_attention_jax._impl.hopper._configs import REGISTERS, Tiling, chunks, exceeded, fitted
from flash_attention_jax._problem import Problem

# Of one consumer thread, beside accumulators: addresses, statistics, indices.
_OTHER_REGISTERS = 24


@dataclasses.dataclass(frozen=True)
class DqConfig(Tiling):
    """What may be tuned; none of it changes a result by more than rounding.

    Attributes:
        stages_k, stages_v: blocks of K and of V that their rings in shared memory hold.
        lane: whether Mosaic lowers thread by thread instead of warpgroup by warpgroup.
    """

    stages_k: int = 2
    stages_v: int = 2
    lane: bool = False


# By padded max(D, Dv).
_TABLE: tuple[tuple[int, DqConfig], ...] = (
    (64, DqConfig(block_kv=128)),
    (128, DqConfig(block_kv=128)),
    (256, DqConfig(block_kv=64, stages_v=1)),
)


def choose_dq_config(problem: Problem) -> DqConfig:
    """The sizes for a problem whose head dims are at most 256."""
    widest = max(chunks(problem, dim).columns for dim in (problem.D, problem.Dv))
    return fitted(problem, next(config for limit, config in _TABLE if widest <= limit))


def shared_bytes(problem: Problem, config: DqConfig) -> int:
    """Shared memory of a thread block, each buffer rounded up to 1024 bytes."""
    c, of_k, of_v = config, chunks(problem, problem.D), chunks(problem, problem.Dv)
    buffers = [
        2 * c.tile_q * of_k.columns,
        2 * c.tile_q * of_v.columns,
        2 * c.stages_k * c.block_kv * of_k.columns,
        2 * c.stages_v * c.block_kv * of_v.columns,
        8 * (2 * c.stages_k + 2 * c.stages_v + 3),
    ]
    return sum(-(-size // 1024) * 1024 for size in buffers)


def registers(problem: Problem, config: DqConfig) -> int:
    """Registers of a consumer's thread at its fullest: dQ, and S and dP of a block."""
    rows = config.block_q / 64
    sums = rows * chunks(problem, problem.D).columns / 2
    return math.ceil(sums + rows * config.block_kv) + _OTHER_REGISTERS


def too_large_dq(problem: Problem, config: DqConfig) -> str | None:
    """Why a multiprocessor cannot hold a thread block of these sizes, or None if it can."""
    box = max(config.tile_q, config.block_kv)
    most = REGISTERS[config.consumers][0]
    return exceeded(shared_bytes(problem, config), box, registers(problem, config), most)
