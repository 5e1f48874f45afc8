"""An attention call as its static `Problem` and its `Operands`, raw and canonical.

`_arguments.normalize` makes both from what the caller gave; `arrange` gives raw arrays their
canonical shapes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

Order = Literal["BNTD", "BTND"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is static about one attention call: the cache key and what `refuses` reads.

    The letters are those of `DESIGN.md`. Optional operands are described by their canonical shape
    (1 where they broadcast), or None when they are absent.

    Attributes:
        order: memory order of q, k, v and out. `lse` is (B, N, T) in both.
        left, right: key j is visible to the query at position p when -left <= j - p <= right;
            None is unbounded. Causal attention is `right=0`.
        q_offset: position of the first query; None when it comes as an array or has no effect.
        precision: of the matrix products on float32, "default", "high" or "highest".
        bias, mask: canonical shape (1|B, 1|N, 1|T, 1|S).
        key_mask: canonical shape (1|B, S).
        segments: canonical shapes (1|B, T) and (1|B, S).
        offsets: canonical shape (1|B,) of `q_offset` when it is an array.
        deterministic: whether gradients must have the same bits on every run.
        amid_transfers: whether the devices exchange data at the same time, for which kernels leave room.
    """

    B: int
    N: int
    K: int
    T: int
    S: int
    D: int
    Dv: int
    dtype: str
    order: Order
    scale: float
    softcap: float | None = None
    left: int | None = None
    right: int | None = None
    q_offset: int | None = None
    precision: str = "highest"
    bias: tuple[int, int, int, int] | None = None
    bias_dtype: str | None = None
    mask: tuple[int, int, int, int] | None = None
    key_mask: tuple[int, int] | None = None
    segments: tuple[tuple[int, int], tuple[int, int]] | None = None
    offsets: tuple[int] | None = None
    deterministic: bool = False
    amid_transfers: bool = False

    @property
    def G(self) -> int:
        """Query heads for each key/value head."""
        return self.N // self.K

    @property
    def accumulator(self) -> str:
        """Dtype of logits, softmax, sums and `lse`."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def banded(self) -> bool:
        """Whether visibility depends on the distance between query and key."""
        return self.left is not None or self.right is not None

    @property
    def masked(self) -> bool:
        """Whether any key may be hidden from any query."""
        return self.banded or any(term is not None for term in (self.mask, self.key_mask, self.segments))

    @property
    def empty(self) -> bool:
        """Whether some output is empty or no query has a key to look at."""
        return 0 in (self.B, self.N, self.T, self.S)


class Operands(NamedTuple):
    """The arrays of a call: raw, as the caller gave them, or canonical, as `Problem` describes."""

    q: Any
    k: Any
    v: Any
    bias: Any = None
    mask: Any = None
    key_mask: Any = None
    q_segments: Any = None
    kv_segments: Any = None
    q_offset: Any = None

    def present(self) -> tuple[Any, ...]:
        """The operands that were given, in order."""
        return tuple(x for x in self if x is not None)

    @classmethod
    def given(cls, problem: Problem, arrays: Any) -> Operands:
        """Inverse of `present` for the operands that `problem` has."""
        has = (True, True, True, problem.bias, problem.mask, problem.key_mask)
        has += (problem.segments, problem.segments, problem.offsets)
        remaining = iter(arrays)
        return cls(*(next(remaining) if term is not None else None for term in has))


def scaled(problem: Problem, q: Any, scale: Any) -> Any:
    """Raw queries times a scale that is an array.

    What is not finite stays as it is: a query that sees no key may hold anything, and 0 * NaN would
    enter the gradient of the scale.
    """
    wide = q.astype(problem.accumulator)
    finite = jnp.isfinite(wide)
    product = jnp.where(finite, wide, 0) * scale.astype(problem.accumulator)
    return jnp.where(finite, product, wide).astype(q.dtype)


def arrange(problem: Problem, ops: Operands) -> Operands:
    """Gives raw arrays the canonical shapes of `problem`: reshapes, no transpose, no copy of q, k, v."""
    p = problem
    batch = ops.q.shape[:-3]
    rows, cols = ((p.N, p.T), (p.K, p.S)) if p.order == "BNTD" else ((p.T, p.N), (p.S, p.K))

    def batched(x, shape, tail):
        """Flattens the leading axes of x, which broadcast to the batch, to the one of `shape`."""
        if shape is None:
            return None
        lead = x.shape[: max(0, x.ndim - tail)]
        lead = (1,) * (len(batch) - len(lead)) + lead
        full = lead + (1,) * (tail - x.ndim) + x.shape[max(0, x.ndim - tail) :]
        x = x.reshape(full)
        if shape[0] != math.prod(lead):
            x = jnp.broadcast_to(x, batch + x.shape[len(batch) :])
        return x.reshape(shape[:1] + x.shape[len(batch) :])

    key_mask = batched(ops.key_mask, p.key_mask, 1)
    if key_mask is not None:
        key_mask = jnp.broadcast_to(key_mask.astype(bool), p.key_mask)
    segments = p.segments or (None, None)
    offsets = batched(ops.q_offset, p.offsets, 0)
    return Operands(
        q=ops.q.reshape((p.B, *rows, p.D)),
        k=ops.k.reshape((p.B, *cols, p.D)),
        v=ops.v.reshape((p.B, *cols, p.Dv)),
        bias=batched(ops.bias, p.bias, 3),
        mask=batched(ops.mask, p.mask, 3),
        key_mask=key_mask,
        q_segments=batched(ops.q_segments, segments[0], 1),
        kv_segments=batched(ops.kv_segments, segments[1], 1),
        q_offset=None if offsets is None else offsets.astype(jnp.int32),
    )
