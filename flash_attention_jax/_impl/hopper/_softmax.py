"""The softmax of one block of logits in registers, in log base 2.

Online softmax (arXiv 1805.02867) as in FlashAttention-2 (arXiv 2307.08691, algorithm 1): the scale and
log2(e) enter with the multiplication before the exponential, and the maximum is kept in the same units.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._impl.hopper._blocks import ROWS
from flash_attention_jax._problem import Problem

Array = Any
_LOG2E = math.log2(math.e)
_LN2 = math.log(2)
# tanh(y) = y + y^3 P(y^2) below this, P fitted for the least largest error (5e-9 before rounding); above,
# 1 - 2 / (1 + exp(2y)) does not cancel.
_SMALL = 0.625
_TANH = (-0.33333282, 0.13331442, -0.053739715, 0.020639087, -0.0057049863)


class Statistics(NamedTuple):
    """Of rows: `top`, the largest logit so far in log2 units; `norm`, the sum of weights relative to it."""

    top: Array
    norm: Array

    @classmethod
    def start(cls, rows: int) -> Statistics:
        """Before any block."""
        fill = [jnp.full((rows,), value, jnp.float32) for value in (-jnp.inf, 0.0)]
        return cls(*(plgpu.layout_cast(x, ROWS) for x in fill))


def across(x: Array, shape: tuple[int, int]) -> Array:
    """A value of each row, for all columns."""
    return lax.broadcast_in_dim(x, shape, [0])


def logits(problem: Problem, products: Array) -> tuple[Array, float]:
    """The logits of q k^T, up to the positive factor that is returned with them and makes them log base 2."""
    p = problem
    if p.softcap is not None:
        return _tanh(products * (p.scale / p.softcap)), p.softcap * _LOG2E
    if p.scale > 0:
        return products, p.scale * _LOG2E
    # The maximum of products is no maximum of logits then.
    return products * (p.scale * _LOG2E), 1.0


def _tanh(y: Array) -> Array:
    """To float32 accuracy: the hardware's tanh has 11 bits."""
    square = y * y
    poly = jnp.full_like(square, _TANH[-1])
    for coefficient in _TANH[-2::-1]:
        poly = poly * square + coefficient
    small = y + y * square * poly
    size = jnp.abs(y)
    large = 1 - 2 / (1 + jnp.exp2(size * (2 * _LOG2E)))
    return jnp.where(size < _SMALL, small, jnp.where(y < 0, -large, large))


def update(x: Array, factor: float, before: Statistics, may_be_dead: bool) -> tuple[Array, Statistics, Array]:
    """Takes a block of logits into the statistics.

    Args:
        x: (rows, columns), to be multiplied by `factor`.
        may_be_dead: whether a row may have seen no key yet.

    Returns:
        Weights relative to the new top, float32; the statistics; and what sums so far decay by.
    """
    top = jnp.maximum(before.top, x.max(axis=1) * factor)
    # -inf - -inf would be NaN.
    base = jnp.where(top == -jnp.inf, 0.0, top) if may_be_dead else top
    decay = jnp.exp2(before.top - base)
    weights = jnp.exp2(x * factor - across(base, x.shape))
    return weights, Statistics(top, before.norm * decay + weights.sum(axis=1)), decay


def finish(statistics: Statistics) -> tuple[Array, Array]:
    """The factor of the sums that gives the result, and the natural lse; 0 and -inf for rows without keys."""
    top, norm = statistics
    dead = norm == 0
    norm = jnp.where(dead, 1.0, norm)
    return jnp.where(dead, 0.0, 1 / norm), jnp.where(dead, -jnp.inf, top * _LN2 + jnp.log(norm))
