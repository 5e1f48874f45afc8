"""How a platform's blocks are sized."""

from __future__ import annotations

from typing import NamedTuple

from flash_attention_jax._problem import Problem


class Sizes(NamedTuple):
    """Extents of a problem, or of one tile of it: batch, key/value heads, queries, keys."""

    b: int
    k: int
    t: int
    s: int


class Target(NamedTuple):
    """What a platform's tiles aim at.

    Attributes:
        pairs: (query, key) pairs in a tile, over all its heads.
        rows: query rows for each key/value head, counting the group.
        cols: keys, and as many more as there are fewer rows.
        least: rows and keys below which a narrow window does not shrink them.
        narrow: pairs in a tile that a window makes smaller than `rows`.
        alone: pairs of one head, without masks, that a single tile may hold.
    """

    pairs: int
    rows: int
    cols: int
    least: int
    narrow: int
    alone: int


# CPU: 2 Zen 4 cores, float32, GFLOP/s of forward / forward and backward for (log2(pairs), rows, cols):
#                             (18, 512, 512)  (19, 1024, 512)  (20, 1024, 1024)  (20, 2048, 512)
#   8 x 64, T = 4096, 0.10.2:      117/106          150/153          159/158           162/157
#     0.12.0:                      134/145          147/160          157/161           158/156
#   2 x 128, T = 4096, 0.10.2:                      162/159          163/159           168/153
#     0.12.0:                                       167/178          181/181           186/183
#   1 x 512, T = 8192, 0.10.2:     150/134          158/152          165/156           173/143
#     0.12.0:                      164/136          158/139          154/163           170/170
# 2**22 and 2048 x 2048: 141/141 at 8 x 64. A head that fits in one tile of 2**20 needs no loop, and its
# gradient takes the logits from the forward.
_CPU = Target(pairs=2**20, rows=1024, cols=1024, least=128, narrow=2**18, alone=2**20)
# Smaller tiles compute fewer pairs that masks hide: causal at T = 4096, 1.13 times the visible ones with
# 512 x 512, 1.25 times with 1024 x 1024. Two heads in a tile share what a step costs. Causal, T = 4096, best
# of 6, and of 4 in the last row:
#                             (18, 512, 512)  (19, 512, 512)  (20, 512, 512)  (20, 1024, 1024)
#   8 x 64, 0.10.2:                                126/132         130/125         120/118
#     0.12.0:                                      127/133         126/131         116/122
#   2 x 128, 0.10.2:               146/143         148/139                         135/135
#     0.12.0:                      134/139         139/141                         129/126
#   1 x 512, 0.10.2:               157/156                                         145/147
#     0.12.0:                      131/140                                         123/136
# (19, 256, 256) is as fast at 8 x 64 on 0.12.0, 127/134, but not on 0.10.2, 78/85: there a product of so few
# pairs of each head runs on one core.
_CPU_MASKED = Target(pairs=2**19, rows=512, cols=512, least=128, narrow=2**18, alone=0)
# An accelerator wants few, large products: 2**25 pairs are 128 MiB of float32 logits.
_ACCELERATOR = Target(pairs=2**25, rows=4096, cols=8192, least=1024, narrow=2**23, alone=2**25)


def extents(problem: Problem) -> Sizes:
    """The axes of a problem that tiles divide."""
    return Sizes(problem.B, problem.K, problem.T, problem.S)


def choose_tile(problem: Problem, platform: str, *, one_batch: bool) -> Sizes:
    """The tile for a problem on a platform.

    Args:
        one_batch: whether a tile may hold only one batch element, so that blocks which its
            masks rule out can be skipped.
    """
    target = _target(problem, platform)
    full = extents(problem)
    if not problem.masked and problem.G * full.t * full.s <= target.alone:
        room = target.pairs // (problem.G * full.t * full.s)
        return Sizes(*_heads(full, room, one_batch=False), full.t, full.s)
    side = _window_side(problem, target)
    t = _even(full.t, max(1, min(target.rows, side) // problem.G))
    # Few rows (decoding) leave room for longer key blocks.
    s = _even(full.s, min(max(target.cols, target.rows * target.cols // (problem.G * t)), side))
    pairs = target.pairs if side >= target.rows else target.narrow
    room = pairs // (problem.G * t * s)
    return Sizes(*_heads(full, room, one_batch=one_batch), t, s)


def _target(problem: Problem, platform: str) -> Target:
    if platform != "cpu":
        return _ACCELERATOR
    return _CPU_MASKED if problem.masked else _CPU


def _heads(full: Sizes, room: int, *, one_batch: bool) -> tuple[int, int]:
    """How many batch elements and key/value heads a tile holds, if it has room for so many heads."""
    k = _divisor(full.k, room)
    return 1 if one_batch else _divisor(full.b, room // k), k


def _window_side(problem: Problem, target: Target) -> int:
    """Tiles no larger than half the window, since every tile that touches it is computed whole."""
    if problem.left is None or problem.right is None:
        return 2**30
    return max(target.least, 2 ** ((problem.left + problem.right) // 2 - 1).bit_length())


def _even(length: int, most: int) -> int:
    """A block of at most about `most` that divides `length`, or else leaves a short overlap."""
    blocks = -(-length // most)
    if length % blocks == 0:
        return length // blocks
    unit = min(16, most)
    return min(length, -(-length // blocks // unit) * unit)


def _divisor(length: int, most: int) -> int:
    return max(d for d in range(1, max(1, min(length, most)) + 1) if length % d == 0)
