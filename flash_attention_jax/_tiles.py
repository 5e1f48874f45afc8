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
        cols: keys.
        least: rows and keys below which a narrow window does not shrink them.
        alone: pairs of one head, without masks, that a single tile may hold.
    """

    pairs: int
    rows: int
    cols: int
    least: int
    alone: int


# CPU: 2 Zen 4 cores, JAX 0.12.0, float32, T = 4096, GFLOP/s of forward / forward and backward for
# (log2(pairs), rows, cols):
#                    (20, 1024, 512)  (20, 512, 512)  (18, 512, 512)  (18, 256, 512)
#   1 head of 512:       132/140          133/123         164/145         123/119
#   2 heads of 128:       65/56            71/52           70/61           65/60
#   4 heads of 64:        50/42            58/44           60/48           55/43
# so 2**18 pairs, whose 1 MiB of logits stays in the second cache level. A head that fits in one tile
# of 2**20 needs no loop, and its gradient takes the logits from the forward: 1 head of 64, 128, 512
# at T = 1024, over plain attention, 1.09, 1.10, 1.01 forward and 2.6, 1.8, 1.2 with the gradient
# (JAX 0.10.2), where tiles of 2**18 give 0.84, 0.94, 1.00 and 1.1, 1.0, 0.9.
_CPU = Target(pairs=2**18, rows=512, cols=512, least=128, alone=2**20)
# An accelerator wants few, large products: 2**25 pairs are 128 MiB of float32 logits.
_ACCELERATOR = Target(pairs=2**25, rows=4096, cols=4096, least=1024, alone=2**25)


def extents(problem: Problem) -> Sizes:
    """The axes of a problem that tiles divide."""
    return Sizes(problem.B, problem.K, problem.T, problem.S)


def choose_tile(problem: Problem, platform: str, *, one_batch: bool) -> Sizes:
    """The tile for a problem on a platform.

    Args:
        one_batch: whether a tile may hold only one batch element, so that blocks which its
            masks rule out can be skipped.
    """
    target = _CPU if platform == "cpu" else _ACCELERATOR
    full = extents(problem)
    if not problem.masked and problem.G * full.t * full.s <= target.alone:
        room = target.pairs // (problem.G * full.t * full.s)
        return Sizes(*_heads(full, room, one_batch=False), full.t, full.s)
    side = _window_side(problem, target)
    t = _even(full.t, max(1, min(target.rows, side) // problem.G))
    # Few rows (decoding) leave room for longer key blocks.
    room = target.pairs // (problem.G * t)
    s = _even(full.s, min(max(target.cols, room), side))
    return Sizes(*_heads(full, room // s, one_batch=one_batch), t, s)


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
